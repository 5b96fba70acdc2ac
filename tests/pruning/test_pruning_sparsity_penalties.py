"""Penalties and proximal operators: by hand, against brute force and autograd, on every kind of layer."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_compress import ConfigurationError
from lightning_compress.core.schedule import Schedule
from lightning_compress.pruning.granularity import Granularity, Layout, layout_of
from lightning_compress.pruning.sparsity import (
    StrengthRule,
    group_lasso,
    group_lasso_gradient,
    group_soft_threshold,
    soft_threshold,
)
from lightning_compress.pruning.sparsity.groups import parse_groups
from lightning_compress.pruning.sparsity.penalties import group_norms, spread_groups
from lightning_compress.pruning.sparsity.rules import check_rising

LAYERS = {
    "linear": lambda: nn.Linear(6, 4),
    "conv1d": lambda: nn.Conv1d(4, 6, 3),
    "conv2d": lambda: nn.Conv2d(4, 6, (2, 3)),
    "conv3d": lambda: nn.Conv3d(2, 4, 2),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3),
    "transposed_grouped": lambda: nn.ConvTranspose1d(4, 6, 3, groups=2),
}
WITH_BIAS = ("filter", "row", "layer")


def filled(name: str) -> nn.Module:
    torch.manual_seed(3)
    return LAYERS[name]()


def members(layer: nn.Module, kind: str) -> list[list[tuple[int, ...]]]:
    """Return the indices of the weights of every group, worked out one weight at a time."""
    weight, groups = layer.weight, getattr(layer, "groups", 1)
    transposed = "Transpose" in type(layer).__name__
    found: dict[object, list[tuple[int, ...]]] = {}
    for index in itertools.product(*map(range, weight.shape)):
        first, second, *place = index
        if transposed:  # (inputs, outputs of a group, kernel)
            part = first // (weight.shape[0] // groups)
            out, into = part * weight.shape[1] + second, first
        else:  # (outputs, inputs of a group, kernel)
            part = first // (weight.shape[0] // groups)
            out, into = first, part * weight.shape[1] + second
        key = {
            "element": index,
            "filter": out,
            "row": out,
            "channel": into,
            "kernel": (out, into),
            "column": (into, *place),
            "layer": 0,
        }[kind]
        found.setdefault(key, []).append(index)
    return list(found.values())


@pytest.mark.parametrize("kind", ["element", "filter", "channel", "column", "kernel", "layer"])
@pytest.mark.parametrize("name", LAYERS)
def test_value_gradient_and_prox_equal_those_of_single_weights(name: str, kind: str) -> None:
    layer = filled(name)
    weight, bias = layer.weight, layer.bias if kind in WITH_BIAS else None
    granularity, layout = parse_groups(kind), layout_of(layer)
    value, amount = 0.0, 0.15
    wanted = torch.zeros_like(weight)
    wanted_bias = torch.zeros_like(layer.bias)
    for number, indices in enumerate(members(layer, kind)):
        group = [float(weight.detach()[index]) for index in indices]
        own = [] if bias is None else list(range(len(bias))) if kind == "layer" else [number]
        if "transposed" in name and bias is not None and kind != "layer":
            own = [_output(layer, indices[0])]
        group += [float(bias.detach()[index]) for index in own] if bias is not None else []
        norm, root = math.sqrt(sum(v * v for v in group)), math.sqrt(len(group))
        value += root * norm
        factor = max(0.0, 1 - amount * root / norm)
        for index in indices:
            wanted[index] = weight.detach()[index] * factor
        for index in own:
            wanted_bias[index] = layer.bias.detach()[index] * factor
    penalty = group_lasso(weight, granularity, layout, bias)
    assert penalty.item() == pytest.approx(value, rel=1e-5)
    new, new_bias = group_soft_threshold(weight.detach(), amount, granularity, layout, bias)
    assert torch.allclose(new, wanted, atol=1e-6)
    assert torch.equal(new == 0, wanted == 0)
    if bias is not None:
        assert torch.allclose(new_bias, wanted_bias, atol=1e-6)
    parameters = [weight] if bias is None else [weight, bias]
    gradients = group_lasso_gradient(weight.detach(), granularity, layout, bias)
    for by_hand, by_autograd in zip(gradients, torch.autograd.grad(penalty, parameters), strict=False):
        assert torch.allclose(by_hand, by_autograd, atol=1e-5)


def _output(layer: nn.Module, index: tuple[int, ...]) -> int:
    part = index[0] // (layer.weight.shape[0] // layer.groups)
    return part * layer.weight.shape[1] + index[1]


def test_blocks_are_groups_too() -> None:
    weight = torch.arange(1.0, 17.0).reshape(4, 4)
    norms = group_norms(weight, Granularity("block", 2, 2), Layout())
    assert norms.flatten().tolist() == pytest.approx(
        [math.sqrt(v) for v in (1 + 4 + 25 + 36, 9 + 16 + 49 + 64)]
        + [math.sqrt(v) for v in (81 + 100 + 169 + 196, 121 + 144 + 225 + 256)]
    )
    spread = spread_groups(norms, Granularity("block", 2, 2), Layout(), weight)
    assert spread[1].tolist() == [norms.flatten()[0], norms.flatten()[0], norms.flatten()[1], norms.flatten()[1]]


@pytest.mark.parametrize("kind", ["element", "filter", "column"])
def test_prox_minimises_its_objective(kind: str) -> None:
    """prox(w) = argmin_v  R(v) t + |v - w|^2 / 2: no point around it, and not the start, is better."""
    torch.manual_seed(0)
    weight, amount, granularity = torch.randn(3, 4, dtype=torch.float64), 0.4, parse_groups(kind)

    def objective(v: Tensor) -> float:
        return float(amount * group_lasso(v, granularity, Layout()) + (v - weight).square().sum() / 2)

    best, _ = group_soft_threshold(weight, amount, granularity, Layout())
    lowest = objective(best)
    assert lowest < objective(weight)
    for _ in range(300):
        assert objective(best + 0.02 * torch.randn_like(best)) >= lowest


def test_soft_threshold_against_numpy() -> None:
    values = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
    wanted = np.sign(values) * np.maximum(np.abs(values) - 0.5, 0)
    found = soft_threshold(torch.from_numpy(values), 0.5)
    assert np.allclose(found.numpy(), wanted, atol=1e-7)
    assert np.array_equal(found.numpy() == 0, np.abs(values) <= 0.5)


def test_zeros_are_positive_and_nan_is_not_hidden() -> None:
    weight = torch.tensor([[-0.1, -0.1], [float("nan"), 1.0]])
    new, _ = group_soft_threshold(weight, 0.5, Granularity("filter"), Layout())
    assert new[0].tolist() == [0.0, 0.0]
    assert not torch.signbit(new[0]).any()
    assert torch.isnan(new[1]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_types_are_summed_in_float32(dtype: torch.dtype) -> None:
    weight = torch.full((2, 4096), 10.0, dtype=dtype)  # its square sum exceeds float16
    norms = group_norms(weight, Granularity("filter"), Layout())
    assert norms.flatten().tolist() == [640.0, 640.0]
    new, _ = group_soft_threshold(weight, 1.0, Granularity("filter"), Layout())
    assert new.dtype == dtype
    assert new[0, 0] == 9.0


def test_nothing_happens_at_zero() -> None:
    weight = torch.zeros(2, 2, requires_grad=True)
    penalty = group_lasso(weight, Granularity("filter"), Layout())
    (gradient,) = torch.autograd.grad(penalty, [weight])
    assert torch.equal(gradient, torch.zeros(2, 2))
    assert torch.equal(group_lasso_gradient(weight.detach(), Granularity("filter"), Layout())[0], torch.zeros(2, 2))
    same, _ = group_soft_threshold(torch.ones(2, 2), 0.0, Granularity("filter"), Layout())
    assert torch.equal(same, torch.ones(2, 2))
    with pytest.raises(ConfigurationError, match="`amount` must be at least 0"):
        group_soft_threshold(weight, -1.0, Granularity("filter"), Layout())


@pytest.mark.parametrize(
    ("word", "message"), [("2:4", "is a pattern"), ("filtre", "did you mean 'filter'"), (3, "must be a string")]
)
def test_words_that_name_no_groups(word: object, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        parse_groups(word)


def test_the_words_of_the_papers() -> None:
    words = {"l1": "element", "shape": "column", "depth": "layer", "slimming": "bn_scale", "block:2x2": "block:2x2"}
    assert {word: str(parse_groups(word)) for word in words} == words


@pytest.mark.parametrize("strength", [-1, float("nan"), float("inf"), "1e-3", True])
def test_strengths_outside_their_range(strength: object) -> None:
    with pytest.raises(ConfigurationError, match="`strength` of a rule must be a finite number of at least 0"):
        StrengthRule("conv", strength)  # type: ignore[arg-type]


def test_schedules_must_rise() -> None:
    check_rising(Schedule(1.0, shape="milestones", milestones=((0, 0.5), ("50%", 1.0))))
    for flat in (
        Schedule(1.0, shape="once", start="50%"),
        Schedule(1.0, initial=1.0, shape="linear"),
        Schedule(1.0, shape="milestones", milestones=((0, 1.0), ("50%", 1.0))),
    ):
        with pytest.raises(ConfigurationError, match="`schedule` must rise"):
            check_rising(flat)
