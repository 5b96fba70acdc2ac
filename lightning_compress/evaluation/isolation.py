"""Looking at a model without changing it: copies of its structure, evaluation mode, random states, devices."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_compress.core.errors import ConfigurationError


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


def tensors_in(value: object) -> Iterator[Tensor]:
    """Yield the tensors inside nested mappings, lists, tuples and sets, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, Sequence | set) and not isinstance(value, str | bytes):
        for item in value:
            yield from tensors_in(item)


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
        np.random.set_state(array)  # noqa: NPY002


@contextmanager
def evaluating(*models: object) -> Iterator[None]:
    """Put every module among ``models`` into evaluation mode and give each submodule its own mode back on leaving."""
    modules = [model for model in models if isinstance(model, nn.Module)]
    modes = [(part, part.training) for model in modules for part in model.modules()]
    with ExitStack() as stack:
        stack.enter_context(same_randomness())
        for model in modules:
            model.eval()
        try:
            yield
        finally:
            for part, training in modes:
                part.training = training


def structure_copy(model: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """Deep-copy a module, but let ``change`` decide what becomes of each tensor it holds.

    Parameters, buffers and other tensors in attributes (also non-leaf ones, which ``copy.deepcopy`` refuses) are
    replaced by ``change(tensor)``, so a copy on the ``meta`` device takes no memory for them. Ties stay ties. Objects
    of the training framework in attributes (trainer, datamodule, loader, dataset) are shared, never copied.

    Args:
        model: The module to copy; it is not changed.
        change: Called once for each distinct tensor; a result for a Parameter is wrapped into a Parameter.

    Returns:
        The copy.

    Raises:
        ConfigurationError: If a lazy layer has no shape yet.

    >>> structure_copy(nn.Linear(2, 3), lambda t: t.to("meta")).weight.device
    device(type='meta')
    """
    refuse_lazy(model)
    memo: dict[int, Any] = {}
    with torch.no_grad():
        for module in model.modules():
            for value in vars(module).values():
                if _belongs_to_framework(value):
                    memo[id(value)] = value
                for tensor in tensors_in(value):
                    if id(tensor) not in memo:
                        memo[id(tensor)] = _like(tensor, change(tensor))
        copied = copy.deepcopy(model, memo)
    for part in copied.modules():
        _drop_compiled_call(part)
    return copied


def refuse_lazy(model: nn.Module) -> None:
    """Raise a ConfigurationError that names the first parameter which has no shape yet."""
    for name, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise ConfigurationError(
                f"`model`: expected parameters with a shape, but {name!r} is uninitialized (a lazy layer). "
                "Run the model once on an example batch first."
            )


def _drop_compiled_call(module: nn.Module) -> None:
    """Drop what ``module.compile()`` left in a copy: it is bound to the original, and would run that instead."""
    for name, value in list(vars(module).items()):
        made_by_torch = callable(value) and getattr(value, "__module__", "") == nn.Module.__module__
        if made_by_torch and getattr(type(module), name, value) is None:
            delattr(module, name)


def _like(tensor: Tensor, changed: Tensor) -> Tensor:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(changed.detach(), requires_grad=tensor.requires_grad)
    return changed


def _belongs_to_framework(value: object) -> bool:
    """Return whether a value is a trainer, a datamodule, a loader, a dataset or the like: large, and not the model."""
    if isinstance(value, nn.Module | Tensor):
        return False
    homes = [base.__module__ for base in type(value).__mro__]
    return any(
        home.partition(".")[0] in {"lightning", "pytorch_lightning", "lightning_fabric"}
        or home.startswith("torch.utils.data")
        for home in homes
    )
