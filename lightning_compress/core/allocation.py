r"""One goal for a whole model, divided over its layers by what each costs in output error.

Every layer is a line of candidates: what it costs at each rank or number of bits, and the error e there, whose loss l
is :math:`-\log(1 - e)`. The least sum of losses within a budget is found with a multiplier (Everett 1963): each layer
takes its best :math:`l + \lambda c`, and :math:`\lambda` grows until the budget holds. Steps that a multiplier cannot
see are then given back one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Picks = tuple[int, ...]
HALVINGS = 50
"""Of an interval in which a multiplier or a share is looked for."""


@dataclass(frozen=True)
class Line:
    """The candidates of one layer; the last is the one with the least error, such as the layer as it is.

    Attributes:
        cost: What the goal counts, of each candidate.
        error: Relative error of the layer's outputs, squared: 0 to 1, least at the end.
        time: What one forward pass takes, in any unit.
    """

    cost: Numbers
    error: Numbers
    time: Numbers

    @cached_property
    def loss(self) -> Numbers:
        r"""What is made least: :math:`-\log(1 - e)`, the share of a signal that gets through, as it adds up.

        It equals the error where that is small. Sums of errors alone would give up single layers for the others: none
        can lose more than 1, while nothing gets through a network of which one layer is lost.
        """
        return -np.log(np.maximum(1 - self.error, 1e-9))


def least_cost(lines: Sequence[Line]) -> float:
    """Return the smallest sum of costs that any choice has."""
    return float(sum(line.cost.min() for line in lines))


def total(lines: Sequence[Line], picks: Picks, what: str = "cost") -> float:
    """Return the sum of one property over the chosen candidates.

    >>> line = Line(np.array([1.0, 4.0]), np.array([0.5, 0.0]), np.array([1.0, 2.0]))
    >>> total([line, line], (0, 1)), total([line, line], (0, 1), "error")
    (5.0, 0.5)
    """
    return float(sum(getattr(line, what)[pick] for line, pick in zip(lines, picks, strict=True)))


def least_error(lines: Sequence[Line], budget: float, weight: float = 0.0) -> Picks | None:
    r"""Return the candidates with the least sum of errors whose costs stay within a budget.

    The choice is exact up to one step of one layer: no layer could take its next candidate without exceeding the
    budget. Ties go to the earlier layer and the cheaper candidate, so all processes choose alike.

    Args:
        lines: The layers.
        budget: What the costs may sum up to.
        weight: What a unit of time counts as loss.

    Returns:
        The number of the candidate of each layer, or ``None`` if the cheapest ones exceed the budget.

    >>> line = Line(np.array([1.0, 2.0, 4.0]), np.array([0.6, 0.2, 0.0]), np.zeros(3))
    >>> other = Line(np.array([1.0, 2.0, 4.0]), np.array([0.9, 0.8, 0.0]), np.zeros(3))
    >>> least_error([line, other], 6.0), least_error([line, other], 1.0)
    ((1, 2), None)
    """
    values = [line.loss + weight * line.time for line in lines]

    def at(multiplier: float) -> Picks:
        return tuple(int((value + multiplier * line.cost).argmin()) for value, line in zip(values, lines, strict=True))

    if total(lines, at(0.0)) <= budget:
        return _give_back(lines, at(0.0), budget, weight > 0)
    cheapest = tuple(int(line.cost.argmin()) for line in lines)
    if total(lines, cheapest) > budget:
        return None
    low, high = 0.0, 1.0 / max(budget, 1e-300)
    while total(lines, at(high)) > budget and high < 1e300:
        low, high = high, high * 4
    found = at(high) if total(lines, at(high)) <= budget else cheapest
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        picks = at(middle)
        if total(lines, picks) <= budget:
            high, found = middle, picks
        else:
            low = middle
    return _give_back(lines, found, budget, weight > 0)


def _give_back(lines: Sequence[Line], picks: Picks, budget: float, quick: bool) -> Picks:
    """Spend what is left of the budget where the error falls most for it, or (``quick``) where it takes least time."""
    chosen = list(picks)
    spare = budget - total(lines, picks)
    best = [_next_step(line, pick, spare, quick) for line, pick in zip(lines, chosen, strict=True)]
    while True:
        index = max(range(len(lines)), key=lambda place: (best[place][0], -place))
        gain, candidate = best[index]
        if gain <= 0:
            return tuple(chosen)
        spare -= float(lines[index].cost[candidate] - lines[index].cost[chosen[index]])
        chosen[index] = candidate
        for place, line in enumerate(lines):  # less is left, so that others may not fit any more
            step = best[place]
            if place == index or (step[0] > 0 and line.cost[step[1]] - line.cost[chosen[place]] > spare):
                best[place] = _next_step(line, chosen[place], spare, quick)


def _next_step(line: Line, pick: int, spare: float, quick: bool) -> tuple[float, int]:
    """Return how good the best step of a layer is, and the candidate that it leads to; 0 if there is none."""
    more = line.cost - line.cost[pick]
    gain = line.loss[pick] - line.loss
    usable = (gain > 0) & (more <= spare)
    if not usable.any():
        return 0.0, pick
    if quick:
        ratio = np.where(usable, np.maximum(more, 1e-12) / np.maximum(line.time - line.time[pick], 1e-12), -1.0)
    else:
        ratio = np.where(usable, gain / np.maximum(more, 1e-12), -1.0)
    candidate = int(ratio.argmax())
    return float(ratio[candidate]), candidate
