"""How much should go: one goal, the schedule that leads to it, and whether it can be reached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.schedule import Schedule
from lightning_compress.pruning.structured.budget import Costs


def resolve_goal(schedule: Schedule | float | None, goals: Mapping[str, object]) -> tuple[str, Schedule]:
    """Return what is counted, and the schedule of the share of it that goes.

    Args:
        schedule: Share of channels that goes, or a schedule.
        goals: What else was given, by name: ``macs`` and ``parameters`` as shares that remain, ``latency``.

    Raises:
        ConfigurationError: If not exactly one goal is given, or a share is outside its range.

    >>> name, schedule = resolve_goal(None, {"macs": 0.25})
    >>> name, schedule.final
    ('macs', 0.75)
    """
    given = {name: value for name, value in goals.items() if value is not None}
    if len(given) > 1 or (not given and schedule is None) or (given and isinstance(schedule, int | float)):
        described = ", ".join(f"{name}={value!r}" for name, value in {"schedule": schedule, **goals}.items())
        raise ConfigurationError(
            "give one of: a number or Schedule as `schedule` (share of channels that goes), `macs`, `parameters` or "
            f"`latency` (share that remains); got {described}"
        )
    for name, value in given.items():
        if name == "latency":
            return name, _ending(schedule, 1.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise ConfigurationError(f"`{name}` is the share that remains, above 0 and at most 1, got {value!r}")
        return name, _ending(schedule, 1 - value)
    return "channels", schedule if isinstance(schedule, Schedule) else Schedule(final=schedule or 0.0)


def _ending(schedule: Schedule | float | None, final: float) -> Schedule:
    return replace(schedule, final=final) if isinstance(schedule, Schedule) else Schedule(final=final)


def check_reachable(wanted: tuple[str, float], costs: Costs, least: Mapping[str, int], left: Mapping[str, str]) -> None:
    """Refuse a goal that the limits do not allow.

    Args:
        wanted: What is counted, and the share of it that should remain.
        costs: What the model costs.
        least: Channels that each group keeps at least.
        left: Why the outputs of other layers stay, by path.

    Raises:
        ConfigurationError: Says what can be reached, and what stands in the way.
    """
    goal, share = wanted
    possible = costs.share(least)
    if possible > share + 1e-9:
        kept = "; ".join(f"{path} ({why.removeprefix('kept: ')})" for path, why in list(left.items())[:4])
        raise ConfigurationError(
            f"`{goal if goal != 'channels' else 'schedule'}` asks for {share:.3g} of the {goal} to remain, but at "
            f"least {possible:.3g} stay with `limits`; lower `floor`, `round_to` or `amount` there, or ask for less. "
            f"What cannot be cut: {kept}"
        )
