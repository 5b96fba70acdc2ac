"""The course of quantization-aware training, as amounts of one schedule: warm-up, quantization, freezing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_compress.core.errors import ConfigurationError, did_you_mean
from lightning_compress.core.schedule import Schedule, Time, parse_time

FREEZES = ("ranges", "batch_norm")
"""What can be frozen towards the end."""


@dataclass(frozen=True)
class Phases:
    """What happens when, in order.

    Args:
        steps: For each phase its time, and what begins: ``"quantize"``, ``"ranges"``, ``"batch_norm"``.
    """

    steps: tuple[tuple[Time, tuple[str, ...]], ...]

    @property
    def schedule(self) -> Schedule:
        """A schedule whose amount k/n says that k of n phases have begun."""
        if len(self.steps) == 1:
            return Schedule(final=1.0, shape="once", start=self.steps[0][0])
        count = len(self.steps)
        points = tuple((time, (index + 1) / count) for index, (time, _) in enumerate(self.steps))
        return Schedule(final=1.0, shape="milestones", milestones=points)

    def begun(self, amount: float | None) -> set[str]:
        """Return what has begun at an amount of the schedule.

        >>> sorted(make_phases(0, {"ranges": "80%"}).begun(0.5))
        ['quantize']
        """
        count = round((amount or 0.0) * len(self.steps))
        return {event for _, events in self.steps[:count] for event in events}


def make_phases(start: Time, freeze: Mapping[str, Time | None] | None) -> Phases:
    """Return the phases from what a user wrote.

    Args:
        start: When quantization begins.
        freeze: When ``ranges`` and ``batch_norm`` are frozen; ``None`` or missing for never.

    Raises:
        ConfigurationError: For a malformed time, an unknown name, or freezing before the start.

    >>> make_phases("10%", {"ranges": "80%", "batch_norm": "80%"}).steps
    (('10%', ('quantize',)), ('80%', ('ranges', 'batch_norm')))
    """
    if freeze is not None and not isinstance(freeze, Mapping):
        raise ConfigurationError(f"`freeze` must be a mapping such as {{ranges: '80%'}}, got {freeze!r}")
    begin = parse_time(start, "start")
    frozen: list[tuple[Time, tuple[str, ...]]] = []
    for name in freeze or {}:
        if name not in FREEZES:
            raise ConfigurationError(f"`freeze` has no {name!r}: {did_you_mean(str(name), FREEZES)}")
    for name in FREEZES:
        time = (freeze or {}).get(name)
        if time is None:
            continue
        kind, number = parse_time(time, f"freeze.{name}")
        if kind == begin[0] and number <= begin[1]:
            raise ConfigurationError(f"`freeze.{name}` is {time!r}, which must be later than `start`, {start!r}")
        frozen.append((time, (name,)))
    return Phases(((start, ("quantize",)), *_in_order(frozen)))


def _in_order(frozen: list[tuple[Time, tuple[str, ...]]]) -> list[tuple[Time, tuple[str, ...]]]:
    """Join what happens at once, and sort what can be compared without knowing how long the run is."""
    if len(frozen) < 2:
        return frozen
    (first, a), (second, b) = frozen
    times = parse_time(first, "freeze"), parse_time(second, "freeze")
    if times[0] == times[1]:
        return [(first, a + b)]
    return frozen[::-1] if times[0][0] == times[1][0] and times[0][1] > times[1][1] else frozen
