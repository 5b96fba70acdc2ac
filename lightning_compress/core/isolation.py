"""Looking at a model without changing it: evaluation mode, random states, devices."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_compress.core.copies import tensors_in


def call(function: Callable[..., Any], inputs: object) -> Any:
    """Call ``function`` on example inputs: a mapping gives keywords, a tuple or list positions, anything else is one.

    >>> call(lambda a, b: a - b, (5, 3)), call(lambda a, b: a - b, {"b": 5, "a": 3})
    (2, -2)
    """
    if isinstance(inputs, Mapping):
        return function(**inputs)
    if isinstance(inputs, tuple | list):
        return function(*inputs)
    return function(inputs)


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return ``value`` with every tensor in its mappings, lists and tuples (named ones too) passed through ``change``.

    >>> map_tensors(lambda t: t + 1, {"a": [torch.tensor(1)], "b": "text"})
    {'a': [tensor(2)], 'b': 'text'}
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(change, item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(change, item) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(change, item) for item in value)
    return value


def device_of(model: object) -> torch.device:
    """Return the device of a module's first parameter or buffer; the CPU for everything else."""
    if isinstance(model, nn.Module):
        for tensor in (*model.parameters(), *model.buffers()):
            return tensor.device
    return torch.device("cpu")


def batch_size_of(inputs: object) -> int | None:
    """Return the length of the first dimension of the first tensor in ``inputs``, or ``None`` if there is none.

    >>> batch_size_of((torch.zeros(4, 3), 1)), batch_size_of(torch.tensor(1.0))
    (4, None)
    """
    first = next(tensors_in(inputs), None)
    return None if first is None or first.dim() == 0 else first.shape[0]


@contextmanager
def same_randomness() -> Iterator[None]:
    """Restore the random states of Python, numpy and torch (CPU and every CUDA device in use) on leaving."""
    python, array = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global state is what must not move
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if cuda else ()):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)  # noqa: NPY002 - as above


@contextmanager
def eval_mode(*models: object) -> Iterator[None]:
    """Put every module among ``models`` into evaluation mode and give each submodule its own mode back on leaving."""
    modules = [model for model in models if isinstance(model, nn.Module)]
    modes = [(part, part.training) for model in modules for part in model.modules()]
    for model in modules:
        model.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def evaluating(*models: object) -> Iterator[None]:
    """Do as :func:`eval_mode`, and restore the random states too."""
    with same_randomness(), eval_mode(*models):
        yield
