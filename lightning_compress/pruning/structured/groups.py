"""Channels that can only be removed together, as data: which indices of which tensors belong to each channel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.core.journal import Edit, Journal
from lightning_compress.core.verbs import compact_ranges, expand_ranges

Layers = Mapping[str, nn.Module]
Place = tuple[str, str, int]
"""Path of a layer, name of a tensor, and one of its dimensions."""
HEADS = "heads"
"""What the edits that rebuild attention call the heads that stay."""
Cuts = Mapping[str, Sequence[int]]
"""Channels to remove, by the name of their group."""


@dataclass(frozen=True)
class Touch:
    """What a group's channels are in one dimension of one layer's tensors.

    Args:
        path: Path of the layer.
        tensors: Name and dimension of each tensor that loses the indices, the one with the weights first.
        positions: Indices along that dimension that belong to the group.
        channels: For each of them the channel it belongs to; several indices may belong to one channel.
        size: Length of the dimension.
        attributes: Integer attributes of the layer, with what they are for each index that is left.
        produces: Whether this is an output of a layer with weights.
        beside: Whether it only goes with a weight (scales of a quantizer): it says nothing of what a channel is worth,
            and stays as it is while a channel is zero.
    """

    path: str
    tensors: tuple[tuple[str, int], ...]
    positions: tuple[int, ...]
    channels: tuple[int, ...]
    size: int
    attributes: tuple[tuple[str, int], ...] = ()
    produces: bool = False
    beside: bool = False

    @cached_property
    def positions_of(self) -> Mapping[int, tuple[int, ...]]:
        """The indices of each channel."""
        found: dict[int, list[int]] = {}
        for position, channel in zip(self.positions, self.channels, strict=True):
            found.setdefault(channel, []).append(position)
        return {channel: tuple(positions) for channel, positions in found.items()}

    def cut(self, channels: Iterable[int]) -> list[int]:
        """Return the indices of the given channels, in order.

        >>> Touch("fc", (("weight", 1),), (0, 1, 2, 3), (0, 0, 1, 1), 4).cut([1])
        [2, 3]
        """
        return sorted(index for channel in channels for index in self.positions_of.get(channel, ()))


@dataclass(frozen=True)
class ChannelGroup:
    """Channels of one or more layers that are added, concatenated or passed on, so that one index stands for all.

    Args:
        name: Path of the first layer that produces them.
        channels: How many there are.
        touches: Every place they appear in.
        rebuilt: Path of a module that is replaced, not sliced, with the kind of the ``replace`` edit that keeps some of
            its channels (heads of attention); or nothing.
    """

    name: str
    channels: int
    touches: tuple[Touch, ...]
    rebuilt: tuple[str, str] | None = None

    @property
    def producers(self) -> tuple[str, ...]:
        """Paths of the layers whose outputs these channels are."""
        return tuple(dict.fromkeys(touch.path for touch in self.touches if touch.produces))


def halves_joined(group: ChannelGroup) -> ChannelGroup | None:
    """Return the group with each channel of its first half joined to that of the second, or ``None``.

    Gates multiply one half of a layer's outputs with the other, so that whoever reads them has half as many inputs.

    >>> made = Touch("a", (("weight", 0),), (0, 1, 2, 3), (0, 1, 2, 3), 4, (), True)
    >>> read = Touch("b", (("weight", 1),), (0, 1), (2, 3), 2)
    >>> [touch.channels for touch in halves_joined(ChannelGroup("a", 4, (made, read))).touches]
    [(0, 1, 0, 1), (0, 1)]
    """
    half = group.channels // 2
    reads_half = any(len(set(touch.channels)) == half for touch in group.touches if not touch.produces)
    if group.rebuilt is not None or group.channels % 2 or half < 2 or not reads_half:
        return None
    joined = (replace(touch, channels=tuple(channel % half for channel in touch.channels)) for touch in group.touches)
    return replace(group, channels=half, touches=tuple(joined))


@dataclass(frozen=True)
class Coupling:
    """What can be cut in a model, and why the rest cannot.

    Args:
        groups: The groups, in the order of their first layers.
        left: Why the outputs of a layer stay, by path.
    """

    groups: tuple[ChannelGroup, ...]
    left: Mapping[str, str] = field(default_factory=dict)


class Zeroing:
    """Sets every slice of the cut channels to zero in place, in the layers that make, pass on and take them.

    A model so masked computes what the sliced model does, whatever activation stands between. Which slices, is worked
    out once, and their indices stay on the device where they were needed: this runs after every step of a training.

    Args:
        groups: The groups.
        cuts: Channels to remove, by group; groups that are missing stay whole.
    """

    def __init__(self, groups: Sequence[ChannelGroup], cuts: Cuts) -> None:
        self.groups, self.cuts = groups, cuts
        touched = [
            (touch, group) for group in groups if cuts.get(group.name) for touch in group.touches if not touch.beside
        ]
        removed = [(touch, touch.cut(cuts[group.name])) for touch, group in touched]
        self._removed = [(touch, indices) for touch, indices in removed if indices]
        self._indices: dict[tuple[int, torch.device], Tensor] = {}

    def __call__(self, tensor_of: Callable[[str, str], Tensor | None]) -> None:
        """Set the slices to zero; ``tensor_of`` gives the tensor of a layer's path and a name, or ``None`` to pass."""
        for place, (touch, _) in enumerate(self._removed):
            for name, dim in touch.tensors:
                tensor = tensor_of(touch.path, name)
                if tensor is not None:
                    tensor.detach().index_fill_(dim, self._index(place, tensor.device), 0)

    def _index(self, place: int, device: torch.device) -> Tensor:
        key = place, device
        if key not in self._indices:
            self._indices[key] = torch.tensor(self._removed[place][1], device=device)
        return self._indices[key]


def parameter_in(layers: Layers) -> Callable[[str, str], Tensor | None]:
    """Return what finds a parameter of the layers by path and name; buffers are ``None``."""

    def find(path: str, name: str) -> Tensor | None:
        value = getattr(layers[path], name, None) if path in layers else None
        return value if isinstance(value, nn.Parameter) else None

    return find


def left_between(before: Journal, after: Journal) -> dict[Place, list[int]]:
    """Return what the cuts in which two journals differ leave of each dimension, as indices at the first of them.

    >>> cut = Edit("slice", "fc", config={"tensors": {"weight": {"0": [1, [3, 4]]}}})
    >>> again = Edit("slice", "fc", config={"tensors": {"weight": {"0": [[1, 2]]}}})
    >>> left_between(Journal(), Journal((cut, again)))
    {('fc', 'weight', 0): [3, 4]}
    """
    left: dict[Place, list[int]] = {}
    for edit in after.missing_from(before):
        cuts = edit.config.get("tensors", {}) if edit.verb == "slice" else {}
        if edit.verb == "replace" and HEADS in edit.config:
            cuts = {HEADS: {"0": edit.config[HEADS]}}
        for name, dims in cuts.items():
            for dim, ranges in dims.items():
                place, kept = (edit.path, name, int(dim)), expand_ranges(ranges)
                left[place] = [left[place][index] for index in kept] if place in left else kept
    return left


def slice_edits(
    groups: Iterable[ChannelGroup], cuts: Cuts, left: Mapping[Place, Sequence[int]] | None = None
) -> list[Edit]:
    """Return the edits that remove channels: one per layer, fully resolved, so that a replay needs no tracing.

    Args:
        groups: The groups.
        cuts: Channels to remove, by group.
        left: What others have left of the dimensions that they have cut since the groups were found.

    Returns:
        Edits in the order in which the groups reach the layers.

    >>> out = Touch("a", (("weight", 0), ("bias", 0)), (0, 1, 2), (0, 1, 2), 3, (("out_features", 1),), True)
    >>> edit = slice_edits([ChannelGroup("a", 3, (out,))], {"a": [1]})[0]
    >>> edit.config["tensors"]["weight"], edit.config["attributes"]
    ({'0': [0, 2]}, {'out_features': 2})
    """
    left = {} if left is None else left
    removed: dict[Place, tuple[int, set[int]]] = {}
    sizes: dict[tuple[str, str], int] = {}
    paths: dict[str, None] = {}
    edits = []
    for group in groups:
        if group.rebuilt is not None and cuts.get(group.name):
            whole, gone = left.get((group.rebuilt[0], HEADS, 0), range(group.channels)), cuts[group.name]
            heads = compact_ranges([now for now, head in enumerate(whole) if head not in gone])
            edits.append(Edit("replace", *group.rebuilt, {HEADS: heads}))
        for touch in group.touches:
            gone = touch.cut(cuts.get(group.name, ()))
            if not gone or group.rebuilt is not None:
                continue
            paths[touch.path] = None
            for name, dim in touch.tensors:
                removed.setdefault((touch.path, name, dim), (touch.size, set()))[1].update(gone)
            there = left.get((touch.path, *touch.tensors[0]), range(touch.size))
            for name, multiple in touch.attributes:
                before = sizes.get((touch.path, name), len(there) * multiple)
                sizes[touch.path, name] = before - len({*gone}.intersection(there)) * multiple
    for path in paths:
        tensors: dict[str, dict[str, Any]] = {}
        for place, (size, gone_here) in removed.items():
            if place[0] == path:
                there = left.get(place, range(size))
                kept = compact_ranges([now for now, index in enumerate(there) if index not in gone_here])
                tensors.setdefault(place[1], {})[str(place[2])] = kept
        attributes = {name: value for (owner, name), value in sizes.items() if owner == path}
        edits.append(Edit("slice", path, "", {"tensors": tensors, "attributes": attributes}))
    return edits
