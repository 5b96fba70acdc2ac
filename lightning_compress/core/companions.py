"""Tensors that stand beside a layer's weight with a value for each of its channels, such as a quantizer's scales."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import nn


@dataclass(frozen=True)
class Companion:
    """What must lose an index whenever a weight loses it.

    Args:
        path: Path of the module that holds the tensors, from the layer on.
        tensors: Their names; each has the channels as its first dimension.
        weight: Name of the layer's tensor that they belong to.
        dim: Dimension of that tensor which counts the channels.
    """

    path: str
    tensors: tuple[str, ...]
    weight: str
    dim: int


@runtime_checkable
class HasCompanions(Protocol):
    """A layer with such tensors."""

    def companions(self) -> Iterable[Companion]:
        """Return what stands beside the weights."""
        ...


def companions_of(layer: nn.Module) -> tuple[Companion, ...]:
    """Return what stands beside the weights of a layer; nothing for most.

    >>> companions_of(nn.Linear(2, 2))
    ()
    """
    return tuple(layer.companions()) if isinstance(layer, HasCompanions) else ()
