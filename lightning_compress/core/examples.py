"""One batch to trace or measure a model with: what it says itself, else samples of its training data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.inputs import example_in, takes
from lightning_compress.core.isolation import batch_size_of, device_of, map_tensors, same_randomness

_SAMPLES = 2


def own_example(model: nn.Module) -> Any:
    """Return the model's ``example_input_array`` (LightningModules have it) on its device, or ``None``."""
    return beside(model, getattr(model, "example_input_array", None))


def beside(model: nn.Module, inputs: Any) -> Any:
    """Return inputs with all their tensors on the device of the model, wherever data and model are now.

    If all of the model is in half or double precision, floating point inputs become so too, as a Trainer with such a
    ``precision`` does with batches.

    >>> beside(nn.Linear(1, 1, device="meta"), {"x": torch.zeros(1)})["x"].device.type
    'meta'
    >>> beside(nn.Linear(1, 1).double(), (torch.zeros(1), torch.tensor(2)))
    (tensor([0.], dtype=torch.float64), tensor(2))
    """
    device, dtype = device_of(model), _precision_of(model)
    return map_tensors(lambda t: t.to(device, dtype if t.is_floating_point() else None), inputs)


def _precision_of(model: nn.Module) -> torch.dtype | None:
    """Return the type of all floating point parameters, or ``None`` if it is the usual one, or they have several."""
    found = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return None if len(found) != 1 or torch.float32 in found else found.pop()


def example_from(model: nn.Module, loaders: Any) -> Any:
    """Return the inputs of the first samples of a loader, without touching its position or any random state.

    The samples are taken from the data set and joined as the loader joins a batch.

    Args:
        model: Whose ``forward`` decides which part of a batch it is called with.
        loaders: A ``DataLoader``, or a list or mapping of some.

    Returns:
        A tensor with up to two samples; a tuple of positional or a mapping of keyword arguments, if ``forward`` takes
        more than a tensor.

    Raises:
        ConfigurationError: If no loader has a data set with positions, or there are no samples in a batch's inputs.

    >>> data = torch.utils.data.TensorDataset(torch.zeros(5, 3), torch.zeros(5))
    >>> example_from(nn.Linear(3, 1), DataLoader(data, batch_size=4)).shape
    torch.Size([2, 3])
    """
    for loader in _each(loaders):
        with same_randomness():
            batch = first_samples(loader)
        if batch is None:
            continue
        batch = getattr(batch, "training_batch", batch)  # stored outputs of a teacher may lie beside it
        inputs = example_in(model, batch)
        if not takes(model, inputs):
            raise ConfigurationError(
                f"`example_inputs`: forward of {type(model).__name__} cannot be called with the inputs in a batch of "
                "training data; set `example_input_array` on the module, pass them, or let batches be "
                "`((first, second), targets)` for several inputs, or a mapping with the names of its arguments"
            )
        if batch_size_of(inputs) is not None:
            return inputs
        raise ConfigurationError(
            f"`example_inputs`: what a batch of the training data gives {type(model).__name__}, a "
            f"{type(inputs).__name__}, does not start with a tensor of samples; set `example_input_array` on the "
            "module, or pass them"
        )
    raise ConfigurationError(
        "`example_inputs`: none were given, and none could be taken from the training data; set "
        "`example_input_array` on the module, or pass one batch"
    )


def first_samples(loader: DataLoader[Any]) -> Any:
    """Return up to two samples of a loader's data set, joined as it joins a batch, without touching its position.

    ``None`` if the data set has no positions, no length or no samples, or the loader joins none.
    """
    source: Any = loader.dataset
    if isinstance(source, IterableDataset) or not hasattr(source, "__len__") or not len(source):
        return None
    indices = list(range(min(_SAMPLES, len(source))))
    whole = getattr(source, "__getitems__", None)  # as torch's own fetcher does
    return loader.collate_fn([source[index] for index in indices] if whole is None else whole(indices))


def _each(loaders: Any) -> Iterator[DataLoader[Any]]:
    if isinstance(loaders, DataLoader):
        yield loaders
    elif isinstance(loaders, Mapping):
        for loader in loaders.values():
            yield from _each(loader)
    elif isinstance(loaders, list | tuple):
        for loader in loaders:
            yield from _each(loader)
