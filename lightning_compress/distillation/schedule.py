"""Weights and temperatures that change while a model trains."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.schedule import Horizon, Schedule, Timeline

WHOLE_RUN = Schedule(final=1.0, shape="linear", end="100%", every={"step": 1})


@dataclass(frozen=True)
class Ramp:
    r"""A number that goes from one value to another along a :class:`~lightning_compress.Schedule`.

    With the schedule's amount :math:`a(t)` after t optimizer updates, :math:`v(t) = v_0 + (v_1 - v_0)\,a(t)`. It is
    asked before every step; ``every`` of the schedule does not matter.

    Args:
        begin: :math:`v_0`, at amount 0.
        end: :math:`v_1`, at amount 1.
        schedule: When; by default linear over the whole run.

    Raises:
        ConfigurationError: For values that are no finite numbers, or a schedule that is none.

    >>> ramp = Ramp(8.0, 1.0).resolve(Horizon(8, 8))
    >>> ramp(0), ramp(4), ramp(8)
    (8.0, 4.0, 1.0)
    """

    begin: float
    end: float
    schedule: Schedule = WHOLE_RUN

    def __post_init__(self) -> None:
        for name in ("begin", "end"):
            object.__setattr__(self, name, check_number(getattr(self, name), f"{name} of a Ramp"))
        if not isinstance(self.schedule, Schedule):
            raise ConfigurationError(f"`schedule` of a Ramp must be a Schedule, got {self.schedule!r}")

    def resolve(self, horizon: Horizon, clamp: bool = False) -> Course:
        """Return the values of a run of a given length; arguments as in :meth:`Schedule.resolve`."""
        return Course(self, self.schedule.resolve(horizon, clamp))


@dataclass(frozen=True)
class Course:
    """A :class:`Ramp` in optimizer updates of one run."""

    ramp: Ramp
    timeline: Timeline

    def __call__(self, updates: int) -> float:
        """Return the value after so many optimizer updates."""
        amount = self.timeline.amount(updates)
        return self.ramp.begin + (self.ramp.end - self.ramp.begin) * amount


Value = float | Ramp
"""A constant or a ramp."""


def check_number(value: Any, name: str, least: float = -math.inf) -> float:
    """Return ``value`` as a float.

    Raises:
        ConfigurationError: If it is no finite number, or below ``least``.

    >>> check_number(2, "weight")
    2.0
    """
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < least:
        bound = "" if math.isinf(least) else f" of at least {least:g}"
        raise ConfigurationError(f"`{name}` must be a number{bound}, got {value!r}")
    return float(value)


def check_value(value: Any, name: str, above: float | None = None) -> Value:
    """Return a constant as a float and a ramp as it is; both at least 0, or above ``above``.

    Raises:
        ConfigurationError: For anything else.

    >>> check_value(4, "temperature", above=0)
    4.0
    """
    ends = (value.begin, value.end) if isinstance(value, Ramp) else (value,)
    for number in ends:
        check_number(number, name, 0.0)
        if above is not None and number <= above:
            raise ConfigurationError(f"`{name}` must be above {above:g}, got {number!r}")
    return value if isinstance(value, Ramp) else float(value)


def is_bounded(value: Value) -> bool:
    """Return whether a value is a constant, which needs no run to be known."""
    return not isinstance(value, Ramp)
