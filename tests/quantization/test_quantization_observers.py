"""Observers against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_compress.quantization import QuantizerSpec
from lightning_compress.quantization.histogram import (
    BINS,
    centers,
    histogram,
    rebin,
    rebin_unseen,
    widened,
    widened_unseen,
)
from lightning_compress.quantization.observers import build_observer, collect
from lightning_compress.quantization.weight_ranges import weight_range


def batches(count: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(500, generator=generator) * (1 + step) + 0.5 for step in range(count)]


def observed(name: str, **spec: object):
    observer = build_observer(QuantizerSpec(range=name, **spec))
    for x in batches():
        observer.observe(x[:200])
        observer.observe(x[200:])
        collect([observer])
    return observer


def test_minmax() -> None:
    everything = torch.cat(batches()).numpy()
    low, high = observed("minmax").range()
    assert (float(low), float(high)) == (everything.min(), everything.max())


def test_moving_average_begins_with_the_first_step() -> None:
    low, high = batches()[0].numpy().min(), batches()[0].numpy().max()
    for x in batches()[1:]:
        low += 0.1 * (x.numpy().min() - low)
        high += 0.1 * (x.numpy().max() - high)
    seen = observed("moving_average", momentum=0.1).range()
    assert np.allclose([float(v) for v in seen], [low, high], rtol=1e-6)


def test_percentile_to_the_width_of_a_bin() -> None:
    ordered = np.sort(torch.cat(batches()).numpy())  # 3000 values, of which 30 lie outside on either side
    observer = observed("percentile", percentile=99.0)
    low, high = (float(v) for v in observer.range())
    width = 2 * 2.0 ** int(observer.exponent) / BINS
    assert abs(low - ordered[30]) <= width
    assert abs(high - ordered[-31]) <= width


def test_least_squared_error_beats_the_full_range_and_matches_brute_force() -> None:
    x = torch.cat([torch.randn(20000), torch.tensor([30.0])])
    observer = build_observer(QuantizerSpec(bits=4, symmetric=True, range="mse"))
    observer.observe(x)
    collect([observer])
    best = float(torch.maximum(-observer.range()[0], observer.range()[1]))

    def error(peak: float) -> float:
        s = peak / 7
        return float(((torch.round(x / s).clamp(-7, 7) * s - x) ** 2).sum())

    tried = {share: error(30.0 * share / 64) for share in range(1, 65)}
    assert best == pytest.approx(30.0 * min(tried, key=tried.get) / 64)
    assert error(best) < error(30.0) / 3


def test_histogram_widens_exactly() -> None:
    x = (torch.randint(-3000, 3000, (10000,)) + 0.5) * 16.0 / BINS  # the middle of bins, far from where floats round
    assert torch.equal(rebin(histogram(x, 3), 2), histogram(x, 5))
    assert torch.equal(rebin(histogram(x, 3), 0), histogram(x, 3))
    assert rebin(histogram(x, 3), 40).nonzero().flatten().tolist() == [BINS // 2 - 1, BINS // 2]
    assert float(centers(8.0, x)[0]) == -8 + 8 / BINS


@pytest.mark.parametrize("power", [-20, -1, 0, 3, 100])
def test_an_accelerator_counts_the_same_without_knowing_the_range(power: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5000, generator=generator) * 2.0**power
    for peak in (x.abs().amax(), torch.tensor(2.0**power), torch.tensor(float("inf")), torch.tensor(0.0)):
        exponent, valid = widened_unseen(torch.tensor(-126), peak)
        assert (int(exponent), bool(valid)) == widened(torch.tensor(-126), peak)
    exponent, _ = widened_unseen(torch.tensor(-126), x.abs().amax())
    assert 2.0 ** (int(exponent) - 1) < float(x.abs().max()) <= 2.0 ** int(exponent)
    counts = histogram(x, int(exponent))
    assert torch.equal(histogram(x, exponent), counts)
    for doublings in (-3, 0, 1, 5, 12, 13, 200):
        assert torch.equal(rebin_unseen(counts, torch.tensor(doublings)), rebin(counts, doublings))


@pytest.mark.parametrize("name", ["minmax", "moving_average", "percentile", "mse", "lsq"])
def test_no_step_waits_for_a_value_of_an_accelerator(name: str) -> None:
    observer = build_observer(QuantizerSpec(symmetric=True, range=name)).to("meta")  # whose values cannot be read
    observer.ready = True  # once it is, after the first step
    for dtype in (torch.float32, torch.bfloat16):
        observer.observe(torch.zeros(2, 3, dtype=dtype, device="meta"))
    collect([observer])
    with pytest.raises(RuntimeError, match="meta"):
        bool(observer.low > 0)


def test_infinities_and_empty_batches_do_not_move_a_range() -> None:
    for name in ("minmax", "moving_average", "percentile", "mse"):
        observer = observed(name)
        before = [float(v) for v in observer.range()]
        for bad in (torch.tensor([float("inf")]), torch.tensor([float("nan"), 1.0]), torch.empty(0)):
            observer.observe(bad)
            collect([observer])
        assert [float(v) for v in observer.range()] == before


def test_nothing_seen_is_not_ready() -> None:
    observer = build_observer(QuantizerSpec())
    collect([observer])
    assert not observer.ready


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_ranges_of_weights(axis: int | None) -> None:
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    rows = weight.reshape(1, -1) if axis is None else weight.movedim(axis, 0).flatten(1)
    spec = QuantizerSpec(8, symmetric=True, range="percentile", percentile=90.0)
    expected = np.abs(np.percentile(rows.numpy(), [10, 90], axis=1)).max(0) / 127
    assert np.allclose(weight_range(weight, spec, axis)[0].numpy(), expected if axis is not None else expected[0])

    spec = QuantizerSpec(3, symmetric=True, range="mse")
    scale = weight_range(weight, spec, axis)[0].reshape(-1, 1)
    full = rows.abs().amax(1, keepdim=True) / 3
    error = lambda s: ((torch.round(rows / s).clamp(-3, 3) * s - rows) ** 2).sum(1)  # noqa: E731
    assert (error(scale) <= error(full) + 1e-6).all()
    assert error(scale).sum() < error(full).sum()

    spec = QuantizerSpec(8, symmetric=False, range="minmax")
    scale, zero = weight_range(weight, spec, axis)
    reach = rows.amax(1).clamp_min(0) - rows.amin(1).clamp_max(0)
    assert np.allclose(scale.reshape(-1).numpy(), reach.numpy() / 255)
    assert zero.dtype is torch.int32
