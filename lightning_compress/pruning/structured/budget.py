"""How many channels each group keeps, so that a model has a given share of its channels, parameters or operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.pruning.structured.groups import ChannelGroup, Cuts, Layers
from lightning_compress.pruning.structured.limits import Limit

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


def choose_cuts(
    scores: Mapping[str, Tensor],
    target: float,
    costs: Costs,
    scope: str = "global",
    limits: Mapping[str, Limit] | None = None,
    gone: Cuts | None = None,
    progress: float = 1.0,
) -> dict[str, list[int]]:
    """Return the channels with the lowest scores, as few as make the cost fall to ``target``.

    Args:
        scores: For each group a number per channel, comparable between groups unless the scope is ``"layer"``.
        target: Share of the cost that may be left, 0 to 1.
        costs: What the model costs.
        scope: ``"layer"`` cuts the same share of every group, anything else ranks all channels together.
        limits: How far each group may be cut.
        gone: Channels that have been cut already and do not come back, by group.
        progress: How much of a limit's own amount is due, 0 to 1.

    Returns:
        Channels to remove, in order, by group. The target is met, never exceeded.

    Raises:
        ConfigurationError: If the limits do not allow the target; says what they do allow.

    >>> costs = Costs(4.0, ((2.0, ((2, {"a": 1.0}),)), (2.0, ((2, {"b": 1.0}),))), {"a": 2, "b": 2})
    >>> choose_cuts({"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([4.0, 2.0])}, 0.75, costs)
    {'a': [1]}
    """
    widths = choose_widths(scores, target, costs, scope, limits, gone, progress)
    return lowest(scores, widths, gone)


def choose_widths(
    scores: Mapping[str, Tensor],
    target: float,
    costs: Costs,
    scope: str = "global",
    limits: Mapping[str, Limit] | None = None,
    gone: Cuts | None = None,
    progress: float = 1.0,
) -> dict[str, int]:
    """Return how many channels each group keeps, for the same arguments as :func:`choose_cuts`."""
    limit = {name: (limits or {}).get(name, Limit()) for name in scores}
    sizes = {name: len(values) for name, values in scores.items()}
    most = {name: size - len((gone or {}).get(name, ())) for name, size in sizes.items()}
    own = {
        name: limit[name].kept(sizes[name], round(amount * progress * sizes[name]))
        for name in scores
        if (amount := limit[name].amount) is not None
    }
    free = [name for name in scores if name not in own]
    order = _removal_order({name: _fallen(scores[name], gone, name) for name in free}, scope)

    def kept(removed: Sequence[int]) -> dict[str, int]:
        found = own | {name: limit[name].kept(sizes[name], cut) for name, cut in zip(free, removed, strict=True)}
        return {name: min(found[name], most[name]) for name in scores}

    def first(count: int) -> list[int]:
        return torch.bincount(order[:count], minlength=len(free)).tolist()

    low, high = 0, len(order)
    least = costs.share(kept(first(high)))
    if least > target + 1e-9:
        raise ConfigurationError(
            f"the goal leaves {target:.4g} of the cost, but at least {least:.4g} stays with what can be cut and the "
            "limits; lower `floor` or `round_to`, or ask for less"
        )
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if costs.share(kept(first(middle))) <= target + 1e-9 else (middle + 1, high)
    removed, settled = first(low), set()
    for index in reversed(order[:low].tolist()):  # where the last was a large one, others may come back
        if index not in settled:
            fewer = [count - (place == index) for place, count in enumerate(removed)]
            if costs.share(kept(fewer)) <= target + 1e-9:
                removed = fewer
            else:
                settled.add(index)
    return kept(removed)


def lowest(scores: Mapping[str, Tensor], widths: Mapping[str, int], gone: Cuts | None = None) -> dict[str, list[int]]:
    """Return the channels with the lowest scores, all but so many of each group; those that are gone come first.

    >>> lowest({"a": torch.tensor([2.0, 1.0, 3.0])}, {"a": 1}, gone={"a": [2]})
    {'a': [1, 2]}
    """
    cuts = {}
    for name, values in scores.items():
        order = torch.sort(_fallen(values, gone, name), stable=True).indices
        cuts[name] = sorted(order[: max(0, len(values) - widths[name])].tolist())
    return {name: channels for name, channels in cuts.items() if channels}


def _fallen(values: Tensor, gone: Cuts | None, name: str) -> Tensor:
    """Return the scores with those of channels that are gone below all others."""
    index = torch.tensor(list((gone or {}).get(name, ()))).long()
    return values.index_fill(0, index, -1)


def _removal_order(scores: Mapping[str, Tensor], scope: str) -> Tensor:
    """Return the number of the group that loses a channel, step by step."""
    if not scores:
        return torch.zeros(0, dtype=torch.long)
    if scope == "layer":
        keys = [(torch.arange(len(values), dtype=torch.float64) + 0.5) / len(values) for values in scores.values()]
    else:
        keys = [torch.sort(values.to(torch.float64), stable=True).values for values in scores.values()]
    owners = torch.cat([torch.full((len(values),), index) for index, values in enumerate(scores.values())])
    return owners[torch.sort(torch.cat(keys), stable=True).indices]
