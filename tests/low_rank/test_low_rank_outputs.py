"""Factors that keep outputs instead of weights (activation-aware), from the moments up to the callback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_compress import ConfigurationError, LowRank, compress, journal_of
from lightning_compress.core.patches import layer_patches
from lightning_compress.low_rank.decompose import factorize, full_ranks, second_moment
from lightning_compress.low_rank.errors import error_profile
from lightning_compress.low_rank.moments import RowMoment, Seeing, SquareMoment


def uneven(*size: int, seed: int = 0) -> Tensor:
    """Return inputs of which some channels matter far more than others, and that lie to one side, as activations do."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -1.5, size[1])[torch.randperm(size[1], generator=generator)]
    return (torch.randn(size, generator=generator) + 0.5).relu() * scale.reshape(1, -1, *(1,) * (len(size) - 2))


LAYERS: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(20, 12), "svd", (400, 20)),
    "tall": (lambda: nn.Linear(12, 30), "svd", (400, 12)),
    "few samples": (lambda: nn.Linear(120, 16), "svd", (40, 120)),
    "few samples, tall": (lambda: nn.Linear(60, 90), "svd", (40, 60)),
    "pointwise": (lambda: nn.Conv2d(16, 10, 1, groups=2), "svd", (6, 16, 5, 5)),
    "channels": (lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1), "channel_svd", (6, 8, 9, 9)),
    "conv1d": (lambda: nn.Conv1d(8, 12, 5, padding="same"), "channel_svd", (6, 8, 20)),
    "spatial": (lambda: nn.Conv2d(8, 12, 3, padding=1), "spatial_svd", (6, 8, 9, 9)),
    "spatial, wide": (lambda: nn.Conv2d(12, 8, (3, 5), groups=2, dilation=(1, 2)), "spatial_svd", (6, 12, 12, 12)),
    "spatial, 3d": (lambda: nn.Conv3d(6, 8, (2, 3, 2)), "spatial_svd", (4, 6, 5, 5, 5)),
}


def built(name: str) -> tuple[nn.Module, str, Tensor]:
    build, method, size = LAYERS[name]
    torch.manual_seed(1)
    return build().requires_grad_(False), method, uneven(*size)


def lost(layer: nn.Module, other: nn.Module, x: Tensor) -> float:
    """Return the relative error of outputs, without the bias."""
    bias = layer.bias if layer(x).dim() == 2 else layer.bias.reshape(-1, *(1,) * (x.dim() - 2))
    return float((other(x) - layer(x)).double().norm() / (layer(x) - bias).double().norm())


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("share", [0.15, 0.5, 1.0])
def test_no_more_of_the_outputs_is_lost_than_by_the_plain_svd(name: str, share: float) -> None:
    layer, method, x = built(name)
    (full,) = full_ranks(layer, method)
    groups, seeing = getattr(layer, "groups", 1), Seeing()
    seeing.add(layer_patches(layer, x))
    rank = max(1, round(share * full / groups)) * groups
    plain, aware = factorize(layer, method, [rank]), factorize(layer, method, [rank], moment=seeing.moments())
    assert aware.output_error == pytest.approx(lost(layer, aware.module, x), abs=1e-4)
    assert plain.error <= aware.error + 1e-6
    if share == 1:
        assert aware.error < 1e-5
    else:
        assert aware.output_error <= lost(layer, plain.module, x) * (1 + 1e-5)
    if share == 0.15:
        assert aware.output_error < 0.97 * lost(layer, plain.module, x)


@pytest.mark.parametrize("name", ["linear", "channels", "spatial"])
def test_the_callback_keeps_outputs_on_request(name: str) -> None:
    layer, method, x = built(name)
    seeing = Seeing()
    seeing.add(layer_patches(layer, x))
    how = {"method": method, "rank": 4, "keep": "outputs"}
    done = compress(nn.Sequential(layer), LowRank(factors=how, batches=[x]), example_inputs=x)
    expected = factorize(layer, method, [4], moment=seeing.moments()).module
    for one, other in zip(done[0].parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["linear", "tall", "few samples", "few samples, tall"])
def test_linear_layers_reach_the_optimum_for_outputs(name: str) -> None:
    layer, _, x = built(name)
    values = np.linalg.svd((x.double() @ layer.weight.double().t()).numpy(), compute_uv=False)
    done = compress(nn.Sequential(layer), LowRank(factors={"rank": 4, "keep": "outputs"}, batches=x), example_inputs=x)
    best = float(np.sqrt((values[4:] ** 2).sum() / (values**2).sum()))
    assert lost(layer, done[0], x) == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("name", ["linear", "tall", "few samples", "pointwise", "channels"])
def test_the_error_of_every_rank_is_known_beforehand(name: str) -> None:
    layer, method, x = built(name)
    seeing = Seeing()
    seeing.add(layer_patches(layer, x))
    ranks, errors, _ = error_profile(layer, method, moments=seeing.moments())
    for rank, error in list(zip(ranks, errors, strict=True))[::3]:
        module = factorize(layer, method, rank, moment=seeing.moments()).module
        assert lost(layer, module, x) ** 2 == pytest.approx(float(error), abs=1e-4)


@pytest.mark.parametrize("shape", [(7, 30), (25, 30), (30, 30)])
def test_few_rows_and_their_moment_are_the_same(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(shape, generator=generator) * torch.logspace(1, -2, 30)
    matrix = torch.randn(5, 30, generator=generator)
    few, square = RowMoment(rows), SquareMoment(rows.double().t() @ rows.double())
    for one in (few, square):
        torch.testing.assert_close(one.unwhiten(one.whiten(matrix)), matrix.double(), atol=1e-6, rtol=1e-6)
        assert one.energy(matrix) == pytest.approx(float((rows @ matrix.t()).double().square().sum()), rel=1e-5)
    for first, second in [(few.whiten(matrix), square.whiten(matrix))]:
        torch.testing.assert_close(first @ first.t(), second @ second.t(), atol=1e-6, rtol=1e-6)


def test_moments_of_batches_add_up() -> None:
    layer = nn.Conv2d(4, 6, 3, groups=2)
    batches = [uneven(2, 4, 6, 6, seed=seed) for seed in range(3)]
    seeing = Seeing()
    for batch in batches:
        seeing.add(layer_patches(layer, batch))
    assert seeing.rows is None
    expected = sum(second_moment(layer, batch) for batch in batches)
    torch.testing.assert_close(seeing.square, expected, atol=1e-5, rtol=1e-5)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2),
        nn.ReLU(),
        nn.ConvTranspose2d(24, 8, 2, stride=2),
        nn.Flatten(),
        nn.Linear(8 * 100, 40),
        nn.ReLU(),
        nn.Linear(40, 10),
    )


@pytest.mark.parametrize("rate", [2.0, 5.0])
def test_whole_models_keep_their_outputs_better(rate: float) -> None:
    x, model = uneven(32, 3, 12, 12), net()
    whole = model(x)
    off = {}
    for keep in ("weights", "outputs"):
        method = LowRank(rate, factors={"keep": keep, "favor": "accuracy"}, batches=[x[:16], x[16:]])
        done = compress(model, method, example_inputs=x[:1])
        assert sum(p.numel() for p in done.parameters()) <= sum(p.numel() for p in model.parameters()) / rate
        off[keep] = float(((done(x) - whole).norm() / whole.norm()).detach())
        assert "of outputs" in method.plan_text
    assert off["outputs"] < off["weights"]


def test_tables_and_transposed_convolutions_stay_with_the_weights() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.up, self.head = nn.Embedding(40, 16), nn.ConvTranspose1d(16, 12, 3), nn.Linear(12, 10)

        def forward(self, words: Tensor) -> Tensor:
            seen = self.up(self.table(words).transpose(1, 2))
            out: Tensor = self.head(seen.transpose(1, 2))
            return out

    torch.manual_seed(0)
    words, model = torch.randint(40, (8, 6)), Words()
    done = {
        keep: compress(model, LowRank(factors={"rank": 4, "keep": keep}, batches=[words]), example_inputs=words)
        for keep in ("weights", "outputs")
    }
    for path in ("table", "up"):
        for one, other in zip(*(done[k].get_submodule(path).parameters() for k in done), strict=True):
            assert torch.equal(one, other)
    assert not torch.equal(done["weights"].head.factors[0].weight, done["outputs"].head.factors[0].weight)


def test_factors_that_keep_outputs_are_alike_every_time_and_in_half_precision() -> None:
    x, model = uneven(16, 3, 12, 12), net()
    method = LowRank(3.0, factors={"keep": "outputs"}, batches=[x])
    first, second = compress(model, method, example_inputs=x), compress(model, method, example_inputs=x)
    assert all(torch.equal(one, other) for one, other in zip(first.parameters(), second.parameters(), strict=True))
    half = compress(
        net().bfloat16(), LowRank(3.0, factors={"keep": "outputs"}, batches=[x.bfloat16()]), example_inputs=x.bfloat16()
    )
    assert all(p.dtype == torch.bfloat16 and bool(p.isfinite().all()) for p in half.parameters())
    assert {edit.path for edit in journal_of(half)} == {edit.path for edit in journal_of(first)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"factors": {"rank": 4, "keep": "outputs"}}, "give calibration `batches` too"),
        ({"factors": {"rank": 4, "keep": "output"}}, "`keep` is 'output'.*did you mean 'outputs'"),
    ],
)
def test_bad_arguments_are_one_clear_error(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        LowRank(**arguments)
