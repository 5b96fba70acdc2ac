"""Scopes: by hand on four weights, against numpy and brute force, and exact counts."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_compress.core.errors import CompressionError, ConfigurationError
from lightning_compress.pruning.allocation import (
    SCOPES,
    Ranked,
    allocate,
    choose_masks,
    erk_counts,
    lamp_scores,
    least_kept,
    normalized,
)


def single(*values: float, least: int = 1) -> Ranked:
    return Ranked(torch.tensor(values), (len(values),), least)


def gone(masks: dict[str, Tensor]) -> dict[str, list[int]]:
    return {key: (mask.flatten() == 0).nonzero().flatten().tolist() for key, mask in masks.items()}


FOUR = {"a": single(1.0, 4.0), "b": single(2.0, 3.0)}


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ("global", {"a": [0], "b": [0]}),
        ("layer", {"a": [0], "b": [0]}),
        ("global_normalized", {"a": [0], "b": [0]}),  # 0.4, 1.6 and 0.8, 1.2
        ("lamp", {"a": [0], "b": [0]}),  # 1/17, 1 and 4/13, 1
        ("erk", {"a": [0], "b": [0]}),
    ],
)
def test_four_weights_at_a_half(scope: str, expected: dict[str, list[int]]) -> None:
    assert gone(allocate(FOUR, 0.5, scope)) == expected


def test_where_the_scopes_differ() -> None:
    ranked = {"small": single(0.1, 0.2, 0.3, 0.4), "large": single(10.0, 20.0, 30.0, 40.0)}
    assert gone(allocate(ranked, 0.375, "global")) == {"small": [0, 1, 2], "large": []}
    assert gone(allocate(ranked, 0.5, "layer")) == {"small": [0, 1], "large": [0, 1]}
    assert gone(allocate(ranked, 0.25, "global_normalized")) == {"small": [0], "large": [0]}
    assert gone(allocate(ranked, 0.25, "lamp")) == {"small": [0], "large": [0]}
    wide = {"wide": Ranked(torch.arange(100.0), (10, 10), 1), "narrow": Ranked(torch.arange(10.0), (10, 1), 1)}
    assert {key: len(found) for key, found in gone(allocate(wide, 0.5, "erk")).items()} == {"wide": 55, "narrow": 0}


def test_lamp_against_numpy() -> None:
    weight = np.random.default_rng(0).normal(size=200).astype(np.float32)
    order = np.argsort(np.abs(weight))
    squares = (weight[order].astype(np.float64)) ** 2
    expected = np.empty(200)
    for place, index in enumerate(order):
        expected[index] = squares[place] / squares[place:].sum()
    found = lamp_scores(torch.from_numpy(np.abs(weight)).reshape(10, 20))
    np.testing.assert_allclose(found.flatten().numpy(), expected, rtol=1e-6)
    assert float(found.max()) == 1.0


def test_scores_that_say_gone_and_stay_are_passed_on() -> None:
    marked = torch.tensor([-torch.inf, 3.0, 1.0, torch.inf])
    assert lamp_scores(marked).tolist() == pytest.approx([-math.inf, 1.0, 0.1, math.inf])
    assert normalized(marked).tolist() == [-math.inf, 1.5, 0.5, math.inf]
    assert lamp_scores(torch.zeros(2)).tolist() == normalized(torch.zeros(2)).tolist() == [0.0, 0.0]


def published_erk(shapes: dict[str, tuple[int, ...]], density: float) -> dict[str, float]:
    """The loop of the paper's code: whatever would exceed density 1 is dense, the rest is scaled again."""
    dense: set[str] = set()
    total = {key: float(np.prod(shape)) for key, shape in shapes.items()}
    raw = {key: sum(shape) / total[key] for key, shape in shapes.items()}
    while True:
        wanted = density * sum(total.values()) - sum(total[key] for key in dense)
        epsilon = wanted / sum(raw[key] * total[key] for key in shapes if key not in dense)
        over = [key for key in shapes if key not in dense and raw[key] * epsilon > 1]
        if not over:
            return {key: 1.0 if key in dense else raw[key] * epsilon for key in shapes}
        dense.add(max(over, key=lambda key: raw[key]))


RESNET = {"stem": (16, 3, 3, 3), "a": (16, 16, 3, 3), "b": (32, 16, 3, 3), "short": (32, 16, 1, 1), "fc": (10, 32)}


@pytest.mark.parametrize("density", [0.01, 0.05, 0.1, 0.3, 0.5, 0.9])
def test_erk_against_the_published_loop(density: float) -> None:
    total = sum(math.prod(shape) for shape in RESNET.values())
    expected = published_erk(RESNET, round(density * total) / total)
    found = erk_counts(RESNET, round(density * total), dict.fromkeys(RESNET, 1))
    assert sum(found.values()) == round(density * total)
    for key, shape in RESNET.items():
        assert abs(found[key] - expected[key] * math.prod(shape)) < 1


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3)), min_size=1, max_size=5),
    st.floats(0, 1),
    st.floats(0, 0.9),
)
def test_erk_keeps_the_total_within_what_each_must_and_can(
    found: list[tuple[int, ...]], density: float, floor: float
) -> None:
    shapes = {str(i): shape for i, shape in enumerate(found)}
    sizes = {key: math.prod(shape) for key, shape in shapes.items()}
    least = {key: least_kept(size, floor) for key, size in sizes.items()}
    wanted = round(density * sum(sizes.values()))
    counts = erk_counts(shapes, wanted, least)
    assert sum(counts.values()) == max(wanted, sum(least.values()))
    assert all(least[key] <= counts[key] <= sizes[key] for key in shapes)


@st.composite
def grouped(draw: st.DrawFn) -> tuple[dict[str, Ranked], float]:
    ranked = {}
    for name in "abc"[: draw(st.integers(1, 3))]:
        groups, size = draw(st.integers(1, 6)), draw(st.integers(1, 4))
        scores = draw(st.lists(st.integers(0, 9), min_size=groups, max_size=groups))
        floor = draw(st.sampled_from([0.0, 0.3, 0.6]))
        shape = (groups, size)
        ranked[name] = Ranked(torch.tensor(scores, dtype=torch.float32), shape, least_kept(groups * size, floor))
    return ranked, draw(st.floats(0, 1))


@settings(max_examples=300, deadline=None)
@given(grouped(), st.sampled_from(SCOPES))
def test_groups_stay_within_amount_and_floors(drawn: tuple[dict[str, Ranked], float], scope: str) -> None:
    ranked, amount = drawn
    masks = allocate(ranked, amount, scope)
    assert {key: mask.shape for key, mask in masks.items()} == {key: r.scores.shape for key, r in ranked.items()}
    pruned = {key: int((mask == 0).sum()) * ranked[key].size for key, mask in masks.items()}
    total = sum(item.numel for item in ranked.values())
    single_weights = all(item.size == 1 for item in ranked.values())
    assert (
        sum(pruned.values()) <= (amount * total + (0.5 * len(ranked) if single_weights else 1e-5)) or scope == "layer"
    )
    for key, item in ranked.items():
        assert item.numel - pruned[key] >= item.least
        scores, mask = item.scores, masks[key]
        low, high = scores[mask == 0], scores[mask != 0]
        assert not len(low) or not len(high) or low.max() <= high.min()
        if scope == "layer" and item.size > 1:
            assert pruned[key] <= amount * item.numel + 1e-5
            assert pruned[key] + item.size > amount * item.numel - 1e-5 or len(low) == item.room


@settings(max_examples=200, deadline=None)
@given(grouped())
def test_global_groups_are_the_longest_run_of_lowest_scores(drawn: tuple[dict[str, Ranked], float]) -> None:
    ranked, amount = drawn
    if all(item.size == 1 for item in ranked.values()):
        return
    everything = []
    for order, (key, item) in enumerate(ranked.items()):
        rows = sorted((float(score), order, place, key, item.size) for place, score in enumerate(item.scores))
        everything += rows[: item.room]
    expected: dict[str, list[int]] = {key: [] for key in ranked}
    used, budget = 0, round(amount * sum(item.numel for item in ranked.values()), 6)
    for _, _, place, key, size in sorted(everything):
        used += size
        if used > budget:
            break
        expected[key].append(place)
    assert gone(allocate(ranked, amount, "global")) == {key: sorted(found) for key, found in expected.items()}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("amount", [0.0, 0.123, 0.5, 0.9, 0.99])
def test_single_weights_are_counted_exactly(scope: str, amount: float) -> None:
    generator = torch.Generator().manual_seed(0)
    values = {key: torch.randn(shape, generator=generator) for key, shape in RESNET.items()}
    masks = choose_masks(values, amount, scope, 0.001)
    pruned = {key: int((mask == 0).sum()) for key, mask in masks.items()}
    if scope == "layer":
        assert pruned == {key: round(amount * value.numel()) for key, value in values.items()}
    else:
        assert sum(pruned.values()) == round(amount * sum(value.numel() for value in values.values()))
    for key, value in values.items():
        low, high = value.abs()[masks[key] == 0], value.abs()[masks[key] != 0]
        assert not low.numel() or low.max() <= high.min()


@pytest.mark.parametrize("scope", SCOPES)
def test_what_is_gone_stays_gone_when_more_goes(scope: str) -> None:
    generator = torch.Generator().manual_seed(1)
    scores = {key: torch.randn(shape, generator=generator).abs() for key, shape in RESNET.items()}
    least = dict.fromkeys(RESNET, 1)
    before = allocate({k: Ranked(s, tuple(s.shape), least[k]) for k, s in scores.items()}, 0.4, scope)
    fresh = {
        k: torch.rand(s.shape, generator=generator).masked_fill(before[k] == 0, -math.inf) for k, s in scores.items()
    }
    after = allocate({k: Ranked(s, tuple(s.shape), least[k]) for k, s in fresh.items()}, 0.6, scope)
    assert all(bool((after[key][before[key] == 0] == 0).all()) for key in RESNET)


@pytest.mark.parametrize("scope", SCOPES)
def test_scores_that_are_no_numbers(scope: str) -> None:
    with pytest.raises(CompressionError, match="NaN"):
        allocate({"a": Ranked(torch.tensor([[math.nan, 1.0], [2.0, 3.0]]), (4, 2), 1)}, 0.5, scope)


def test_unknown_scope() -> None:
    with pytest.raises(ConfigurationError, match=r"`scope` is 'lampp': did you mean 'lamp'"):
        allocate(FOUR, 0.5, "lampp")
