"""Scores, by hand on four weights and against numpy, and their table."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.pruning import scores
from lightning_compress.pruning.allocation import SCOPES
from lightning_compress.pruning.granularity import Granularity, Layout, group_scores, layout_of, parse_granularity
from lightning_compress.pruning.scores import SCORES, Score, check_score, find_score
from lightning_compress.pruning.second_order import obd_saliency

W = torch.tensor([1.0, -3.0, 2.0, -0.5])
G = torch.tensor([2.0, 0.5, 0.0, 4.0])


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (scores.magnitude(W), [1.0, 3.0, 2.0, 0.5]),
        (scores.gradient(W, G), [2.0, 1.5, 0.0, 2.0]),
        (scores.movement(W, G), [-2.0, 1.5, 0.0, 2.0]),
        (scores.snip(scores.gradient(W, G), 5.5), [2 / 5.5, 1.5 / 5.5, 0.0, 2 / 5.5]),
        (obd_saliency(W, G), [1.0, 2.25, 0.0, 0.5]),
        (scores.bn_scale(W, Layout()).flatten(), [1.0, 3.0, 2.0, 0.5]),
    ],
    ids=["magnitude", "gradient", "movement", "snip", "obd", "bn_scale"],
)
def test_four_weights(found: torch.Tensor, expected: list[float]) -> None:
    assert found.tolist() == pytest.approx(expected, abs=1e-7)


def test_movement_is_positive_when_a_step_leads_away_from_zero() -> None:
    after = W - 0.1 * G
    away = after.abs() > W.abs()
    assert torch.equal(scores.movement(W, G) > 0, away)


def test_norms_of_four_filters() -> None:
    weight = torch.tensor([[3.0, -4.0], [1.0, 1.0], [0.0, -2.0], [5.0, 0.0]])
    rows, layout = Granularity("filter"), Layout()
    by = {name: group_scores(scores.magnitude(weight), rows, layout, SCORES[name].how) for name in SCORES}
    assert by["l1_norm"].flatten().tolist() == [7.0, 2.0, 2.0, 5.0]
    assert by["l2_norm"].flatten().tolist() == pytest.approx([5.0, 2**0.5, 2.0, 5.0])
    assert by["magnitude"].flatten().tolist() == [3.5, 1.0, 1.0, 2.5]


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(5, 3), nn.Conv2d(4, 6, (3, 2), groups=2), nn.ConvTranspose1d(4, 6, 3, groups=2), nn.Conv3d(2, 3, 2)],
    ids=lambda layer: type(layer).__name__,
)
def test_wanda_equals_the_sum_of_squares_that_an_input_adds(layer: Any) -> None:
    """With one input channel of constant size c, |w| c is what each product contributes."""
    layout = layout_of(layer)
    inputs = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    norms = torch.arange(1.0, inputs + 1)
    found = scores.wanda(layer.weight, norms, layout).numpy()
    weight = layer.weight.detach().numpy()
    for index in np.ndindex(weight.shape):
        if layout.transposed:
            channel = index[0]
        else:
            channel = index[0] // (weight.shape[0] // layout.groups) * weight.shape[1] + index[1]
        assert found[index] == pytest.approx(abs(weight[index]) * float(norms[channel]))


@pytest.mark.parametrize("kind", ["filter", "channel"])
@pytest.mark.parametrize(
    "layer", [nn.Linear(5, 30), nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 3, groups=2)]
)
def test_geometric_median_against_numpy(layer: Any, kind: str) -> None:
    layout = layout_of(layer)
    found = scores.geometric_median(layer.weight, Granularity(kind), layout).flatten().numpy()
    weight = layer.weight.detach().double().numpy()
    groups = layout.groups
    parts = np.split(weight, groups)  # outputs first, or inputs first if transposed
    if (kind == "filter") == layout.transposed:
        parts = [np.swapaxes(part, 0, 1) for part in parts]
    points = np.concatenate([part.reshape(part.shape[0], -1) for part in parts])
    expected = [sum(np.linalg.norm(a - b) for b in points) for a in points]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_filter_in_the_middle_of_the_others_is_the_least() -> None:
    weight = torch.tensor([[10.0, 10.0], [9.0, 10.0], [10.0, 9.0], [9.7, 9.7]])
    found = scores.geometric_median(weight, Granularity("filter"), Layout())
    assert int(found.argmin()) == 3
    assert int(scores.magnitude(weight).sum(1).argmin()) != 3


def test_random_depends_on_seed_step_and_name_only() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = scores.random(torch.ones(3, 4), 5, 2, "a")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(first, scores.random(torch.zeros(3, 4, dtype=torch.bfloat16), 5, 2, "a"))
    others = [scores.random(torch.ones(3, 4), *arguments) for arguments in ((6, 2, "a"), (5, 3, "a"), (5, 2, "b"))]
    assert not any(torch.equal(first, other) for other in others)
    many = scores.random(torch.ones(10_000), 0, 0, "x")
    assert float(many.mean()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_are_float32(dtype: torch.dtype) -> None:
    weight, grad = W.to(dtype), (G * 1e4).to(dtype)
    for found in (scores.magnitude(weight), scores.gradient(weight * 100, grad), obd_saliency(weight.float(), G)):
        assert found.dtype == torch.float32
        assert found.isfinite().all()


def test_snip_of_nothing_is_zero() -> None:
    assert scores.snip(torch.zeros(2), 0.0).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("magnitud", "did you mean 'magnitude'"),
        ("l1", "`score` is 'l1'"),
        (None, "`score` is None"),
        ("wandas", "'wanda'"),
    ],
)
def test_unknown_scores(name: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        find_score(name)


def test_which_combinations_mean_something() -> None:
    words = ("element", "row", "column", "kernel", "filter", "channel", "block:2x2", "2:4")
    refused: dict[str, set[str]] = {}
    for name, score in SCORES.items():
        for word in words:
            for scope in SCOPES:
                try:
                    check_score(score, parse_granularity(word), scope)
                except ConfigurationError as error:
                    refused.setdefault(name, set()).add(word if "granularity" in str(error) else scope)
    assert refused == {
        "bn_scale": {"element", "column", "kernel", "channel", "block:2x2", "2:4"},
        "geometric_median": {"element", "column", "kernel", "block:2x2", "2:4"},
        "movement": {"lamp"},
    }


def test_the_table_is_named_as_its_keys() -> None:
    assert all(score.name == name and isinstance(score, Score) for name, score in SCORES.items())
    assert len(SCORES) == 11
