"""What a whole model should become: smaller by a factor, cheaper by a share, or as fast as asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.latency import LatencyGoal, as_goal
from lightning_compress.low_rank.factors import Factors

COLUMNS = {"compression_rate": "parameters", "macs": "macs", "latency": "time"}
"""What each goal counts."""


@dataclass(frozen=True)
class Goal:
    """A goal for the whole model.

    Attributes:
        kind: A key of :data:`COLUMNS`.
        value: How many times fewer parameters, or the share of operations that may remain; 0 for a latency.
        latency: What a latency should be.
    """

    kind: str
    value: float
    latency: LatencyGoal | None = None

    @property
    def column(self) -> str:
        """What is counted."""
        return COLUMNS[self.kind]

    def __str__(self) -> str:
        if self.kind == "compression_rate":
            return f"{self.value:g} times fewer parameters"
        return f"{self.value:g} of the operations" if self.latency is None else str(self.latency)


def resolve_goal(
    compression_rate: float | None,
    macs: float | None,
    latency: LatencyGoal | float | Mapping[str, Any] | None,
    factors: Factors,
) -> Goal | None:
    """Return the goal that was given, or ``None`` if ranks are given instead.

    Raises:
        ConfigurationError: If there is none of both, more than one, or a value outside its range.

    >>> str(resolve_goal(4.0, None, None, Factors())), resolve_goal(None, None, None, Factors(rank=8))
    ('4 times fewer parameters', None)
    """
    given = {"compression_rate": compression_rate, "macs": macs, "latency": latency}
    goals = [name for name, value in given.items() if value is not None]
    ruled = [name for name, rule in factors.rules.items() if rule.rank is not None]
    if len(goals) > 1:
        raise ConfigurationError(f"`{goals[0]}` and `{goals[1]}` are two goals: give one of them")
    if goals and factors.rank is not None:
        raise ConfigurationError(
            f"`{goals[0]}` chooses ranks, but `factors` gives {factors.rank!r}: leave one out, or give single layers "
            "ranks of their own with `rules`"
        )
    if not goals and factors.rank is None and not ruled:
        raise ConfigurationError(
            "`compression_rate`, `macs`, `latency` or `factors` with a `rank` must say how far to go, such as "
            "compression_rate=4 or factors={'rank': {'energy': 0.9}}"
        )
    if compression_rate is not None:
        return Goal("compression_rate", _number("compression_rate", compression_rate, 1.0, None))
    if macs is not None:
        return Goal("macs", _number("macs", macs, 0.0, 1.0))
    return None if latency is None else Goal("latency", 0.0, as_goal(latency))


def _number(name: str, value: Any, low: float, high: float | None) -> float:
    good = not isinstance(value, bool) and isinstance(value, int | float) and value > low
    if not good or (high is not None and value > high):
        wanted = "above 1, such as 4 for a quarter of the parameters" if high is None else "above 0 and at most 1"
        raise ConfigurationError(f"`{name}` must be a number {wanted}, got {value!r}")
    return float(value)
