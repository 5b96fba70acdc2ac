"""What a model costs as a function of the channels that its groups keep: channels, parameters or operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from lightning_compress.pruning.structured.groups import ChannelGroup, Layers

GOALS = ("channels", "macs", "parameters")


@dataclass(frozen=True)
class Costs:
    """What a model costs as a function of how many channels each group keeps.

    Each tensor shrinks with the product of its dimensions, and a layer's operations with its weight: cutting a share
    p of all channels leaves about :math:`(1-p)^2` of both, which is why a goal is searched for, not set.

    Args:
        total: Cost of the whole model.
        parts: For each tensor that shrinks, its cost; and for each of its dimensions that shrink, the length and what
            each group's channel takes of it.
    """

    total: float
    parts: tuple[tuple[float, tuple[tuple[int, Mapping[str, float]], ...]], ...]
    channels: Mapping[str, int] = field(default_factory=dict)

    def share(self, kept: Mapping[str, int]) -> float:
        """Return the cost that is left, 0 to 1, when each group keeps so many channels."""
        saved = 0.0
        for cost, dims in self.parts:
            left = 1.0
            for size, shares in dims:
                gone = sum((self.channels[name] - kept[name]) * share for name, share in shares.items())
                left *= 1 - gone / size
            saved += cost * (1 - left)
        return 1 - saved / self.total


def costs_of(
    goal: str, groups: Sequence[ChannelGroup], layers: Layers, total: int, per_layer: Mapping[str, int]
) -> Costs:
    """Return how the cost for a goal depends on the channels that are kept.

    Args:
        goal: One of :data:`GOALS`.
        groups: What can be cut.
        layers: Modules by path.
        total: Parameters or operations of the whole model (any number for channels).
        per_layer: Operations of each layer, for the goal ``"macs"``.
    """
    channels = {group.name: group.channels for group in groups}
    if goal == "channels":
        parts = tuple((float(group.channels), ((group.channels, {group.name: 1.0}),)) for group in groups)
        return Costs(float(sum(channels.values())), parts, channels)
    dims: dict[tuple[str, str], dict[int, tuple[int, dict[str, float]]]] = {}
    for group in groups:
        for touch in group.touches:
            for name, dim in touch.tensors:
                shares = dims.setdefault((touch.path, name), {}).setdefault(dim, (touch.size, {}))[1]
                shares[group.name] = shares.get(group.name, 0.0) + len(touch.positions) / group.channels
    parts_found = []
    for (path, name), shrinking in dims.items():
        tensor = getattr(layers[path], name)
        if goal == "parameters":
            cost = float(tensor.numel()) if isinstance(tensor, nn.Parameter) else 0.0
        else:
            cost = float(per_layer.get(path, 0)) * _portion(layers[path], name)
        if cost:
            parts_found.append((cost, tuple(shrinking.values())))
    return Costs(float(total), tuple(parts_found), channels)


def _portion(layer: nn.Module, name: str) -> float:
    """Return the part of a layer's operations that one of its tensors does."""
    weights = {key: p.numel() for key, p in layer.named_parameters(recurse=False) if "weight" in key}
    return weights[name] / sum(weights.values()) if name in weights else 0.0
