"""Compress a trained model in one call, with the same methods that a Trainer takes as callbacks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

from torch import nn

from lightning_compress.core.copies import full_copy
from lightning_compress.core.errors import CompressionError, ConfigurationError
from lightning_compress.core.method import Method as Known
from lightning_compress.core.pairs import check_layers, check_pairs


class Method(Protocol):
    """What :func:`compress` needs of a method; every compression callback has it."""

    def run_once(self, model: nn.Module, example_inputs: Any = None) -> nn.Module:
        """Compress ``model`` in place, straight to the final amount."""
        ...


def compress(model: nn.Module, *methods: Method, example_inputs: Any = None, inplace: bool = False) -> Any:
    """Apply ``methods`` to a trained ``model``, one after the other, without a Trainer.

    Args:
        model: Any module; a LightningModule is fine, attached to a Trainer or not.
        methods: Compression callbacks, such as ``IterativePruning(0.9)``; their schedule's final amount counts.
        example_inputs: One batch (a tensor, a tuple of positional or a mapping of keyword arguments) for methods that
            run the model, such as ``StructuredPruning``; by default the module's ``example_input_array``.
        inplace: Change ``model`` itself instead of a deep copy.

    Returns:
        The compressed module, of the same class as ``model``. ``save_compressed`` writes it to a file.

    Raises:
        ConfigurationError: If no method is given, one is not a method, needs example inputs and has none, would
            undo an earlier one, or cannot be used together with another one; if the model has no values yet.

    >>> import torch
    >>> from lightning_compress import IterativePruning, compress
    >>> net = torch.nn.Sequential(torch.nn.Linear(10, 10), torch.nn.Linear(10, 2))
    >>> int((compress(net, IterativePruning(0.8))[0].weight == 0).sum())
    80
    """
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"`model` must be a torch.nn.Module, got {type(model).__name__}")
    for method in methods:
        if isinstance(method, type) or not callable(getattr(method, "run_once", None)):
            raise ConfigurationError(
                f"`methods` must be compression callbacks such as IterativePruning(0.9), got {method!r}"
            )
    if missing := next((name for name, p in model.named_parameters() if p.is_meta), None):
        raise ConfigurationError(
            f"`model` has no values yet: {missing!r} is on the meta device; load its weights first, for example after "
            "`model.to_empty(device='cpu')`"
        )
    if not methods:
        raise ConfigurationError("`methods` is empty: give at least one, such as IterativePruning(0.9)")
    _check_together(model, [method for method in methods if isinstance(method, Known)])
    compressed = model if inplace else full_copy(model)
    for method in methods:
        method.run_once(compressed, example_inputs)
    return compressed


def _check_together(model: nn.Module, methods: Sequence[Known]) -> None:
    """Refuse methods that a Trainer would not take together either, before the first of them changes anything."""
    for method in methods:
        check_pairs(method, methods, "methods")
    for method in methods:
        check_layers(method, methods, lambda each: _selected(model, each))


def _selected(model: nn.Module, method: Known) -> Collection[str]:
    try:
        return method.choose(model).layers
    except CompressionError:  # an earlier method may make what it works on; if none does, its own run says so
        return ()
