"""Calibration data: batches to run a trained model on, wherever they come from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any

from torch import Tensor, nn

from lightning_compress.core.copies import tensors_in
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.examples import beside
from lightning_compress.core.inputs import inputs_of
from lightning_compress.core.isolation import call


def check_batches(batches: Any, samples: int) -> None:
    """Refuse what :func:`calibration_batches` cannot read.

    Raises:
        ConfigurationError: If ``batches`` is not a collection, loader or data module, or ``samples`` is below 1.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ConfigurationError(f"`samples` must be an int >= 1, got {samples!r}")
    if isinstance(batches, Iterator | str | bytes):
        raise ConfigurationError(
            f"`batches` must be something that can be read again, got {type(batches).__name__}; give a list of "
            "batches, a loader or a data module"
        )
    if batches is not None and not (isinstance(batches, Iterable) or callable(loader_of(batches))):
        raise ConfigurationError(
            f"`batches` must be a tensor, a list of batches, a loader or a data module, got {type(batches).__name__}"
        )


def loader_of(batches: object) -> Any:
    """Return what makes the loader of a data module, ``None`` for anything else."""
    return getattr(batches, "train_dataloader", None)


def require_batches(batches: Any) -> None:
    """Raise a ConfigurationError if there are no batches, as far as can be told without reading any."""
    if batches is None or (isinstance(batches, Sized) and len(batches) == 0):
        raise ConfigurationError(
            f"`batches` is {'missing' if batches is None else 'empty'}: this method looks at data; give calibration "
            "batches (a list of batches as the model takes them, a loader or a data module)"
        )


def calibration_batches(batches: Any, samples: int) -> Iterator[Any]:
    """Yield whole batches until at least ``samples`` samples have been seen.

    Args:
        batches: One tensor (a single batch), an iterable of batches such as a list or a loader, or a data module, of
            which the training data is taken.
        samples: How many samples are enough.

    Raises:
        ConfigurationError: If there is none.

    >>> import torch
    >>> [len(batch) for batch in calibration_batches([torch.zeros(3, 2)] * 4, samples=5)]
    [3, 3]
    """
    require_batches(batches)
    if isinstance(batches, Tensor):
        batches = [batches]
    elif callable(loader_of(batches)):
        batches.prepare_data()
        batches.setup("fit")
        batches = batches.train_dataloader()
    seen = 0
    for batch in batches:
        yield batch
        first = next(tensors_in(batch), None)
        seen += 1 if first is None or first.dim() == 0 else len(first)
        if seen >= samples:
            return
    if seen == 0:
        raise ConfigurationError("`batches` is empty: give at least one calibration batch")


def run_on(model: nn.Module, batch: Any) -> Any:
    """Call ``model`` with the inputs in a batch, see :func:`~lightning_compress.core.inputs.inputs_of`."""
    return call(model, beside(model, inputs_of(model, batch)))
