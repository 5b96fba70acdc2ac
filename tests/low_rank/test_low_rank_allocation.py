"""The division of a goal over layers, against trying out everything."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.core.allocation import Line, least_cost, least_error, total
from lightning_compress.low_rank.allocation import equal_share, fastest


def line(rng: np.random.Generator, size: int, convex: bool = False) -> Line:
    """A layer whose cost and time rise with the rank, while the error falls."""
    steps = np.sort(rng.random(size))[::-1] if convex else rng.random(size)
    error = 0.9 * np.append(np.cumsum(steps[::-1])[::-1] / steps.sum(), 0.0)
    cost = np.cumsum(np.full(size + 1, 1.0) if convex else rng.integers(1, 6, size + 1).astype(float))
    return Line(cost, error, np.cumsum(rng.random(size + 1)))


def tried(lines: list[Line], budget: float) -> float:
    choices = itertools.product(*(range(len(line.cost)) for line in lines))
    return min(total(lines, picks, "loss") for picks in choices if total(lines, picks) <= budget)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 1.1))
def test_the_budget_holds_and_no_single_step_is_left(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    lines = [line(rng, int(rng.integers(1, 8))) for _ in range(4)]
    budget = share * sum(float(one.cost[-1]) for one in lines)
    picks = least_error(lines, budget)
    if budget < least_cost(lines):
        assert picks is None
        return
    assert picks is not None
    spare = budget - total(lines, picks)
    assert spare >= 0
    for one, pick in zip(lines, picks, strict=True):
        assert pick == len(one.cost) - 1 or one.cost[pick + 1] - one.cost[pick] > spare


@pytest.mark.parametrize("seed", range(20))
def test_errors_that_fall_ever_slower_are_divided_exactly(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lines = [line(rng, 6, convex=True) for _ in range(4)]
    for budget in (4.0, 9.0, 15.0, 27.0):
        picks = least_error(lines, budget)
        assert picks is not None
        assert total(lines, picks, "loss") == pytest.approx(tried(lines, budget), abs=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_any_errors_are_divided_almost_exactly(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lines = [line(rng, 6) for _ in range(4)]
    found, best = [], []
    for share in (0.3, 0.5, 0.8):
        budget = share * sum(float(one.cost[-1]) for one in lines)
        picks = least_error(lines, budget)
        assert picks is not None
        found.append(total(lines, picks, "loss"))
        best.append(tried(lines, budget))
    assert sum(found) <= 1.25 * sum(best) + 0.1


@pytest.mark.parametrize("seed", range(10))
def test_the_fastest_choice_loses_no_more_than_an_equal_share(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lines = [line(rng, 12, convex=True) for _ in range(5)]
    budget = 0.5 * sum(float(one.cost[-1]) for one in lines)
    plain, careful, quick = equal_share(lines, budget), least_error(lines, budget), fastest(lines, budget)
    assert plain is not None
    assert careful is not None
    assert quick is not None
    assert total(lines, quick) <= budget
    assert total(lines, quick, "error") <= total(lines, plain, "error")
    assert total(lines, quick, "time") <= total(lines, careful, "time")
    for one, mine, theirs in zip(lines, quick, plain, strict=True):
        assert 1 - one.error[mine] >= (1 - one.error[theirs]) / 2


def test_no_layer_is_given_up_for_the_others() -> None:
    slow = Line(np.arange(1.0, 12.0), 1 - np.arange(11) / 10, 100 * np.arange(1.0, 12.0))
    cheap = Line(100 * np.arange(1.0, 12.0), 1 - np.arange(11) / 10, np.arange(1.0, 12.0))
    quick, plain = fastest([slow, cheap, cheap], 1000.0), equal_share([slow, cheap, cheap], 1000.0)
    assert quick is not None
    assert plain is not None
    assert 1 - slow.error[quick[0]] >= (1 - slow.error[plain[0]]) / 2


def test_equal_layers_share_by_their_order() -> None:
    same = Line(np.array([1.0, 2.0]), np.array([1.0, 0.0]), np.zeros(2))
    assert least_error([same] * 3, 5.0) == (1, 1, 0)


def test_what_fits_as_it_is_stays() -> None:
    lines = [line(np.random.default_rng(2), 6) for _ in range(3)]
    whole = sum(float(one.cost[-1]) for one in lines)
    assert least_error(lines, whole) == tuple(len(one.cost) - 1 for one in lines)
    assert equal_share(lines, whole) == tuple(len(one.cost) - 1 for one in lines)
