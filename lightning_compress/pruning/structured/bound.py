"""A bound on the indices that a dependency graph follows: through windows and reshapes they can multiply endlessly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

LEAST = 2**14
"""Indices of one group in one place that are followed in any model."""


class Bound:
    """Cuts off the paths of a group along which its indices multiply far beyond the widest layer, and notes it.

    Args:
        graph: Torch-Pruning's dependency graph, built.
        model: The model; its longest side of a parameter is how wide a layer can be.
    """

    def __init__(self, graph: Any, model: nn.Module) -> None:
        widest = max((side for parameter in model.parameters() for side in parameter.shape), default=0)
        self._most, self._hit = max(LEAST, 4 * widest), False
        for node in graph.module2node.values():
            for dependency in node.dependencies:
                dependency.index_mapping = _Mappings(dependency.index_mapping, self.follow)

    def follow(self, mapping: Callable[[Any], Any], indices: Any) -> Any:
        """Return where a mapping takes indices: nowhere, if they get too many."""
        mapped = mapping(indices)
        if len(mapped) <= self._most:
            return mapped
        self._hit = True
        return []

    def was_hit(self) -> bool:
        """Return whether a path was cut off since the last call."""
        hit, self._hit = self._hit, False
        return hit


class _Mappings(list[Any]):
    """A dependency's mappings, which the graph exchanges and goes through, each behind a bound."""

    def __init__(self, mappings: list[Any], follow: Callable[[Callable[[Any], Any], Any], Any]) -> None:
        super().__init__(mappings)
        self._follow = follow

    def __iter__(self) -> Iterator[Any]:
        for mapping in super().__iter__():
            yield mapping and (lambda indices, mapping=mapping: self._follow(mapping, indices))
