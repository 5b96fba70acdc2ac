"""Whether calibration data suits a model, found out before anything depends on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler

from lightning_compress.core.calibration import calibration_batches, loader_of, run_on
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.examples import first_samples
from lightning_compress.core.finite import holds_finite, require_finite
from lightning_compress.core.inputs import inputs_of
from lightning_compress.core.isolation import evaluating, same_randomness


def check_first_batch(model: nn.Module, batches: Any) -> Any:
    """Run ``model`` on the first samples of calibration data; neither the model nor any random state changes.

    Of a loader with positions the samples are taken from its data set, so that iterators in use stay where they are.

    Returns:
        What it was run on: the first batch, or up to two samples of a loader.

    Raises:
        ConfigurationError: If there is no batch, or the model cannot run on it.

    >>> check_first_batch(nn.Linear(4, 2), [torch.zeros(3, 4)]).shape
    torch.Size([3, 4])
    """
    with evaluating(model), torch.no_grad():
        batch = first_batch(batches)
        try:
            run_on(model, batch)
        except Exception as error:  # the user's own code
            raise ConfigurationError(
                f"`batches`: {type(model).__name__} cannot run on a calibration batch, which is {described(batch)} and "
                f"gives it {described(inputs_of(model, batch))} ({type(error).__name__}: {error}). Give batches as "
                "`inputs`, `(inputs, targets)`, `((first, second), targets)` for several positional inputs, or a "
                "mapping with the names of the arguments of `forward`"
            ) from error
    return batch


def look_ahead(model: nn.Module, layers: Mapping[str, nn.Module], batches: Any, samples: int) -> None:
    """Refuse calibration data with NaN or infinity before training, where it can be read without changing anything.

    That is a tensor, a list of batches, and a loader that goes through its data set in order. What is shuffled,
    streamed or the training data is looked at when it is used.

    Args:
        model: Run only on batches that hold such numbers themselves; nothing of it changes.
        layers: Those of it that must not see such, by path.
        batches: Calibration data.
        samples: How many of them will be used.

    Raises:
        ConfigurationError: Names the layer and the batch.

    >>> look_ahead(nn.Linear(4, 2), {}, [torch.zeros(3, 4)], samples=8)
    """
    again = _again(batches)
    if not again:
        return
    with same_randomness():
        for number, batch in enumerate(calibration_batches(again, samples)):
            if not holds_finite(model, batch):
                require_finite(model, layers, [batch], number)


def _again(batches: Any) -> Any:
    """Return the same batches for reading them once more, or ``()`` where that would move or change something."""
    if isinstance(batches, Tensor):
        return [batches]
    if isinstance(batches, list | tuple):
        return batches
    if isinstance(batches, DataLoader) and batches.batch_size and isinstance(batches.sampler, SequentialSampler):
        return DataLoader(
            batches.dataset, batches.batch_size, collate_fn=batches.collate_fn, drop_last=batches.drop_last
        )
    return ()


def first_batch(batches: Any) -> Any:
    """Return the first samples of calibration data.

    Raises:
        ConfigurationError: If there are none.

    >>> first_batch([torch.zeros(3, 4), torch.zeros(2, 4)]).shape
    torch.Size([3, 4])
    """
    loader: Any = batches
    if isinstance(batches, Tensor):
        return batches
    if callable(loader_of(batches)):
        if getattr(batches, "trainer", None) is None:  # else the Trainer has set it up, and splits may be random
            batches.prepare_data()
            batches.setup("fit")
        loader = batches.train_dataloader()
    samples = first_samples(loader) if isinstance(loader, DataLoader) and loader.batch_size is not None else None
    if samples is not None:
        return samples
    for batch in loader:
        return batch
    raise ConfigurationError("`batches` is empty: give at least one calibration batch")


def described(value: Any) -> str:
    """Return the kind of a batch and the shapes in it.

    >>> described((torch.zeros(2, 3), {"y": 1}))
    'a tuple (a tensor of shape [2, 3], a dict {y: int})'
    """
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} {{{', '.join(f'{key}: {described(item)}' for key, item in value.items())}}}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} ({', '.join(map(described, value[:6]))})"
    return type(value).__name__
