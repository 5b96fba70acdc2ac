"""Ranks for one goal of a whole model: an equal share for every layer, or the fastest choice that loses no more."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightning_compress.core.allocation import HALVINGS, Line, Picks, least_error, total

_SIGNAL = 0.5
"""Share of the signal that an equal share lets through which a faster choice must let through in every layer."""


def equal_share(lines: Sequence[Line], budget: float) -> Picks | None:
    """Return what one share of the cost for every layer would choose, as large as the budget allows.

    The plain way, without a look at errors: layers whose smallest candidate is larger than the share take that one.

    >>> line = Line(np.array([1.0, 2.0, 4.0]), np.array([0.6, 0.2, 0.0]), np.zeros(3))
    >>> equal_share([line, line], 5.0)
    (1, 1)
    """

    def at(share: float) -> Picks:
        return tuple(_largest_within(line, share * float(line.cost[-1])) for line in lines)

    if total(lines, at(0.0)) > budget:
        return None
    if total(lines, at(1.0)) <= budget:
        return at(1.0)
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if total(lines, at(middle)) <= budget else (low, middle)
    return at(low)


def _largest_within(line: Line, allowed: float) -> int:
    fits = line.cost <= allowed
    if not fits.any():
        return int(line.cost.argmin())
    return int(np.where(fits, line.error, np.inf).argmin())


def fastest(lines: Sequence[Line], budget: float) -> Picks | None:
    """Return the fastest choice within a budget that loses no more than an equal share of it for every layer would.

    The squared errors sum up to no more than those of :func:`equal_share`, and every layer lets through at least half
    of the signal that it lets through there. Among the choices of :func:`least_error`, it is the one with the largest
    weight on time for which that holds.

    >>> line = Line(np.array([1.0, 2.0, 4.0]), np.array([0.6, 0.2, 0.0]), np.array([1.0, 2.0, 4.0]))
    >>> quick = Line(np.array([1.0, 2.0, 4.0]), np.array([0.6, 0.2, 0.0]), np.array([0.1, 0.2, 0.4]))
    >>> fastest([line, quick], 6.0), least_error([line, quick], 6.0)
    ((1, 2), (2, 1))
    """
    plain = equal_share(lines, budget)
    if plain is None:
        return None
    allowance = total(lines, plain, "error")
    kept = [
        np.flatnonzero(1 - line.error >= _SIGNAL * (1 - line.error[pick]))
        for line, pick in zip(lines, plain, strict=True)
    ]
    some = [Line(line.cost[k], line.error[k], line.time[k]) for line, k in zip(lines, kept, strict=True)]
    picks = _fastest(some, budget, allowance)
    return None if picks is None else tuple(int(k[pick]) for k, pick in zip(kept, picks, strict=True))


def _fastest(lines: Sequence[Line], budget: float, allowance: float) -> Picks | None:
    best = least_error(lines, budget)
    scale = max(sum(float(line.time[-1]) for line in lines), 1e-300)
    low, high = 0.0, 1e-3
    while best is not None and high < 1e9:
        picks = least_error(lines, budget, high / scale)
        if picks is None or total(lines, picks, "error") > allowance:
            break
        best, low, high = _faster(lines, best, picks), high, high * 4
    for _ in range(HALVINGS // 2 if best is not None else 0):
        middle = (low + high) / 2
        picks = least_error(lines, budget, middle / scale)
        if best is not None and picks is not None and total(lines, picks, "error") <= allowance:
            best, low = _faster(lines, best, picks), middle
        else:
            high = middle
    return best


def _faster(lines: Sequence[Line], one: Picks, other: Picks) -> Picks:
    return other if total(lines, other, "time") <= total(lines, one, "time") else one
