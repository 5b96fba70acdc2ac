"""How many channels each group keeps: all that a goal allows, the least important gone, in widths that kernels like."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.pruning.structured.budget import Costs
from lightning_compress.pruning.structured.groups import Cuts
from lightning_compress.pruning.structured.limits import Limit

Widths = dict[str, int]
_SLACK, _FULL = 1e-9, 0.97
_FINER = (1, 2, 4, 16)


def choose_widths(
    scores: Mapping[str, Tensor],
    target: float,
    costs: Costs,
    scope: str = "global",
    limits: Mapping[str, Limit] | None = None,
    gone: Cuts | None = None,
    progress: float = 1.0,
    beside: Costs | None = None,
) -> Widths:
    """Return how many channels each group keeps when those with the lowest scores go.

    As few channels as make the cost fall to ``target`` go one by one; where the last was a large one, others come back.
    Where a group keeps multiples, its width is then rounded down, and whole multiples come back, those first that
    would have gone last. None comes back that raises the cost beside the target above what it was before: room in the
    operations is not filled with channels that are poor in operations and rich in parameters. Multiples that nobody
    asked for are made finer while they leave less than 97 % of the target.

    Args:
        scores: For each group a number per channel, comparable between groups unless the scope is ``"layer"``.
        target: Share of the cost that may be left, 0 to 1.
        costs: What the model costs.
        scope: ``"layer"`` cuts the same share of every group, anything else ranks all channels together.
        limits: How far each group may be cut, and in which multiples.
        gone: Channels that have been cut already and do not come back, by group.
        progress: How much of a limit's own amount is due, 0 to 1.
        beside: The other cost: parameters, where operations are the goal.

    Returns:
        Widths by group. The target is met, never exceeded.

    Raises:
        ConfigurationError: If the limits do not allow the target; says what they do allow.

    >>> costs = Costs(32.0, ((16.0, ((16, {"a": 1.0}),)), (16.0, ((16, {"b": 1.0}),))), {"a": 16, "b": 16})
    >>> scores = {"a": torch.arange(16.0), "b": torch.arange(16.0) + 3}
    >>> choose_widths(scores, 0.7, costs), choose_widths(scores, 0.7, costs, limits={"a": Limit(round_to=4)})
    ({'a': 9, 'b': 13}, {'a': 8, 'b': 14})
    """
    given = {name: (limits or {}).get(name, Limit()) for name in scores}
    for divisor in _FINER:
        finer = {name: _divided(limit, divisor) for name, limit in given.items()}
        order = _Order(scores, scope, finer, gone or {}, progress)
        least = costs.share(order.rounded(order.length))
        last = not any(limit.yields and limit.round_to > 1 for limit in finer.values())
        if least <= target + _SLACK:
            widths = _fit(order, target, costs, beside)
            if last or costs.share(widths) >= _FULL * target:
                return widths
        elif last:
            break
    raise ConfigurationError(
        f"the goal leaves {target:.4g} of the cost, but at least {least:.4g} stays with what can be cut and the "
        "limits; lower `floor` or `round_to`, or ask for less"
    )


def _fit(order: _Order, target: float, costs: Costs, beside: Costs | None) -> Widths:
    enough = order.first(costs, target, order.exact)
    single = order.fill(order.exact(enough), _bounds(costs, target, beside, order.exact(max(0, enough - 1))), step=1)
    if all(limit.round_to == 1 for limit in order.limits.values()):
        return single
    start = order.rounded(order.first(costs, target, order.rounded, enough))
    return order.fill(start, _bounds(costs, target, beside, single, start))


def _divided(limit: Limit, divisor: int) -> Limit:
    return replace(limit, round_to=max(1, limit.round_to // divisor)) if limit.yields else limit


def lowest(scores: Mapping[str, Tensor], widths: Mapping[str, int], gone: Cuts | None = None) -> dict[str, list[int]]:
    """Return the channels with the lowest scores, all but so many of each group; those that are gone come first.

    >>> lowest({"a": torch.tensor([2.0, 1.0, 3.0])}, {"a": 1}, gone={"a": [2]})
    {'a': [1, 2]}
    """
    cuts = {}
    for name, values in scores.items():
        order = torch.sort(_fallen(values, (gone or {}).get(name, ())), stable=True).indices
        cuts[name] = sorted(order[: max(0, len(values) - widths[name])].tolist())
    return {name: channels for name, channels in cuts.items() if channels}


class _Order:
    """The order in which groups lose channels, and what each keeps after so many losses."""

    def __init__(
        self, scores: Mapping[str, Tensor], scope: str, limits: Mapping[str, Limit], gone: Cuts, progress: float
    ) -> None:
        self.limits = {name: limits.get(name, Limit()) for name in scores}
        self._sizes = {name: len(values) for name, values in scores.items()}
        self._most = {name: size - len(gone.get(name, ())) for name, size in self._sizes.items()}
        self._own = {
            name: limit.kept(self._sizes[name], round(limit.amount * progress * self._sizes[name]))
            for name, limit in self.limits.items()
            if limit.amount is not None
        }
        free = [name for name in scores if name not in self._own]
        self._keys = {name: _keys(_fallen(scores[name], gone.get(name, ())), scope) for name in free}
        owners = torch.tensor([index for index, keys in enumerate(self._keys.values()) for _ in keys]).long()
        keys = torch.tensor([key for keys in self._keys.values() for key in keys], dtype=torch.float64)
        self._losers = owners[torch.sort(keys, stable=True).indices]
        self.length = len(keys)

    def exact(self, count: int) -> Widths:
        """Return the widths after ``count`` losses, to the channel."""
        return self._widths(count, 1, down=False)

    def rounded(self, count: int) -> Widths:
        """Return the widths after ``count`` losses, each rounded down to a multiple."""
        return self._widths(count, None, down=True)

    def first(self, costs: Costs, target: float, widths: Callable[[int], Widths], low: int = 0) -> int:
        """Return the smallest number of losses, from ``low`` on, at which the cost falls to the target."""
        high = self.length
        while low < high:
            middle = (low + high) // 2
            met = costs.share(widths(middle)) <= target + _SLACK
            low, high = (low, middle) if met else (middle + 1, high)
        return low

    def fill(self, widths: Widths, bounds: Sequence[tuple[Costs, float]], step: int | None = None) -> Widths:
        """Let channels come back, those first that would have gone last, while no cost is above its bound.

        Args:
            widths: To begin with.
            bounds: Costs, each with the share that may be left.
            step: Channels that come back at a time; default up to the group's next multiple.
        """
        found, open_ = dict(widths), [name for name in self._keys if widths[name] < self._most[name]]
        while open_:
            name = max(open_, key=lambda each: self._keys[each][self._sizes[each] - found[each] - 1])
            multiple = step or self.limits[name].round_to
            wider = {**found, name: min(self._most[name], (found[name] // multiple + 1) * multiple)}
            if all(costs.share(wider) <= most + _SLACK for costs, most in bounds):
                found = wider
            else:
                open_.remove(name)
            if found[name] == self._most[name] and name in open_:
                open_.remove(name)
        return found

    def _widths(self, count: int, step: int | None, down: bool) -> Widths:
        lost = torch.bincount(self._losers[:count], minlength=len(self._keys)).tolist()
        found = dict(self._own)
        for name, removed in zip(self._keys, lost, strict=True):
            limit = self.limits[name] if step is None else replace(self.limits[name], round_to=step)
            found[name] = limit.kept(self._sizes[name], removed, down)
        return {name: min(found[name], most) for name, most in self._most.items()}


def _bounds(costs: Costs, target: float, beside: Costs | None, *before: Widths) -> list[tuple[Costs, float]]:
    met = [(costs, target)]
    return met if beside is None else [*met, (beside, max(beside.share(widths) for widths in before))]


def _fallen(values: Tensor, gone: Sequence[int]) -> Tensor:
    """Return the scores with those of channels that are gone below all others."""
    return values.index_fill(0, torch.tensor(list(gone)).long(), -1)


def _keys(values: Tensor, scope: str) -> list[float]:
    """Return in rising order what decides when each channel of a group goes."""
    if scope == "layer":
        return [(place + 0.5) / len(values) for place in range(len(values))]
    keys: list[float] = torch.sort(values.to(torch.float64)).values.tolist()
    return keys
