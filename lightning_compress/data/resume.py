"""Exact resume from inside an epoch.

Lightning restores weights, optimizers, schedulers and loop counters. It restores neither the random states nor the
place in the training data, so a run that shuffles or drops out continues differently after an interruption. Two parts
close the gap: a loader that is a function of (seed, epoch, position), and the :class:`ExactResume` callback.

What your own training loader must do:

* have ``state_dict()`` and ``load_state_dict()``, with the number of batches *handed out* in this epoch and not those
  fetched ahead; Lightning stores them in every checkpoint. ``__len__`` stays that of a whole epoch;
* draw its order from seed and epoch alone, never from the global random state, and follow ``sampler.set_epoch(epoch)``.
  Lightning calls it after it has made the iterator, so nothing may be drawn before the first batch is asked for;
* draw augmentation from (seed, epoch, index), because workers fetch ahead and the first batch after a resume is fetched
  before the random states are back;
* give evaluation loaders a ``generator`` of their own: each pass over a plain ``DataLoader`` draws from the global one.

``ResumableLoader`` does the first two for any map-style data set, and its indices carry a key for the third. With other
loaders a checkpoint from the end of an epoch still resumes where the run was, with another order of the data.
A killed run continues from its last completed checkpoint, so save every N steps.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import distributed


def random_states() -> dict[str, torch.Tensor]:
    """Return the states of Python's, NumPy's and torch's random generators as tensors.

    Returns:
        ``python`` (625,) int64 and ``python_gauss`` (1,) float64, where nan stands for "none cached"; ``numpy`` (626,)
        int64 and ``numpy_gauss`` (1,) float64; ``torch`` uint8; ``cuda`` uint8 of this device, once in use.

    >>> state = random_states(); first = torch.rand(1)
    >>> set_random_states(state); bool(torch.rand(1) == first)
    True
    """
    _, words, gauss = random.getstate()
    legacy: dict[str, Any] = np.random.get_state(legacy=False)  # noqa: NPY002 - users draw from it
    numbers = [*legacy["state"]["key"].tolist(), legacy["state"]["pos"], legacy["has_gauss"]]
    states = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([float("nan") if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.tensor(numbers, dtype=torch.int64),
        "numpy_gauss": torch.tensor([legacy["gauss"]], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, torch.Tensor]) -> None:
    """Set the random generators to what :func:`random_states` returned.

    Args:
        states: The tensors; ``cuda`` is left out where there is no CUDA device.
    """
    gauss = float(states["python_gauss"])
    random.setstate((3, tuple(states["python"].tolist()), None if np.isnan(gauss) else gauss))
    *key, position, has_gauss = states["numpy"].tolist()
    cached = float(states["numpy_gauss"])
    np.random.set_state(("MT19937", np.array(key, dtype=np.uint32), position, has_gauss, cached))  # noqa: NPY002 - as above
    # Copies: a view that starts inside a larger tensor crashes torch.set_rng_state.
    torch.set_rng_state(states["torch"].cpu().clone())
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu().clone())


class ExactResume(Callback):
    """Save the random states in every checkpoint and set them back before the first batch after a resume.

    Together with a loader that keeps its place the resumed run equals the uninterrupted one bit for bit, also from
    inside an epoch; the module's docstring says what loaders must do. In a distributed run the states of every rank are
    saved. Put it before callbacks that draw random numbers.

    Runs on: any accelerator with one device per process.
    """

    def __init__(self) -> None:
        self._pending: dict[str, torch.Tensor] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget a state that an earlier call loaded and never used."""
        self._pending = None

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the random states, one row per rank."""
        if self._pending is not None:
            return self._pending
        return {name: _gather(state) for name, state in random_states().items()}

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Keep the states until training begins; what happens until then may draw random numbers."""
        self._pending = dict(state_dict)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the states of this rank, once."""
        if self._pending is None:
            return
        states, self._pending = self._pending, None
        set_random_states({name: rows[trainer.global_rank % len(rows)] for name, rows in states.items()})


def _gather(state: torch.Tensor) -> torch.Tensor:
    if not (distributed.is_available() and distributed.is_initialized()):
        return state.unsqueeze(0)
    device = torch.device("cuda") if distributed.get_backend() == "nccl" else torch.device("cpu")
    rows = [torch.empty_like(state, device=device) for _ in range(distributed.get_world_size())]
    distributed.all_gather(rows, state.to(device))
    return torch.stack(rows).cpu()
