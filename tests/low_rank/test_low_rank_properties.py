"""What holds for all shapes: full rank is exact, costs are counts, and dense and back is the same."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_compress.core.cost import count_macs
from lightning_compress.low_rank.decompose import METHODS, cost, factorize, full_ranks, usable_ranks, why_not

CONVS = {(1, False): nn.Conv1d, (2, False): nn.Conv2d, (3, False): nn.Conv3d}
CONVS |= {(1, True): nn.ConvTranspose1d, (2, True): nn.ConvTranspose2d, (3, True): nn.ConvTranspose3d}
QUIET = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


@st.composite
def layers(draw: Any) -> nn.Module:
    torch.manual_seed(draw(st.integers(0, 1000)))
    if draw(st.integers(0, 4)) == 0:
        return nn.Linear(draw(st.integers(1, 24)), draw(st.integers(1, 24)), bias=draw(st.booleans()))
    axes, transposed = draw(st.integers(1, 3)), draw(st.booleans())
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    each = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(axes))  # noqa: E731
    more: dict[str, Any] = {"stride": each(1, 2), "padding": each(0, 2), "dilation": each(1, 2)}
    if not transposed:
        more["padding_mode"] = draw(st.sampled_from(["zeros", "replicate"]))
    into, out = draw(st.integers(1, 4)) * groups, draw(st.integers(1, 4)) * groups
    return CONVS[axes, transposed](into, out, each(1, 4), groups=groups, bias=draw(st.booleans()), **more).eval()


def size_of(layer: nn.Module) -> tuple[int, ...]:
    return () if isinstance(layer, nn.Linear) else (11, 9, 10)[: len(layer.kernel_size)]


def inputs(layer: nn.Module) -> torch.Tensor:
    width = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    return torch.randn(2, width, *size_of(layer), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", METHODS)
@QUIET
@given(layer=layers())
def test_full_rank_is_exact_and_multiplies_out(method: str, layer: nn.Module) -> None:
    if why_not(layer, method):
        return
    found, x = factorize(layer, method, full_ranks(layer, method)), inputs(layer)
    assert found.error < 1e-5
    with torch.no_grad():
        torch.testing.assert_close(found.module(x), layer(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.module.to_dense()(x), layer(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@QUIET
@given(layer=layers(), share=st.floats(0.05, 1.0))
def test_costs_are_counts_and_factors_are_the_dense_product(method: str, layer: nn.Module, share: float) -> None:
    if why_not(layer, method):
        return
    full, groups = full_ranks(layer, method), getattr(layer, "groups", 1)
    ranks = usable_ranks(layer, method, [int(rank * share) for rank in full])
    assert all(1 <= rank <= most and rank % groups == 0 for rank, most in zip(ranks, full, strict=True))
    found = factorize(layer, method, ranks, steps=5)
    expected = cost(layer, method, ranks, size_of(layer))
    assert sum(p.numel() for p in found.module.parameters()) == expected.parameters
    x = inputs(layer)
    assert count_macs(found.module, x[:1]).total == expected.macs
    assert 0 <= found.error <= 1 + 1e-6
    with torch.no_grad():
        torch.testing.assert_close(found.module.to_dense()(x), found.module(x), atol=1e-4, rtol=1e-4)
        off = found.module.to_dense().weight - layer.weight
        assert found.error == pytest.approx(float(off.norm() / layer.weight.norm()), abs=2e-6)
