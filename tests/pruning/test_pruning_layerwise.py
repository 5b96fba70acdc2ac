"""Layer-wise Optimal Brain Surgeon: inputs of layers against the layers themselves, removals against exact surgery."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_compress import ConfigurationError
from lightning_compress.core.hessians import layer_hessian
from lightning_compress.core.patches import layer_patches
from lightning_compress.pruning import obc_trace as obc_trace_module
from lightning_compress.pruning.granularity import from_units, layout_of, parse_granularity, to_units
from lightning_compress.pruning.layerwise import (
    counts_over_layers,
    damp,
    obc_masks,
    obc_prune,
    reconstruct,
    trace_layer,
)
from lightning_compress.pruning.obc_trace import Pattern, Trace, input_pattern, obc_trace
from lightning_compress.pruning.second_order import obs_prune_exact

LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (7, 6)),
    "linear_tokens": (lambda: nn.Linear(6, 4), (3, 5, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 11)),
    "conv2d": (lambda: nn.Conv2d(3, 5, (3, 2), padding=(2, 0), dilation=(2, 1)), (2, 3, 8, 7)),
    "conv2d_same": (lambda: nn.Conv2d(2, 3, (4, 3), padding="same", dilation=2), (2, 2, 9, 9)),
    "conv2d_valid": (lambda: nn.Conv2d(2, 3, 2, padding="valid"), (2, 2, 5, 5)),
    "conv2d_reflect": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 2, 5, 6)),
    "conv2d_circular": (lambda: nn.Conv2d(2, 3, 3, padding=(0, 1), padding_mode="circular"), (2, 2, 5, 6)),
    "grouped_dilated": (lambda: nn.Conv2d(6, 4, 3, stride=(1, 2), dilation=2, padding=1, groups=2), (2, 6, 9, 8)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (1, 2, 3), padding=(0, 1, 1), groups=2), (2, 2, 3, 4, 5)),
    "unbatched": (lambda: nn.Conv2d(2, 3, 3), (2, 6, 6)),
}
layers = pytest.mark.parametrize("name", LAYERS)


def made(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    build, shape = LAYERS[name]
    return build().double(), torch.randn(shape, dtype=torch.float64)


@layers
def test_patches_times_weights_are_the_outputs(name: str):
    layer, inputs = made(name)
    patches = layer_patches(layer, inputs)
    weight = layer.weight.flatten(1).view(len(patches), -1, patches.shape[2])
    found = torch.einsum("grd,god->rgo", patches, weight).flatten(1) + layer.bias
    wanted = layer(inputs)
    if not isinstance(layer, nn.Linear):
        wanted = (wanted if wanted.dim() == inputs.dim() and name != "unbatched" else wanted[None]).movedim(1, -1)
    assert torch.allclose(found, wanted.reshape(found.shape))


@layers
def test_the_quadratic_is_the_squared_error_of_the_outputs(name: str):
    layer, inputs = made(name)
    hessian = layer_hessian(layer, inputs)
    before = layer(inputs)
    steps = [torch.randn_like(parameter) for parameter in (layer.weight, layer.bias)]
    with torch.no_grad():
        layer.weight += steps[0]
        layer.bias += steps[1]
    flat = torch.cat([steps[0].flatten(1), steps[1][:, None]], 1).view(len(hessian), -1, hessian.shape[1])
    predicted = torch.einsum("god,gde,goe->", flat, hessian, flat) / 2
    assert predicted == pytest.approx(float((layer(inputs) - before).square().sum().detach()))


@layers
@pytest.mark.parametrize("scope", ["layer", "row"])
def test_pruned_layers_hit_the_amount_and_beat_plain_removal(name: str, scope: str):
    layer, inputs = made(name)
    before, dense = layer(inputs).detach(), layer.weight.detach().clone()
    weight, bias = obc_prune(layer.weight, layer.bias, layer_hessian(layer, inputs), 0.5, scope, damping=1e-8)
    assert int((weight == 0).sum()) == round(0.5 * weight.numel())
    zeros = (weight == 0).flatten(1).sum(1)
    assert scope == "layer" or int(zeros.max() - zeros.min()) <= 1

    def error(new: Tensor, shift: Tensor) -> float:
        with torch.no_grad():
            layer.weight.copy_(new)
            layer.bias.copy_(shift)
            return float((layer(inputs) - before).square().sum())

    old_bias = layer.bias.detach().clone()
    cut = dense.abs().flatten().sort().values[round(0.5 * dense.numel()) - 1]
    with_update, without = error(weight, bias), error(dense * (weight != 0), old_bias)
    assert with_update < without
    assert scope == "row" or with_update < error(dense * (dense.abs() > cut), old_bias)


def hessian_of(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(3 * size, size, generator=generator, dtype=torch.float64)
    inputs = inputs @ torch.randn(size, size, generator=generator, dtype=torch.float64)
    return damp(2 * inputs.T @ inputs, 0.01)


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 4), size=st.integers(1, 80), seed=st.integers(0, 10**6))
def test_traces_are_those_of_exact_surgery_row_by_row(rows: int, size: int, seed: int):
    hessian = hessian_of(size, seed)
    weight = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    trace = obc_trace(weight, hessian)
    for row in range(rows):
        exact = obs_prune_exact(weight[row], torch.linalg.inv(hessian), size - 1)
        assert trace.order[row, :-1].tolist() == list(exact.order)
        losses = torch.tensor(exact.losses, dtype=torch.float64)
        assert torch.allclose(trace.losses[row, :-1] / 2, losses, rtol=1e-5)
        keep = torch.ones(1, size, dtype=torch.bool)
        keep[0, list(exact.order)] = False
        assert torch.allclose(reconstruct(weight[row : row + 1], hessian, keep)[0], exact.weight, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_rows_in_small_chunks_are_those_in_one(rows: int, monkeypatch: pytest.MonkeyPatch):
    weight, hessian = torch.randn(5, 70, dtype=torch.float64), hessian_of(70, 3)
    whole = obc_trace(weight, hessian)
    monkeypatch.setattr(obc_trace_module, "_CHUNK_BYTES", 8 * 70**2 * rows)
    parts = obc_trace(weight, hessian)
    assert torch.equal(parts.order, whole.order)
    assert torch.allclose(parts.losses, whole.losses)


def greedy_pattern(weight: np.ndarray, inverse: np.ndarray, pattern: Pattern) -> list[int]:
    """Remove one weight after the other by the definition, with a fresh rank-1 downdate each time."""
    sets, order = pattern.sets.numpy(), []
    w, h = weight.copy(), inverse.copy()
    while True:
        full = [s for s in set(sets.tolist()) if sum(sets[p] == s for p in order) == pattern.most]
        may = [p for p in range(len(sets)) if p not in order and sets[p] not in full]
        if not may:
            return order
        p = min(may, key=lambda q: w[q] ** 2 / h[q, q])
        w -= h[:, p] * w[p] / h[p, p]
        h -= np.outer(h[:, p], h[p]) / h[p, p]
        order.append(p)


@pytest.mark.parametrize(("inputs", "positions", "n", "m"), [(8, 1, 2, 4), (4, 9, 1, 4), (48, 1, 2, 4), (6, 2, 2, 3)])
def test_patterns_are_cut_greedily(inputs: int, positions: int, n: int, m: int):
    size, pattern = inputs * positions, input_pattern(inputs, positions, n, m)
    hessian, weight = hessian_of(size + 1, 2), torch.randn(3, size + 1, dtype=torch.float64)
    trace = obc_trace(weight, hessian, prunable=size, pattern=pattern)
    inverse = torch.linalg.inv(hessian).numpy()
    for row in range(3):
        assert trace.order[row].tolist() == greedy_pattern(weight[row].numpy(), inverse, pattern)
    kept = torch.ones(3, size).scatter(1, trace.order, 0).view(3, inputs // m, m, positions).sum(2)
    assert (kept == n).all()


@pytest.mark.parametrize("name", ["linear_8", "conv", "grouped", "conv1d"])
def test_a_layer_with_a_pattern_loses_less_than_by_magnitude(name: str):
    torch.manual_seed(1)
    layer, inputs = {
        "linear_8": (nn.Linear(8, 4), torch.randn(40, 8) @ torch.randn(8, 8)),
        "conv": (nn.Conv2d(4, 5, 3), torch.randn(3, 4, 9, 9).cumsum(2)),
        "grouped": (nn.Conv2d(8, 4, 3, groups=2), torch.randn(3, 8, 9, 9).cumsum(3)),
        "conv1d": (nn.Conv1d(4, 6, 3, stride=2, bias=False), torch.randn(8, 4, 21).cumsum(2)),
    }[name]
    granularity, layout = parse_granularity("2:4"), layout_of(layer)
    before = layer(inputs).detach()
    weight, bias = obc_prune(layer.weight, layer.bias, layer_hessian(layer, inputs), 0.5, granularity=granularity)
    units = to_units(weight, layout)
    assert (units.unflatten(2, (-1, 4)).ne(0).sum(3) == 2).all()
    plain = copy.deepcopy(layer)
    with torch.no_grad():
        size = to_units(layer.weight.abs(), layout).unflatten(2, (-1, 4))
        small = torch.zeros_like(size).scatter(3, size.argsort(3)[..., :2, :], 1).flatten(2, 3)
        plain.weight.copy_(from_units(to_units(layer.weight, layout) * (1 - small), layout, layer.weight.shape))
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
        errors = [float((net(inputs) - before).square().sum()) for net in (layer, plain)]
    assert errors[0] < 0.7 * errors[1]


def test_layers_against_each_other_spare_the_one_that_needs_its_weights():
    torch.manual_seed(0)
    few = torch.randn(60, 3, dtype=torch.float64) @ torch.randn(3, 12, dtype=torch.float64)
    many = torch.randn(60, 12, dtype=torch.float64)
    traced = {}
    for name, seen, scale in (("redundant", few, 1.0), ("dense", many, 1e-3)):
        weight = scale * torch.randn(6, 12, dtype=torch.float64)
        traced[name] = trace_layer(weight, None, (2 * seen.T @ seen)[None], 1e-4)
    counts = counts_over_layers(traced, 0.5)
    assert sum(counts.values()) == 72
    assert counts["redundant"] > 1.3 * counts["dense"] > 0
    for name, count in counts.items():
        assert int((traced[name].prune(count)[0] == 0).sum()) == count
    assert max(counts_over_layers(traced, 0.9, floor=0.1).values()) <= 65


@pytest.mark.parametrize("seed", range(5))
def test_columns_without_company_are_ranked_with_the_others(seed: int):
    hessian = hessian_of(9, seed)
    dead = [1, 4, 5, 8]
    hessian[dead, :], hessian[:, dead] = 0, 0
    hessian[dead, dead] = torch.tensor([0.5, 3.0, 40.0, 1e-3], dtype=torch.float64)
    weight = torch.randn(3, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    trace = obc_trace(weight, hessian, steps=7)
    for row in range(3):
        exact = obs_prune_exact(weight[row], torch.linalg.inv(hessian), 7)
        assert trace.order[row].tolist() == list(exact.order)
        assert torch.allclose(trace.losses[row] / 2, torch.tensor(exact.losses, dtype=torch.float64), rtol=1e-5)


def test_columns_that_may_not_go_stay():
    weight = torch.zeros(2, 5).double()
    weight[:, 4] = 1e-9
    trace = obc_trace(weight, hessian_of(5, 1), prunable=4)
    assert sorted(trace.order[0].tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("count", range(9))
def test_masks_follow_each_row_in_order(count: int):
    order = torch.tensor([[3, 0, 1, 2], [0, 1, 2, 3]])
    trace = Trace(order, torch.tensor([[5.0, 1.0, 6.0, 7.0], [0.5, 5.5, 5.5, 9.0]]))
    taken = [(1, 0), (0, 3), (0, 0), (1, 1), (1, 2), (0, 1), (0, 2), (1, 3)]  # by the dearest on the way
    keep = obc_masks(trace, (2, 4), count)
    assert {(r, c) for r in range(2) for c in range(4) if not keep[r, c]} == set(taken[:count])
    even = (~obc_masks(trace, (2, 4), count, "row")).sum(1).tolist()
    assert even == [-(-count // 2), count // 2]


def test_a_bias_takes_up_the_mean_of_what_is_removed():
    inputs = torch.full((50, 1), 3.0).double() + 0.01 * torch.randn(50, 1, dtype=torch.float64)
    weight, bias = torch.tensor([[2.0], [50.0]]).double(), torch.tensor([1.0, 1.0]).double()
    layer = nn.Linear(1, 2).double()
    new, shift = obc_prune(weight, bias, layer_hessian(layer, inputs), 0.5, damping=1e-9)
    assert new[0].item() == 0
    assert shift[0].item() == pytest.approx(1 + 2 * inputs.mean().item(), rel=1e-4)
    assert (new[1].item(), shift[1].item()) == (50.0, 1.0)


def test_inputs_that_are_never_there_go_first():
    inputs = torch.randn(30, 4).double()
    inputs[:, 2] = 0
    layer = nn.Linear(4, 3, bias=False).double()
    weight = torch.full((3, 4), 0.1).double()
    weight[:, 2] = 100.0
    new, _ = obc_prune(weight, None, layer_hessian(layer, inputs), 0.25, damping=1e-9)
    assert (new == 0).nonzero().tolist() == [[0, 2], [1, 2], [2, 2]]
    assert torch.allclose(new[:, [0, 1, 3]], weight[:, [0, 1, 3]])


def test_a_dead_channel_of_a_depthwise_convolution_goes_first():
    layer = nn.Conv1d(3, 3, 2, groups=3, bias=False).double()
    inputs = torch.randn(8, 3, 9).double()
    inputs[:, 1] = 0  # as behind a ReLU that never opens
    new, _ = obc_prune(layer.weight, None, layer_hessian(layer, inputs), 1 / 3)
    assert (new == 0).nonzero()[:, 0].tolist() == [1, 1]
    assert torch.equal(new[[0, 2]], layer.weight[[0, 2]])
    with pytest.raises(ConfigurationError, match="all zero"):
        obc_prune(layer.weight, None, layer_hessian(layer, inputs * 0), 1 / 3)


def test_dtypes_stay_and_one_weight_does():
    layer = nn.Linear(4, 3).to(torch.bfloat16)
    hessian = layer_hessian(layer, torch.randn(20, 4, dtype=torch.bfloat16))
    weight, bias = obc_prune(layer.weight, layer.bias, hessian, 0.999)
    assert (weight.dtype, bias.dtype, int((weight != 0).sum())) == (torch.bfloat16, torch.bfloat16, 1)


def test_refusals():
    with pytest.raises(ConfigurationError, match="ConvTranspose2d"):
        layer_patches(nn.ConvTranspose2d(1, 1, 1), torch.zeros(1, 1, 2, 2))
    with pytest.raises(ConfigurationError, match="all zero"):
        damp(torch.zeros(2, 2), 0.1)
    with pytest.raises(ConfigurationError, match="not finite"):
        damp(torch.full((2, 2), torch.nan), 0.1)
    with pytest.raises(ConfigurationError, match="positive definite"):
        obc_trace(torch.ones(1, 2), torch.ones(2, 2))
    with pytest.raises(ConfigurationError, match=r"`hessian` must be \(2, 2\)"):
        obc_trace(torch.ones(1, 2), torch.eye(3))
    with pytest.raises(ConfigurationError, match=r"`steps` must lie in 0\.\.1"):
        obc_trace(torch.ones(1, 2), torch.eye(2), steps=2, prunable=1)
    trace = Trace(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1))
    with pytest.raises(ConfigurationError, match="did you mean 'row'"):
        obc_masks(trace, (1, 1), 0, "rows")
    with pytest.raises(ConfigurationError, match="`count`"):
        obc_masks(trace, (1, 1), 2)
    with pytest.raises(ConfigurationError, match="with a bias"):
        obc_prune(torch.ones(2, 2), torch.ones(2), torch.eye(2)[None], 0.5)
