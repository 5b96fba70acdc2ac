"""Turn a group of a dependency graph into plain indices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from lightning_compress.core.companions import companions_of
from lightning_compress.pruning.structured.groups import ChannelGroup, Touch
from lightning_compress.pruning.structured.roles import CUTTABLE, ONE_CHANNEL, Role, is_single, roles_of


class GroupBuilder:
    """Collects where the channels of one group lie, and joins channels that share an index.

    Args:
        paths: Paths of modules and parameters.
        items: The graph's group: a dependency with the indices it touches, and ``root_idxs`` beside them.
        is_output: Tells whether a dependency's handler cuts outputs.
        originals: Layers that stand-ins in the graph stand for.
    """

    def __init__(
        self,
        paths: Mapping[object, str],
        items: Any,
        is_output: Callable[[Any], bool],
        originals: Mapping[nn.Module, nn.Module],
    ) -> None:
        self._paths = paths
        self._originals = originals
        self._items = items
        self._is_output = is_output
        self._parent: dict[int, int] = {}
        self._places: dict[tuple[str, tuple[tuple[str, int], ...]], tuple[Role, bool, dict[int, int]]] = {}
        self._layers: dict[str, nn.Module] = {}
        self._problem = ""

    def build(self) -> tuple[ChannelGroup, str]:
        """Return the group, and what speaks against cutting it (or nothing)."""
        root = self._paths.get(self._items[0].dep.target.module)  # none for what stands for padded zeros
        for item in self._items:
            self._add(item)
        roots = sorted({self._root(channel) for channel in self._parent})
        number = {root: index for index, root in enumerate(roots)}
        touches = []
        for (path, tensors), (role, produces, places) in self._places.items():
            positions = sorted(places)
            channels = tuple(number[self._root(places[position])] for position in positions)
            touch = Touch(path, tensors, tuple(positions), channels, role.size, role.attributes, produces)
            touches += [touch, *_beside(touch, self._layers[path])]
        if not self._problem and len(roots) < 2:
            tied = "its channels are all tied to each other by a grouped convolution"
            self._problem = tied if len(self._parent) > 1 else ONE_CHANNEL
        order = list(self._paths.values())
        makers = [*([] if root is None else [root]), *(touch.path for touch in touches if touch.produces)]
        return ChannelGroup(min(makers, key=order.index, default=""), len(roots), tuple(touches)), self._problem

    def _add(self, item: Any) -> None:
        module = item.dep.target.module
        path = self._paths.get(module)
        if path is None:  # an operation without parameters
            return
        if not isinstance(module, nn.Module):
            self._object(f"it is added to or multiplied with the parameter {path!r}")
            return
        output = self._is_output(item.dep.handler)
        module = self._originals.get(module, module)
        roles = roles_of(module, output)
        produces = output and isinstance(module, CUTTABLE)
        if isinstance(roles, str):
            self._object(f"it is coupled to {path!r} ({type(module).__name__}): {roles}")
            roles = [Role((), 0)] if produces else []
        self._layers[path] = module
        if produces and item is not self._items[0] and is_single(module):
            return  # it is multiplied with, or added to, each of the channels
        for role in roles:
            self._place(path, role, produces, list(item.idxs), list(item.root_idxs))

    def _place(self, path: str, role: Role, produces: bool, positions: list[int], channels: list[int]) -> None:
        _, _, places = self._places.setdefault((path, role.tensors), (role, produces, {}))
        step = role.size // role.copies
        by_offset: dict[int, int] = {}
        for position, channel in zip(positions, channels, strict=True):
            self._parent.setdefault(channel, channel)
            if role.period:
                self._join(channel, by_offset.setdefault(position % role.period, channel))
                position = position % role.period if role.size == role.period else position
            for copy in range(role.copies if role.size else 0):
                index = position + copy * step
                if index >= role.size:
                    self._object(
                        f"it meets the {role.size} channels of {path!r} in another number, behind a mean or a reshape"
                    )
                    return
                self._join(channel, places.setdefault(index, channel))

    def _object(self, problem: str) -> None:
        self._problem = self._problem or problem

    def _root(self, channel: int) -> int:
        while self._parent[channel] != channel:
            self._parent[channel] = self._parent[self._parent[channel]]
            channel = self._parent[channel]
        return channel

    def _join(self, one: int, other: int) -> None:
        a, b = sorted((self._root(one), self._root(other)))
        self._parent[b] = a


def _beside(touch: Touch, layer: nn.Module) -> list[Touch]:
    """Return what loses its indices together with a weight."""
    return [
        Touch(
            f"{touch.path}.{each.path}",
            tuple((name, 0) for name in each.tensors),
            touch.positions,
            touch.channels,
            touch.size,
            beside=True,
        )
        for each in companions_of(layer)
        if (each.weight, each.dim) in touch.tensors
    ]
