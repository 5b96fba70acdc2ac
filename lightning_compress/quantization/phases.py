"""The course of quantization-aware training, as amounts of one schedule: warm-up, quantization, freezing."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from lightning_compress.core.errors import ConfigurationError, did_you_mean
from lightning_compress.core.schedule import Horizon, Schedule, Time, Timeline, parse_time

FREEZES = ("ranges", "batch_norm")
"""What can be frozen towards the end."""


@dataclass(frozen=True)
class PhaseSchedule(Schedule):
    """Milestones whose errors speak of the arguments that users gave.

    Args:
        names: The argument that each milestone comes from, in order.
    """

    names: tuple[str, ...] = ()
    belongs: ClassVar[str] = ""

    def times(self) -> tuple[tuple[str, Time], ...]:
        """Return the time of each phase under the name of its argument."""
        return tuple((name, time) for name, (time, _) in zip(self.names, self.milestones, strict=True))

    def resolve(self, horizon: Horizon, clamp: bool = False) -> Timeline:
        """Return the phases in optimizer updates of a run.

        Raises:
            ConfigurationError: If one begins after the run, or not after the one before it.
        """
        steps = [horizon.steps(time, name) for name, time in self.times()]
        if horizon.total is not None:
            last = max(0, horizon.total - 1)
            for (name, time), step in zip(self.times(), steps, strict=True):
                if step > (last if name == "start" else horizon.total) and not clamp:
                    raise ConfigurationError(
                        f"`{name}` is {time!r}, optimizer step {step}, but the run has {horizon.total}; train longer, "
                        "or give an earlier time"
                    )
            steps = [min(step, last) for step in steps] if clamp else steps
        self._check_order(steps, 0 if clamp else 1)
        last = steps[-1] if horizon.total is None else max(0, horizon.total - 1)
        points = tuple((min(step, last), amount) for step, (_, amount) in zip(steps, self.milestones, strict=True))
        return Timeline(self, points[0][0], points[-1][0], 1, points)

    def _check_order(self, steps: Sequence[int], least: int) -> None:
        for (a, first), (b, second) in itertools.pairwise(zip(self.times(), steps, strict=True)):
            if second < first + least:
                raise ConfigurationError(
                    f"`{b[0]}` is {b[1]!r}, optimizer step {second}, which must be later than `{a[0]}`, {a[1]!r}, "
                    f"optimizer step {first}; give a later time, or an earlier `{a[0]}`"
                )


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
        count = len(self.steps)
        points = tuple((time, (index + 1) / count) for index, (time, _) in enumerate(self.steps))
        names = ("start", *("freeze." + " and freeze.".join(events) for _, events in self.steps[1:]))
        return PhaseSchedule(final=1.0, shape="milestones", milestones=points, names=names)

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
