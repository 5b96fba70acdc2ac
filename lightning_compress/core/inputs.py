"""What a model is called with, given a batch as loaders make it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_compress.core.isolation import call
from lightning_compress.core.paths import original


def inputs_of(model: nn.Module, batch: Any) -> Any:
    """Return the inputs in a batch, as :func:`~lightning_compress.core.isolation.call` takes them.

    Args:
        model: Whose ``forward`` decides how a mapping is passed.
        batch: Inputs, or a tuple or list that begins with the inputs (targets and others follow). Inputs are a tensor,
            a tuple of several positional arguments, if ``forward`` takes as many (loaders make lists of tuples, so a
            list is the same if ``forward`` needs several), or a mapping: keywords, without those that ``forward`` does
            not take, if it takes them by name; else one positional argument.

    Returns:
        A tuple of positional arguments, or a mapping of keyword arguments.

    >>> inputs_of(nn.Linear(1, 1), ("x", "target")), inputs_of(nn.Bilinear(1, 1, 1), (("x", "y"), "target"))
    (('x',), ('x', 'y'))
    >>> inputs_of(nn.Linear(1, 1), {"input": "x", "labels": "target"})
    {'input': 'x'}
    >>> inputs_of(nn.Linear(1, 1), {"image": "x"})
    ({'image': 'x'},)
    """
    inputs = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if isinstance(inputs, Mapping):
        keywords = _keywords(model, inputs)
        return (inputs,) if keywords is None else keywords
    several = _takes(model, len(inputs)) if isinstance(inputs, tuple) else _needs_several(model)
    several = several and isinstance(inputs, tuple | list)
    return tuple(inputs) if several and not hasattr(inputs, "_fields") else (inputs,)


def example_in(model: nn.Module, batch: Any) -> Any:
    """Return the inputs in a batch as a user would pass an example: a tensor alone, else as :func:`inputs_of` does.

    >>> import torch
    >>> example_in(nn.Linear(1, 1), (torch.zeros(2, 1), "target")).shape
    torch.Size([2, 1])
    """
    inputs = inputs_of(model, batch)
    alone = isinstance(inputs, tuple) and len(inputs) == 1 and isinstance(inputs[0], Tensor)
    return inputs[0] if alone else inputs


def takes(model: nn.Module, inputs: Any) -> bool:
    """Return whether ``forward`` can be called with so many inputs, or with inputs of these names, as far as it tells.

    >>> takes(nn.Linear(1, 1), ("x",)), takes(nn.Bilinear(1, 1, 1), ("x",))
    (True, False)
    """
    signature = _signature(model)
    try:
        return signature is None or call(signature.bind, inputs) is not None
    except TypeError:
        return False


def _signature(model: nn.Module) -> inspect.Signature | None:
    """Return the signature of ``forward``, or ``None`` if it does not tell."""
    try:
        return inspect.signature(original(model).forward)
    except (TypeError, ValueError):  # compiled elsewhere
        return None


def _parameters(model: nn.Module) -> list[inspect.Parameter] | None:
    signature = _signature(model)
    return None if signature is None else list(signature.parameters.values())


def _needed(parameters: list[inspect.Parameter]) -> list[str]:
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in variable]


def _takes(model: nn.Module, count: int) -> bool:
    """Return whether ``forward`` takes so many positional arguments, as far as it tells."""
    parameters = _parameters(model)
    if parameters is None or any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return True
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters) >= count


def _needs_several(model: nn.Module) -> bool:
    parameters = _parameters(model) or []
    return len(_needed(parameters)) > 1 or any(p.kind is p.VAR_POSITIONAL for p in parameters)


def _keywords(model: nn.Module, given: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the part of a mapping that ``forward`` takes by name; ``None`` if it takes the mapping as a whole."""
    parameters = _parameters(model)
    if parameters is None or any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(given)
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    found = {name: given[name] for name in names if name in given}
    needed = _needed(parameters)
    fits = found and all(name in found for name in needed)
    return found if fits or len(needed) > 1 else None
