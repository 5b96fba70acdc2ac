"""Learned ranges: gradients of the papers against autograd in float64, and numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_compress import ConfigurationError
from lightning_compress.quantization import QuantizerSpec, quantizers_of, update_ranges
from lightning_compress.quantization.build import build_quantizer
from lightning_compress.quantization.learned import (
    learned_affine,
    learned_bound,
    learned_step,
    learned_weight_step,
    tanh_weight,
)


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.round(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


def scaled(value: Tensor, g: float) -> Tensor:
    """Return the value, whose gradient is scaled by g."""
    return value * g + (value * (1 - g)).detach()


def data(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x.requires_grad_(), torch.randn(shape, generator=generator, dtype=torch.float64)


def double(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def agree(y: Tensor, expected: Tensor, up: Tensor, *inputs: Tensor) -> None:
    assert torch.allclose(y, expected, rtol=1e-13, atol=1e-13)
    for a, b in zip(torch.autograd.grad(y, inputs, up), torch.autograd.grad(expected, inputs, up), strict=True):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-11)
        assert (b != 0).any()


@pytest.mark.parametrize(("bounds", "zero"), [((0, 7), 0), ((0, 7), 3), ((-3, 3), 0), ((0, 255), 100)])
def test_lsq_against_autograd_in_float64(bounds: tuple[int, int], zero: int) -> None:
    x, up = data(4, 3, 10)
    s = double(0.31 if bounds[1] < 100 else 0.009)
    g = 1 / math.sqrt(30 * bounds[1])
    t = scaled(s, g)
    v = torch.clamp(x / t, bounds[0] - zero, bounds[1] - zero)
    agree(learned_step(x, s, torch.tensor(zero), bounds), Straight.apply(v) * t, up, x, s)


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_lsq_of_weights_against_autograd_in_float64(axis: int | None) -> None:
    w, up = data(4, 3, 10)
    count = 1 if axis is None else w.shape[axis]
    s = (torch.rand(count, dtype=torch.float64) * 0.2 + 0.2).requires_grad_()
    scale = s[0].detach().clone().requires_grad_() if axis is None else s
    t = scaled(scale, 1 / math.sqrt(w.numel() / count * 3))
    wide = t if axis is None else t.reshape([-1 if dim == axis else 1 for dim in range(3)])
    expected = Straight.apply(torch.clamp(w / wide, -3, 3)) * wide
    agree(learned_weight_step(w, scale, (-3, 3), axis), expected, up, w, scale)


def test_lsq_plus_against_autograd_in_float64() -> None:
    x, up = data(5, 40)
    s, beta = double(0.21), double(-0.77)
    g = 1 / math.sqrt(40 * 15)
    t, b = scaled(s, g), scaled(beta, g)
    zero = Straight.apply(-b / t)
    clamped = torch.clamp(x / t, min=-zero.detach(), max=15 - zero.detach())
    inside = (x / t > -zero) & (x / t < 15 - zero)
    q = torch.where(inside, Straight.apply(clamped), torch.where(x < 0, -zero, 15 - zero))
    agree(learned_affine(x, s, beta, (0, 15)), q * t, up, x, s, beta)


@pytest.mark.parametrize("zero", [0, 8])
def test_pact_against_autograd_in_float64(zero: int) -> None:
    x, up = data(5, 40)
    alpha = double(0.9)
    low = -zero / (15 - zero) * alpha
    clipped = torch.minimum(torch.maximum(x, low), alpha)
    step = (alpha / (15 - zero)).detach()
    expected = (
        clipped + (torch.round(clipped / step) * step - clipped).detach()
    )  # the paper differentiates the clipping
    agree(learned_bound(x, alpha, torch.tensor(zero), (0, 15)), expected, up, x, alpha)


def test_pact_against_numeric_differences_of_the_clipping() -> None:
    x, up = data(7, 30)
    alpha, step = 0.8, 1e-6
    expected = ((x.detach().clamp(0, alpha + step) - x.detach().clamp(0, alpha - step)) / (2 * step) * up).sum()
    bound = double(alpha)
    learned_bound(x, bound, torch.tensor(0), (0, 3)).backward(up)
    assert torch.allclose(bound.grad, expected)


def test_lsq_by_hand() -> None:
    # s = 0.5 on 0..3: v = 0.4, 2.6, 4, -1; rounded 0, 3, 3, 0; terms round(v) - v = -0.4, 0.4; p = 3; n = 0
    x = torch.tensor([[0.2, 1.3, 2.0, -0.5]], requires_grad=True)
    s = torch.tensor(0.5, requires_grad=True)
    y = learned_step(x, s, torch.tensor(0), (0, 3))
    y.backward(torch.tensor([[1.0, 1.0, 1.0, 1.0]]))
    assert y.tolist() == [[0.0, 1.5, 1.5, 0.0]]
    assert x.grad.tolist() == [[1.0, 1.0, 0.0, 0.0]]
    assert float(s.grad) == pytest.approx((-0.4 + 0.4 + 3 + 0) / math.sqrt(4 * 3), rel=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_dorefa_against_numpy_and_autograd(bits: int) -> None:
    w, up = data(6, 20)
    a = np.tanh(w.detach().numpy())
    levels = 2**bits - 1
    paper = 2 * np.rint((a / (2 * np.abs(a).max()) + 0.5) * levels) / levels - 1
    y = tanh_weight(w, bits, zero=False)
    assert np.allclose(y.detach().numpy(), paper)
    assert len(y.unique()) <= 2**bits
    t = torch.tanh(w)
    agree(tanh_weight(w, bits), tanh_weight(w, bits).detach() + t / t.abs().max() - (t / t.abs().max()).detach(), up, w)
    mask = torch.rand_like(w) < 0.5
    assert (tanh_weight(torch.where(mask, 0.0, w), bits)[mask] == 0).all()


def observed(spec: QuantizerSpec, x: Tensor) -> nn.Module:
    quantizer = build_quantizer(spec, "input")
    quantizer.observing = quantizer.enabled = True
    before = quantizer(x)
    assert torch.equal(before, x)
    update_ranges([quantizer])
    quantizer.observing = False
    return quantizer


@pytest.mark.parametrize("name", ["lsq", "lsq+", "pact"])
@pytest.mark.parametrize("signed", [True, False])
def test_ranges_begin_from_what_was_observed(name: str, signed: bool) -> None:
    x = torch.randn(8, 200, generator=torch.Generator().manual_seed(2))
    x = x if signed else x.relu()
    quantizer = observed(QuantizerSpec(bits=4, range=name), x)
    scale, zero = quantizer.affine()
    assert (int(zero) > 0) == signed
    y = quantizer(x).detach()
    assert len(y.unique()) <= 16
    assert (y[x == 0] == 0).all()
    assert float((y - x).square().mean()) < 0.1 * float(x.square().mean())
    if name == "lsq" and not signed:
        expected = 2 * float(x.abs().mean()) / math.sqrt(15)
        assert float(scale) == pytest.approx(min(expected, float(x.max()) / 15), rel=1e-5)
    if name == "pact":
        assert float(quantizer.bound.detach()) == float(x.abs().max())
    assert torch.equal(quantizer.quantize(x).unique(), torch.unique((y / scale).round() + zero).to(torch.uint8))


@pytest.mark.parametrize("spec", [QuantizerSpec(4, range=name) for name in ("lsq", "lsq+", "pact")])
def test_parameters_exist_from_the_start_and_are_in_the_graph(spec: QuantizerSpec) -> None:
    quantizer = build_quantizer(spec, "input")
    parameters = list(quantizer.parameters())
    assert len(parameters) == (2 if spec.range == "lsq+" else 1)
    quantizer(torch.randn(3, 4, requires_grad=True)).sum().backward()
    assert all(float(p.grad) == 0 for p in parameters)
    with torch.no_grad():
        parameters[0].fill_(-3)
    quantizer.keep_positive()
    assert float(parameters[0].detach()) > 0


@pytest.mark.parametrize("name", ["lsq", "lsq+", "pact"])
def test_compiles_and_exports(name: str) -> None:
    x = torch.randn(4, 6)
    quantizer = observed(QuantizerSpec(bits=4, range=name), x)
    exported = torch.export.export(quantizer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert torch.allclose(exported.module()(x[:3]), quantizer(x[:3]))
    torch.compile(quantizer, backend="aot_eager", fullgraph=True)(x).sum().backward()
    compiled = [p.grad.clone() for p in quantizer.parameters()]
    quantizer.zero_grad()
    quantizer(x).sum().backward()
    assert all(torch.allclose(a, p.grad, atol=1e-6) for a, p in zip(compiled, quantizer.parameters(), strict=True))


def test_weights_learn_from_the_mean_magnitude_on() -> None:
    spec = QuantizerSpec(4, symmetric=True, per_channel=True, range="lsq")
    quantizer = build_quantizer(spec, "weight", 0, 3)
    w = torch.randn(3, 50, requires_grad=True)
    quantizer.take_range(w)
    quantizer.enabled = True
    expected = 2 * w.detach().abs().mean(1) / math.sqrt(7)
    assert torch.allclose(quantizer.scale, expected)
    quantizer(w).square().sum().backward()
    assert quantizer.scale.grad.shape == (3,)
    quantizer.take_range(w * 2)
    assert torch.allclose(quantizer.scale, expected)
    assert len(quantizers_of(quantizer)) == 1


@pytest.mark.parametrize(
    ("config", "role", "message"),
    [
        ({"range": "lsq+", "symmetric": True}, "input", "forbids"),
        ({"range": "pact"}, "weight", "is for activations"),
        ({"range": "lsq"}, "weight", "symmetric=True"),
        ({"range": "dorefa", "symmetric": True}, "input", "is for weights"),
        ({"range": "minmaks"}, "input", "did you mean 'minmax'"),
        ({"bits": 4, "per_channel": True}, "input", "is for weights"),
        ({"momentum": 0}, "input", "`momentum` must be a number above 0"),
        ({"percentile": 50}, "input", "`percentile` must be"),
        ({"symmetricc": True}, "input", "did you mean 'symmetric'"),
    ],
)
def test_what_does_not_fit(config: dict, role: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build_quantizer(QuantizerSpec.from_config(config), role, 0, 2)


@pytest.mark.parametrize("name", ["moving_average", "lsq", "lsq+", "pact"])
def test_blocks_may_add_to_what_they_get_in_place(name: str) -> None:
    quantizer = build_quantizer(QuantizerSpec(4, range=name), "input")
    x = torch.randn(3, 4, requires_grad=True)
    for enabled in (False, True):
        quantizer.enabled = quantizer.observing = enabled
        if enabled:
            quantizer(x)
            update_ranges([quantizer])
        y = quantizer(x * 2)
        y += 1
        torch.nn.functional.relu(y, inplace=True).sum().backward()
    assert torch.isfinite(x.grad).all()
