"""Variational Bayes ranks, against the free energy of the paper minimized by brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lightning_compress import ConfigurationError
from lightning_compress.low_rank.choice import evbmf_ranks
from lightning_compress.low_rank.evbmf import critical_value, evbmf


def component(gamma: float, least: int, most: int, noise: float) -> float:
    """Return twice the free energy of one component (Nakajima et al. 2013, eq. 17), minimized by coordinate descent.

    Means a, b, variances of both factors, and prior variances learned from the data; 0 is the component left out.
    """
    best = 0.0
    for start in (0.3, 1.0, 2.0):
        a = b = math.sqrt(gamma) * start
        prior_a = prior_b = 1.0
        var_a = var_b = 1.0
        value = math.inf
        for _ in range(2000):
            before = value
            var_a = noise / (b * b + least * var_b + noise / prior_a)
            a = var_a / noise * gamma * b
            var_b = noise / (a * a + most * var_a + noise / prior_b)
            b = var_b / noise * gamma * a
            prior_a, prior_b = a * a / most + var_a, b * b / least + var_b
            fit = -2 * a * b * gamma + (a * a + most * var_a) * (b * b + least * var_b)
            value = most * math.log(prior_a / var_a) + least * math.log(prior_b / var_b) + fit / noise
            if abs(before - value) < 1e-9:
                break
        best = min(best, value)
    return best


@pytest.mark.parametrize(("least", "most"), [(10, 10), (8, 20), (5, 60)])
def test_the_threshold_is_where_a_component_lowers_the_free_energy(least: int, most: int) -> None:
    threshold = math.sqrt(most * critical_value(least / most))
    assert component(1.03 * threshold, least, most, 1.0) < -1e-6
    assert component(0.97 * threshold, least, most, 1.0) == 0.0


@pytest.mark.parametrize("seed", range(2))
def test_noise_and_rank_minimize_the_whole_free_energy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    least, most, rank = 12, 30, 3
    matrix = 2 * rng.normal(size=(least, rank)) @ rng.normal(size=(rank, most)) + rng.normal(size=(least, most))
    values = np.linalg.svd(matrix, compute_uv=False)
    found = evbmf(torch.from_numpy(values), (least, most))

    def energy(noise: float) -> float:
        parts = sum(component(gamma, least, most, noise) for gamma in values)
        return least * most * math.log(2 * math.pi * noise) + (values**2).sum() / noise + parts

    grid = [found.variance * factor for factor in (0.8, 1.0, 1.25)]
    assert int(np.argmin([energy(noise) for noise in grid])) == 1
    assert found.rank == sum(component(gamma, least, most, found.variance) < 0 for gamma in values)


@pytest.mark.parametrize(("rank", "noise"), [(0, 1.0), (1, 0.1), (20, 1.0), (40, 0.5)])
@pytest.mark.parametrize("shape", [(200, 300), (300, 200)])
def test_the_rank_below_noise_is_recovered(rank: int, noise: float, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(rank)
    left = torch.randn(shape[0], rank, generator=generator)
    signal = left @ torch.randn(rank, shape[1], generator=generator)
    found = evbmf(torch.linalg.svdvals(signal + noise * torch.randn(shape, generator=generator)), shape)
    assert found.rank == rank
    assert found.variance == pytest.approx(noise**2, rel=0.05)


def test_without_noise_everything_counts() -> None:
    assert evbmf(torch.tensor([3.0, 2.0, 0.0, 0.0]), (4, 9)).rank == 2
    assert evbmf(torch.zeros(4), (4, 9)).rank == 0


def test_groups_take_the_largest_rank_of_any() -> None:
    conv = torch.nn.Conv2d(60, 40, 1, groups=2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        conv.weight.copy_(0.01 * torch.randn(conv.weight.shape, generator=generator))
        conv.weight[20:] += (torch.randn(20, 3, generator=generator) @ torch.randn(3, 30, generator=generator))[
            ..., None, None
        ]
    assert evbmf_ranks(conv) == (6,)


@pytest.mark.parametrize("values", [torch.ones(3), torch.tensor([1.0, math.nan, 0.0, 0.0])])
def test_other_numbers_are_refused(values: torch.Tensor) -> None:
    with pytest.raises(ConfigurationError, match="`singular_values` must be the 4 finite ones"):
        evbmf(values, (4, 9))
