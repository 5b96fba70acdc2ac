"""When and how much: frozen schedules that are asked, never told."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lightning_compress.core.errors import ConfigurationError, did_you_mean

Time = int | str | Mapping[str, int]
"""A point or length of a run: an epoch (``3``), a share of it (``"50%"``), or optimizer steps (``{"step": 1200}``)."""

SHAPES = ("once", "linear", "polynomial", "exponential", "cosine", "milestones")


@dataclass(frozen=True)
class Horizon:
    """How long a run is, in optimizer updates.

    Args:
        total: Updates of the whole run; ``None`` if unbounded.
        per_epoch: Updates of one epoch; ``None`` if unknown.
    """

    total: int | None
    per_epoch: int | None

    def steps(self, time: Time, name: str) -> int:
        """Return ``time`` in updates, rounded to the nearest.

        Args:
            time: An int epoch, ``"50%"`` or ``{"step": N}``.
            name: The argument's name, for errors.

        Raises:
            ConfigurationError: If the time is malformed, or the run's length is needed and unknown.
        """
        kind, number = parse_time(time, name)
        if kind == "step":
            return int(number)
        if kind == "epoch":
            if self.per_epoch is None and number:
                raise ConfigurationError(
                    f"`{name}` is {time!r} epochs, but the number of batches of an epoch is unknown (a loader without "
                    "length); give it in optimizer steps: {'step': N}"
                )
            return int(number) * (self.per_epoch or 0)
        if self.total is None:
            why, setting = "the run has no end (max_epochs=-1)", "max_epochs"
            if self.per_epoch is None:
                why, setting = "its length is unknown (a loader without length)", "limit_train_batches"
            raise ConfigurationError(
                f"`{name}` is {time!r} of the run, but {why}; set `{setting}` or `max_steps` on the Trainer, or give "
                "the time in optimizer steps: {'step': N}"
            )
        return round(number / 100 * self.total)


def parse_time(time: Time, name: str) -> tuple[str, float]:
    """Return ``("epoch" | "percent" | "step", number)``.

    Raises:
        ConfigurationError: For anything else, with the accepted forms.

    >>> parse_time("50%", "end"), parse_time({"step": 7}, "end"), parse_time(3, "end")
    (('percent', 50.0), ('step', 7), ('epoch', 3))
    """
    if isinstance(time, int) and not isinstance(time, bool) and time >= 0:
        return "epoch", time
    if isinstance(time, Mapping) and list(time) == ["step"]:
        step = time["step"]
        if isinstance(step, int) and not isinstance(step, bool) and step >= 0:
            return "step", step
    if isinstance(time, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", time)
        if match and float(match[1]) <= 100:
            return "percent", float(match[1])
    raise ConfigurationError(
        f"`{name}` must be an epoch (an int >= 0), a share of the run such as '50%' (0 to 100), or optimizer steps "
        f"{{'step': N}}; got {time!r}"
    )


@dataclass(frozen=True)
class Schedule:
    r"""How an amount grows from ``initial`` to ``final`` between two times.

    With progress :math:`p = (t - t_0)/(t_1 - t_0)` clamped to [0, 1], initial amount :math:`a_i` and final
    :math:`a_f`:

    - ``once``: :math:`a_f` from ``start`` on;
    - ``linear``: :math:`a_i + (a_f - a_i) p`;
    - ``polynomial``: :math:`a_f + (a_i - a_f)(1 - p)^{power}`; power 3 is automated gradual pruning (AGP, Zhu & Gupta
      2017, arXiv:1710.01878);
    - ``exponential``: :math:`1 - (1 - a_i)\,((1 - a_f)/(1 - a_i))^p`, the same share of what is left each time;
    - ``cosine``: :math:`a_i + (a_f - a_i)(1 - \cos \pi p)/2`;
    - ``milestones``: the amount of the last milestone that has passed.

    A time is an int epoch (counted from 0), a share of the run (``"50%"``), or ``{"step": N}`` optimizer updates.
    An update with index t happens right after optimizer update t (from 0), so before the validation of its epoch.

    Args:
        final: Amount at the end, 0 to 1.
        start: First update.
        end: Update at which ``final`` is reached; "100%" means the last update of the run. Ignored by ``once``.
        every: Time between updates; at least one optimizer step.
        shape: One of ``once, linear, polynomial, exponential, cosine, milestones``.
        initial: Amount before the first update, 0 to 1.
        power: Exponent of ``polynomial``, above 0.
        milestones: ``[[time, amount], ...]`` in rising order, for ``milestones`` only; the last amount is ``final``.

    Raises:
        ConfigurationError: For a value outside these ranges.

    >>> timeline = Schedule(final=0.8, start={"step": 0}, end={"step": 4}, every={"step": 2}).resolve(Horizon(10, 5))
    >>> [(t, round(timeline.amount(t), 3)) for t in range(7) if timeline.due(t)]
    [(0, 0.0), (2, 0.7), (4, 0.8)]
    """

    final: float
    start: Time = 0
    end: Time = "70%"
    every: Time = "2%"
    shape: str = "polynomial"
    initial: float = 0.0
    power: float = 3.0
    milestones: tuple[tuple[Time, float], ...] = ()
    belongs: ClassVar[str] = " of the schedule"
    """What errors say after the name of a time; empty where it is an argument of the callback itself."""

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ConfigurationError(f"`shape` is {self.shape!r}: {did_you_mean(str(self.shape), SHAPES, 6)}")
        for name in ("final", "initial"):
            object.__setattr__(self, name, _amount(getattr(self, name), name))
        if not isinstance(self.power, (int, float)) or isinstance(self.power, bool) or not self.power > 0:
            raise ConfigurationError(f"`power` must be a number above 0, got {self.power!r}")
        for name in ("start", "end", "every"):
            number = parse_time(getattr(self, name), name)[1]
            if name == "every" and number == 0:
                raise ConfigurationError(f"`every` must be above 0, got {self.every!r}")
        if self.shape == "exponential" and max(self.final, self.initial) >= 1:
            raise ConfigurationError("`final` must be below 1 for the exponential shape, which never reaches 1")
        object.__setattr__(self, "milestones", self._checked_milestones())

    def _checked_milestones(self) -> tuple[tuple[Time, float], ...]:
        if (self.shape == "milestones") != bool(self.milestones):
            raise ConfigurationError(
                f"`milestones` and shape='milestones' go together; got shape={self.shape!r} and {self.milestones!r}"
            )
        checked = []
        for item in self.milestones:
            if isinstance(item, (str, Mapping)) or not isinstance(item, Sequence) or len(item) != 2:
                raise ConfigurationError(f"`milestones` must be pairs [time, amount], got {item!r}")
            parse_time(item[0], "milestones")
            checked.append((item[0], _amount(item[1], "milestones")))
        if checked and checked[-1][1] != self.final:
            raise ConfigurationError(
                f"`final` is {self.final} but the last of `milestones` is {checked[-1][1]}; make them equal"
            )
        return tuple(checked)

    def times(self) -> tuple[tuple[str, Time], ...]:
        """Return the times to check before the length of the data is known, each under its name in errors."""
        if self.shape == "milestones":
            return tuple(("milestones", time) for time, _ in self.milestones)
        names = ("start",) if self.shape == "once" else ("start", "end", "every")
        return tuple((name, getattr(self, name)) for name in names)

    def resolve(self, horizon: Horizon, clamp: bool = False) -> Timeline:
        """Return the schedule in optimizer updates of a given run.

        Args:
            horizon: The run's length.
            clamp: Move times that lie after the run's last update onto it, for a trial run of a few batches.

        Raises:
            ConfigurationError: If it does not fit into the run; says which time, and how long the run is.
        """
        points = tuple((horizon.steps(time, "milestones"), amount) for time, amount in self.milestones)
        if points:
            start, end = points[0][0], points[-1][0]
            if any(b[0] <= a[0] for a, b in itertools.pairwise(points)):
                raise ConfigurationError(f"`milestones` must rise in time; in optimizer steps they are {points}")
        else:
            start = horizon.steps(self.start, "start")
            end = start if self.shape == "once" else horizon.steps(self.end, "end")
        every = max(1, horizon.steps(self.every, "every")) if self.shape not in ("once", "milestones") else 1
        if horizon.total is not None:
            last = max(0, horizon.total - 1)
            if clamp:
                start, end = min(start, last), min(end, last)
            if end > horizon.total or start > last:
                name, value = ("start", start) if start > last else ("end", end)
                raise ConfigurationError(
                    f"`{name}` of the schedule is optimizer step {value}, but the run has {horizon.total} "
                    f"({_epochs(horizon)}); train longer or let the schedule end earlier"
                )
            if every > horizon.total and not clamp:
                raise ConfigurationError(
                    f"`every` of the schedule is {every} optimizer steps, but the run has {horizon.total} "
                    f"({_epochs(horizon)}), so nothing would happen before the end; give a shorter time"
                )
            end = min(end, last)
            points = tuple((min(step, last), amount) for step, amount in points)
        if start > end:
            raise ConfigurationError(f"`start` (optimizer step {start}) lies after `end` (optimizer step {end})")
        return Timeline(self, start, end, every, points)


@dataclass(frozen=True)
class Timeline:
    """A :class:`Schedule` in optimizer updates of one run; answers for any update index t >= 0."""

    schedule: Schedule
    start: int
    end: int
    every: int
    points: tuple[tuple[int, float], ...] = ()

    def __str__(self) -> str:
        schedule, count = self.schedule, self.updates
        when = f"{count} updates in optimizer steps {self.start} to {self.end}" if count > 1 else f"step {self.start}"
        if schedule.initial == schedule.final:
            return f"constant {schedule.final:g}, {when}"
        return f"{schedule.shape} from {schedule.initial:g} to {schedule.final:g}, {when}"

    def due(self, t: int) -> bool:
        """Return whether an update happens right after optimizer update ``t``."""
        if self.points:
            return any(step == t for step, _ in self.points)
        return self.start <= t <= self.end and ((t - self.start) % self.every == 0 or t == self.end)

    def amount(self, t: int) -> float:
        """Return the amount that holds after optimizer update ``t``."""
        schedule = self.schedule
        if t < self.start:
            return schedule.initial
        if self.points:
            return [amount for step, amount in self.points if step <= t][-1]
        if t >= self.end:
            return schedule.final
        p = (t - self.start) / (self.end - self.start)
        return _SHAPES[schedule.shape](schedule.initial, schedule.final, p, schedule.power)

    def reached(self, t: int) -> bool:
        """Return whether the final amount holds after optimizer update ``t``."""
        return t >= self.end

    @property
    def updates(self) -> int:
        """Number of updates of the whole schedule."""
        return len(self.points) or len(range(self.start, self.end, self.every)) + 1


def _amount(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        hint = "; 90 % is written 0.9" if isinstance(value, (int, float)) and 1 < value <= 100 else ""
        raise ConfigurationError(f"`{name}` must be a number from 0 to 1, got {value!r}{hint}")
    return float(value)


def _epochs(horizon: Horizon) -> str:
    if horizon.per_epoch is None or horizon.total is None:
        return "set by max_steps"
    return f"{math.ceil(horizon.total / horizon.per_epoch)} epochs of {horizon.per_epoch}"


_SHAPES = {
    "linear": lambda a, b, p, power: a + (b - a) * p,
    "polynomial": lambda a, b, p, power: b + (a - b) * (1 - p) ** power,
    "exponential": lambda a, b, p, power: 1 - (1 - a) * ((1 - b) / (1 - a)) ** p,
    "cosine": lambda a, b, p, power: a + (b - a) * (1 - math.cos(math.pi * p)) / 2,
}
