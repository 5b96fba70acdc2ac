"""Copies of a module that are its own, whatever hangs on it: a trainer, a compiled call, tensors with a graph."""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_compress.core.errors import ConfigurationError

_CONTAINERS = (dict, list, tuple, set, nn.Module, Tensor)


def full_copy(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` with tensors of its own, and without the compiled call of the original."""
    return structure_copy(model, torch.clone)


def structure_copy(model: nn.Module, change: Callable[[Tensor], Tensor], share: bool = False) -> nn.Module:
    """Deep-copy a module, but let ``change`` decide what becomes of each tensor it holds.

    Parameters, buffers and other tensors in attributes (also non-leaf ones, which ``copy.deepcopy`` refuses) are
    replaced by ``change(tensor)``, so a copy on the ``meta`` device takes no memory for them. Ties stay ties. Objects
    of the training framework in attributes (trainer, datamodule, loader, dataset) are shared, never copied. Layers with
    parametrized tensors get a class of their own, so that parametrizations can be merged in the copy alone.

    Args:
        model: The module to copy; it is not changed.
        change: Called once for each distinct tensor; a result for a Parameter is wrapped into a Parameter.
        share: Share every other object in attributes too, which may be something that cannot be copied (a stream).

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
                if _belongs_to_framework(value) or (share and not isinstance(value, _CONTAINERS)):
                    memo[id(value)] = value
                for tensor in tensors_in(value):
                    if id(tensor) not in memo:
                        memo[id(tensor)] = _like(tensor, change(tensor))
        copied = copy.deepcopy(model, memo)
    for part in copied.modules():
        own_class(part)
        _drop_compiled_call(part)
        _drop_wrapped_methods(part, memo)
        _follow_identities(part, memo)
    return copied


def own_class(layer: nn.Module) -> None:
    """Give a parametrized layer a class of its own: torch shares it between deep copies, and edits it in place."""
    if parametrize.is_parametrized(layer):
        shared = type(layer)
        members = {name: value for name, value in vars(shared).items() if name not in ("__dict__", "__weakref__")}
        layer.__class__ = type(shared.__name__, shared.__bases__, members)


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


def _drop_wrapped_methods(module: nn.Module, memo: Mapping[int, Any]) -> None:
    """Let a copy run its own methods where the original has wrapped ones, which stay bound to the original.

    Lightning puts such a ``forward``, ``training_step``, ... on a LightningModule that comes out of ``torch.compile``.
    """
    for name, value in list(vars(module).items()):
        if isinstance(value, types.FunctionType) and hasattr(type(module), name):
            owner = getattr(inspect.unwrap(value), "__self__", None)
            if isinstance(owner, nn.Module) and memo.get(id(owner)) is module:
                delattr(module, name)


def _follow_identities(module: nn.Module, memo: Mapping[int, Any]) -> None:
    """Let mappings from the ``id`` of a part (a module remembers so which metric it logged) speak of the copies."""
    for name, value in list(vars(module).items()):
        if type(value) is dict and value and all(isinstance(memo.get(key), nn.Module) for key in value):
            setattr(module, name, {id(memo[key]): item for key, item in value.items()})


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
