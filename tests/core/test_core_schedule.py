"""When and how much: shapes by hand, times, and what must hold for every schedule."""

import copy
import itertools
import math
import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.schedule import Horizon, Schedule, Timeline, parse_time

RUN = Horizon(total=100, per_epoch=10)


def line(shape: str, **arguments: Any) -> Timeline:
    arguments = {"final": 0.8, "start": {"step": 10}, "end": {"step": 20}, "every": {"step": 5}} | arguments
    return Schedule(shape=shape, **arguments).resolve(RUN)


@pytest.mark.parametrize(
    ("shape", "arguments", "t", "expected"),
    [
        ("linear", {}, 15, 0.4),
        ("linear", {"initial": 0.2}, 12, 0.2 + 0.6 * 0.2),
        ("polynomial", {}, 15, 0.8 - 0.8 * 0.125),  # AGP: s_f + (s_i - s_f)(1 - p)^3 = 0.7
        ("polynomial", {"initial": 0.5, "final": 0.9}, 12, 0.9 - 0.4 * 0.512),
        ("polynomial", {"power": 1}, 12, 0.16),
        ("exponential", {}, 15, 1 - math.sqrt(0.2)),
        ("exponential", {"initial": 0.2}, 15, 1 - 0.8 * 0.5),  # half of the way in logs: sqrt(0.8 * 0.2) = 0.4 left
        ("cosine", {}, 15, 0.4),
        ("cosine", {}, 12, 0.8 * (1 - math.cos(math.pi / 5)) / 2),
    ],
)
def test_shapes_by_hand(shape: str, arguments: dict[str, Any], t: int, expected: float) -> None:
    assert line(shape, **arguments).amount(t) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("shape", ["linear", "polynomial", "exponential", "cosine"])
def test_ends_are_exact(shape: str) -> None:
    timeline = line(shape, initial=0.3, final=0.7)
    assert timeline.amount(9) == 0.3
    assert timeline.amount(10) == pytest.approx(0.3)
    assert timeline.amount(20) == timeline.amount(99) == 0.7
    assert [t for t in range(100) if timeline.due(t)] == [10, 15, 20]
    assert not timeline.reached(19)
    assert timeline.reached(20)


def test_once() -> None:
    timeline = Schedule(0.5, start=2, shape="once").resolve(RUN)
    assert [t for t in range(100) if timeline.due(t)] == [20]
    assert (timeline.amount(19), timeline.amount(20), timeline.updates) == (0.0, 0.5, 1)


def test_milestones() -> None:
    schedule = Schedule(0.9, shape="milestones", milestones=[[1, 0.5], ["50%", 0.7], [{"step": 80}, 0.9]])
    timeline = schedule.resolve(RUN)
    assert timeline.points == ((10, 0.5), (50, 0.7), (80, 0.9))
    assert [t for t in range(100) if timeline.due(t)] == [10, 50, 80]
    assert [timeline.amount(t) for t in (9, 10, 49, 50, 80, 99)] == [0.0, 0.5, 0.5, 0.7, 0.9, 0.9]
    assert timeline.updates == 3


@pytest.mark.parametrize(
    ("milestones", "message"),
    [
        ([[1, 0.5], [0, 0.9]], "must rise in time"),
        ([[1, 0.5], [1, 0.9]], "must rise in time"),
        ([[1, 0.5]], "`final` is 0.9 but the last"),
        ([0.5], "pairs"),
        (["ab"], "pairs"),
        ([[1]], "pairs"),
        ([[1, 90]], "90 % is written 0.9"),
        ([[-1, 0.9]], "`milestones`"),
        ([], "go together"),
        ([[11, 0.9]], "`end`|`start`"),
    ],
)
def test_bad_milestones(milestones: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Schedule(0.9, shape="milestones", milestones=milestones).resolve(RUN)


def test_milestones_need_their_shape() -> None:
    with pytest.raises(ConfigurationError, match="go together"):
        Schedule(0.9, milestones=((1, 0.9),))


@pytest.mark.parametrize(
    ("time", "steps"), [(0, 0), (3, 30), ("0%", 0), ("50%", 50), (" 12.5 % ", 12), ("100%", 100), ({"step": 7}, 7)]
)
def test_times(time: Any, steps: int) -> None:
    assert RUN.steps(time, "start") == steps


@pytest.mark.parametrize(
    "time",
    [
        "{step:5}",
        "{step: 5}",
        1.5,
        "150%",
        "-5%",
        True,
        -1,
        None,
        "5",
        "",
        "%",
        {"step": -1},
        {"step": 1.5},
        {"step": True},
        {"steps": 3},
        {"step": 3, "epoch": 1},
        {},
        [3],
        "nan%",
        "1e1%",
        "10*0.5",
    ],
)
@pytest.mark.parametrize("name", ["start", "end", "every"])
def test_malformed_times(time: Any, name: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"`{name}` must be an epoch"):
        Schedule(0.5, **{name: time})


@pytest.mark.parametrize("every", [0, "0%", {"step": 0}])
def test_every_must_be_above_zero(every: Any) -> None:
    with pytest.raises(ConfigurationError, match="`every` must be above 0"):
        Schedule(0.5, every=every)


def test_every_is_at_least_one_step() -> None:
    assert Schedule(0.5, every="0.1%").resolve(RUN).every == 1


@pytest.mark.parametrize("name", ["final", "initial"])
@pytest.mark.parametrize("value", [-0.1, 1.1, True, "0.5", None, math.nan, math.inf, 101])
def test_amounts_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"`{name}` must be a number from 0 to 1"):
        Schedule(**({"final": 0.5} | {name: value}))


def test_percent_hint() -> None:
    with pytest.raises(ConfigurationError, match=r"90 % is written 0\.9"):
        Schedule(90)


@pytest.mark.parametrize("power", [0, -1, True, "3", math.nan])
def test_power(power: Any) -> None:
    with pytest.raises(ConfigurationError, match="`power`"):
        Schedule(0.5, power=power)


def test_shape_typo() -> None:
    with pytest.raises(ConfigurationError, match=r"`shape`.*did you mean 'polynomial'"):
        Schedule(0.5, shape="polynomiel")


@pytest.mark.parametrize("arguments", [{"final": 1.0}, {"final": 0.5, "initial": 1.0}])
def test_exponential_never_reaches_one(arguments: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match="below 1"):
        Schedule(shape="exponential", **arguments)


def test_hundred_percent_is_the_last_update() -> None:
    timeline = Schedule(0.5, end="100%", every=1).resolve(RUN)
    assert timeline.end == 99
    assert timeline.due(99)
    assert timeline.amount(99) == 0.5
    assert Schedule(0.5, end=10).resolve(RUN).end == 99


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"end": 11}, r"`end` of the schedule is optimizer step 110, but the run has 100 \(10 epochs of 10\)"),
        ({"end": {"step": 101}}, "`end`.*101"),
        ({"start": 10, "end": 10}, "`start` of the schedule is optimizer step 100"),
        ({"start": 3, "end": 2}, r"`start` \(optimizer step 30\) lies after `end` \(optimizer step 20\)"),
        ({"start": 10, "shape": "once"}, "`start` of the schedule"),
    ],
)
def test_a_schedule_that_does_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Schedule(0.5, **arguments).resolve(RUN)


def test_unbounded_runs_take_steps_and_epochs_only() -> None:
    endless = Horizon(None, 10)
    with pytest.raises(ConfigurationError, match=r"`end` is '70%'.*max_epochs=-1.*'step': N"):
        Schedule(0.5).resolve(endless)
    assert Schedule(0.5, end=3, every=1).resolve(endless).end == 30
    no_length = Horizon(None, None)
    with pytest.raises(ConfigurationError, match=r"`end` is 3 epochs.*loader without length"):
        Schedule(0.5, end=3, every={"step": 1}).resolve(no_length)
    with pytest.raises(ConfigurationError, match=r"`end` is '70%'.*loader without length.*`limit_train_batches`"):
        Schedule(0.5).resolve(no_length)
    assert Schedule(0.5, end={"step": 9}, every={"step": 1}).resolve(no_length).end == 9
    with pytest.raises(ConfigurationError, match=r"set by max_steps"):
        Schedule(0.5, end={"step": 9}, every={"step": 1}).resolve(Horizon(4, None))


@pytest.mark.parametrize("schedule", [Schedule(0.5, start=5, end=9), Schedule(0.5, start=3, shape="once")])
def test_clamp_moves_times_onto_the_last_update(schedule: Schedule) -> None:
    timeline = schedule.resolve(Horizon(1, 1), clamp=True)
    assert (timeline.start, timeline.end) == (0, 0)
    assert timeline.due(0)
    assert timeline.amount(0) == 0.5


def test_clamped_milestones_end_at_final() -> None:
    schedule = Schedule(0.9, shape="milestones", milestones=((1, 0.5), (4, 0.9)))
    timeline = schedule.resolve(Horizon(2, 2), clamp=True)
    assert timeline.due(1)
    assert timeline.amount(1) == 0.9


def test_schedules_are_values() -> None:
    schedule = Schedule(0.5, start={"step": 3}, milestones=())
    for other in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule)), Schedule(0.5, start={"step": 3})):
        assert other == schedule
    with pytest.raises(AttributeError):
        schedule.final = 0.7
    timeline = schedule.resolve(RUN)
    assert pickle.loads(pickle.dumps(timeline)) == timeline


def test_text_of_a_timeline() -> None:
    assert str(line("linear")) == "linear from 0 to 0.8, 3 updates in optimizer steps 10 to 20"
    assert str(Schedule(0.5, start=2, shape="once").resolve(RUN)) == "once from 0 to 0.5, step 20"


def test_parse_time_keeps_the_kind() -> None:
    assert parse_time("2.5%", "x") == ("percent", 2.5)


@st.composite
def timelines(draw: st.DrawFn) -> tuple[Timeline, int]:
    total = draw(st.integers(1, 300))
    start = draw(st.integers(0, total - 1))
    end = draw(st.integers(start, total))
    initial = draw(st.floats(0, 0.99))
    schedule = Schedule(
        final=draw(st.floats(initial, 0.99)),
        start={"step": start},
        end={"step": end},
        every={"step": draw(st.integers(1, total))},
        shape=draw(st.sampled_from(["once", "linear", "polynomial", "exponential", "cosine"])),
        initial=initial,
        power=draw(st.floats(0.1, 10)),
    )
    return schedule.resolve(Horizon(total, draw(st.integers(1, 20)))), total


@settings(max_examples=150, deadline=None)
@given(timelines())
def test_every_schedule_rises_stays_in_range_and_ends_at_final(drawn: tuple[Timeline, int]) -> None:
    timeline, total = drawn
    amounts = [timeline.amount(t) for t in range(total)]
    due = [t for t in range(total) if timeline.due(t)]
    low, high = timeline.schedule.initial, timeline.schedule.final
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(amounts))
    assert all(low - 1e-9 <= amount <= high + 1e-9 for amount in amounts)
    assert due[0] == timeline.start
    assert due[-1] == timeline.end < total
    assert amounts[due[-1]] == amounts[-1] == high
    assert len(due) == timeline.updates
    assert [timeline.reached(t) for t in due] == [False] * (len(due) - 1) + [True]
