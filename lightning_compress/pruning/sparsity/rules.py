"""Exceptions to a selection: these layers with that strength."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.schedule import Schedule
from lightning_compress.core.select import Select


@dataclass(frozen=True)
class StrengthRule:
    """Regularize the layers that match with a strength of their own.

    Args:
        include: Patterns as in :class:`Select`.
        strength: Strength for each of these layers, at least 0 (leave alone); it follows the schedule.
        exclude: Patterns that must not match.
        types: Class names of layers; empty for all that can be regularized.

    Raises:
        ConfigurationError: If the strength is negative or not finite, or a pattern is malformed.

    >>> StrengthRule(include="conv1", strength=1e-3).include
    ('conv1',)
    """

    include: tuple[str, ...]
    strength: float
    exclude: tuple[str, ...] = ()
    types: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "strength", checked_strength(self.strength, "`strength` of a rule"))
        for name in ("include", "exclude", "types"):
            object.__setattr__(self, name, getattr(self.select, name))

    @property
    def select(self) -> Select:
        """The rule's patterns as a selection."""
        return Select(types=self.types, include=self.include, exclude=self.exclude)


def checked_strength(value: object, name: str) -> float:
    """Return a strength as a float.

    Args:
        value: What was given.
        name: What it is called in an error.

    Raises:
        ConfigurationError: If it is not a finite number of at least 0.

    >>> checked_strength(1, "`strength`")
    1.0
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        hint = "; YAML reads 1e-4 as text, write 1.0e-4" if isinstance(value, str) else ""
        raise ConfigurationError(f"{name} must be a finite number of at least 0, got {value!r}{hint}")
    return float(value)


def check_rising(schedule: Schedule) -> None:
    """Refuse schedules that say when to end a penalty but not when to begin it.

    Args:
        schedule: Of the share of the strength.

    Raises:
        ConfigurationError: If the final amount holds before the end.

    >>> check_rising(Schedule(1.0, initial=0.99, shape="linear", end="80%"))
    """
    amounts = [amount for _, amount in schedule.milestones] or [schedule.initial, schedule.final]
    if schedule.shape == "once" or not all(amount < schedule.final for amount in amounts[:-1]):
        raise ConfigurationError(
            "`schedule` must rise to its final amount at its end, because zeros are held and the penalty ends there; "
            "for a nearly constant strength use Schedule(final=1.0, initial=0.99, shape='linear', end='80%')"
        )
