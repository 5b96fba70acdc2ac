"""Large matrices by projection, float32 Gram matrices, half precision, memory layouts, and training of factors."""

import pytest
import torch
from torch import nn

from lightning_compress.low_rank import matrix
from lightning_compress.low_rank.decompose import METHODS, factorize, full_ranks, usable_ranks, why_not
from lightning_compress.low_rank.matrix import energy, gram, leading_vectors, split_matrix
from lightning_compress.low_rank.tensor import tucker2


def test_random_projection_comes_near_the_optimum_without_touching_random_states(monkeypatch) -> None:
    monkeypatch.setattr(matrix, "_EXACT_UP_TO", 100)
    given = torch.randn(400, 600, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(given)
    before = torch.random.get_rng_state()
    for rank in (4, 20, 50):
        left = leading_vectors(given, rank)
        torch.testing.assert_close(left.t() @ left, torch.eye(rank), atol=1e-5, rtol=0)
        error = float((given - left @ (left.t() @ given)).norm())
        assert error <= 1.005 * float(values[rank:].norm())
        assert torch.equal(leading_vectors(given, rank), left)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_projection_finds_a_low_rank_exactly(monkeypatch) -> None:
    monkeypatch.setattr(matrix, "_EXACT_UP_TO", 100)
    generator = torch.Generator().manual_seed(1)
    given = torch.randn(300, 12, generator=generator) @ torch.randn(12, 500, generator=generator)
    left, right = split_matrix(given, 12)
    torch.testing.assert_close(left @ right, given, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(120, 150), (150, 120)])
def test_gram_matrices_in_float32_stay_exact_at_full_rank(monkeypatch, shape: tuple[int, int]) -> None:
    monkeypatch.setattr(matrix, "_EXACT_UP_TO", 0)
    given = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    left, right = split_matrix(given, 120)
    torch.testing.assert_close(left @ right, given, atol=1e-5, rtol=1e-5)
    left, right = split_matrix(given, 60)
    best = float(torch.linalg.svdvals(given)[60:].norm())
    assert float((left @ right - given).norm()) == pytest.approx(best, rel=1e-4)


def test_energies_are_summed_in_pieces(monkeypatch) -> None:
    monkeypatch.setattr(matrix, "_PIECE", 7)
    given = torch.randn(5, 9).t()
    assert energy(given) == pytest.approx(float(given.double().square().sum()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision(method: str, dtype: torch.dtype) -> None:
    layer = nn.Linear(24, 36) if why_not(nn.Conv2d(8, 12, 3), method) else nn.Conv2d(8, 12, 3)
    layer = layer.to(dtype)
    ranks = usable_ranks(layer, method, [rank // 2 for rank in full_ranks(layer, method)])
    found = factorize(layer, method, ranks)
    wide = factorize(layer.float(), method, ranks)
    assert found.error == pytest.approx(wide.error, rel=1e-3)
    assert all(p.dtype == dtype and bool(p.isfinite().all()) for p in found.module.parameters() if p.dim() > 1)


def test_channels_last_stays() -> None:
    layer = nn.Conv2d(8, 12, 3).to(memory_format=torch.channels_last)
    for method in ("spatial_svd", "channel_svd", "tucker"):
        for part in factorize(layer, method, [2] * len(full_ranks(layer, method))).module.layers():
            assert part.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("method", METHODS)
def test_factors_train(method: str) -> None:
    torch.manual_seed(0)
    linear = bool(why_not(nn.Conv2d(6, 8, 3), method))
    layer, x = (nn.Linear(12, 8), torch.randn(64, 12)) if linear else (nn.Conv2d(6, 8, 3), torch.randn(8, 6, 7, 7))
    target = layer(x).detach()
    ranks = usable_ranks(layer, method, [max(1, rank // 3) for rank in full_ranks(layer, method)])
    module = factorize(layer, method, ranks).module
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (module(x) - target).square().mean()
        loss.backward()
        assert all(p.grad is not None for p in module.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_a_parameter_is_detached_and_the_layer_stays() -> None:
    layer = nn.Conv2d(6, 8, 3)
    before = layer.weight.detach().clone()
    found = factorize(layer, "cp", [5])
    assert torch.equal(layer.weight, before)
    assert all(p.is_leaf and p.requires_grad for p in found.module.parameters())


def test_wide_kernels_of_a_low_tucker_rank_are_recovered_although_float32_is_tried_first() -> None:
    generator = torch.Generator().manual_seed(0)
    sides = [torch.linalg.qr(torch.randn(size, rank, generator=generator)).Q for size, rank in ((224, 20), (208, 12))]
    core = torch.randn(20, 12, 9, generator=generator) * torch.logspace(0, -3, 20)[:, None, None]
    weight = torch.einsum("or,rip,ci->ocp", sides[0], core, sides[1])
    into, small, out = tucker2(weight, (12, 20))
    found = torch.einsum("oij,no,ci->ncj", small, out, into)
    assert float((found - weight).norm() / weight.norm()) < 2e-6


def test_wide_kernels_are_exact_at_full_rank() -> None:
    layer = nn.Conv2d(200, 208, 3)
    for method in ("tucker", "spatial_svd", "channel_svd"):
        assert factorize(layer, method, full_ranks(layer, method)).error < 1e-5


def test_wide_kernels_lose_no_more_than_by_projections_in_float64() -> None:
    weight = torch.randn(240, 200, 9, generator=torch.Generator().manual_seed(0))
    into, small, out = tucker2(weight, (100, 120))
    exact = tucker2(weight.double(), (100, 120))
    energies = [float(core.double().square().sum()) for core in (small, exact[1])]
    assert energies[0] == pytest.approx(energies[1], rel=1e-5)
    torch.testing.assert_close(out.t() @ out, torch.eye(120), atol=1e-5, rtol=0)
    torch.testing.assert_close(into.t() @ into, torch.eye(100), atol=1e-5, rtol=0)


def test_large_gram_matrices_are_built_in_blocks(monkeypatch) -> None:
    given = torch.randn(100, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    monkeypatch.setattr(matrix, "_BLOCK", 32)
    torch.testing.assert_close(gram(given).tril(), (given @ given.t()).tril())
    assert int(gram(given).triu(32).count_nonzero()) == 0
    torch.testing.assert_close(
        matrix.singular_values(given.t()[:, :90]), torch.linalg.svdvals(given.t()[:, :90]), atol=1e-6, rtol=1e-6
    )
