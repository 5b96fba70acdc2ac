"""Affine quantization by hand, against numpy and against autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_compress import ConfigurationError
from lightning_compress.quantization.affine import (
    SMALLEST_SCALE,
    affine_parameters,
    dequantize,
    fake_quantize,
    fake_quantize_inside,
    integer_bounds,
    quantize,
    symmetric_scale,
)


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.round(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


def reference(x: Tensor, scale: Tensor, zero_point: Tensor, bounds: tuple[int, int]) -> Tensor:
    """Fake-quantization written out, with a rounding whose gradient is one; autograd does the rest."""
    q = Straight.apply(x / scale) + zero_point
    clipped = q.detach().clamp(*bounds)  # autograd would give no gradient to the outermost values of the grid either
    return (torch.where((q >= bounds[0]) & (q <= bounds[1]), q, clipped) - zero_point) * scale


def test_four_elements_by_hand() -> None:
    # range [-1, 3] on 2 bits: s = 4/3, z = round(0.75) = 1, so the grid is -4/3, 0, 4/3, 8/3
    scale, zero = affine_parameters(torch.tensor(-1.0), torch.tensor(3.0), (0, 3))
    assert (float(scale), int(zero)) == (pytest.approx(4 / 3), 1)
    x = torch.tensor([-1.0, 0.6, 0.7, 5.0])
    assert quantize(x, scale, zero, (0, 3)).tolist() == [0, 1, 2, 3]
    back = dequantize(quantize(x, scale, zero, (0, 3)), scale, zero)
    assert torch.allclose(back, torch.tensor([-4 / 3, 0.0, 4 / 3, 8 / 3]))
    assert torch.equal(fake_quantize(x, scale, zero, (0, 3)), back)


def test_halves_go_to_even_as_in_onnx() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    assert quantize(x, torch.tensor(1.0), torch.tensor(0), (-127, 127)).tolist() == [0, 2, 2, 0, -2]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("low", "high"), [(-3.1, 7.7), (0.0, 1.3), (0.4, 0.9), (-5.0, -1.0), (0.0, 0.0)])
def test_zero_is_exact_and_the_range_is_covered(bits: int, low: float, high: float) -> None:
    bounds = integer_bounds(bits, symmetric=False)
    scale, zero = affine_parameters(torch.tensor(low), torch.tensor(high), bounds)
    assert bounds[0] <= int(zero) <= bounds[1]
    assert float(fake_quantize(torch.zeros(1), scale, zero, bounds)) == 0.0
    ends = torch.tensor([min(low, 0.0), max(high, 0.0)])
    assert (fake_quantize(ends, scale, zero, bounds) - ends).abs().max() <= scale / 2 * 1.001


@pytest.mark.parametrize("bits", range(2, 9))
def test_symmetric_grids_mirror(bits: int) -> None:
    bounds = integer_bounds(bits, symmetric=True)
    x = torch.randn(1000)
    scale = symmetric_scale(x.abs().max() * 0.7, bounds)
    zero = torch.tensor(0)
    assert torch.equal(fake_quantize(-x, scale, zero, bounds), -fake_quantize(x, scale, zero, bounds))
    assert len(quantize(x, scale, zero, bounds).unique()) <= 2**bits - 1


@pytest.mark.parametrize("axis", [None, 0, 1, 2])
def test_matches_numpy(axis: int | None) -> None:
    x = torch.randn(3, 4, 5)
    size = 1 if axis is None else x.shape[axis]
    scale, zero = torch.rand(size) * 0.1 + 0.01, torch.randint(0, 15, (size,), dtype=torch.int32)
    if axis is None:
        scale, zero = scale[0], zero[0]
    shape = [-1 if dim == axis else 1 for dim in range(3)] if axis is not None else []
    s, z = scale.numpy().reshape(shape), zero.numpy().reshape(shape)
    q = np.clip(np.rint(x.numpy() / s) + z, 0, 15)
    assert np.array_equal(quantize(x, scale, zero, (0, 15), axis).numpy(), q)
    assert np.array_equal(fake_quantize(x, scale, zero, (0, 15), axis).numpy(), ((q - z) * s).astype(np.float32))


@pytest.mark.parametrize("per_channel", [False, True])
def test_straight_through_gradient_against_autograd_in_float64(per_channel: bool) -> None:
    x = torch.randn(6, 50, dtype=torch.float64, requires_grad=True)
    scale = torch.rand(6, dtype=torch.float64) * 0.2 + 0.05 if per_channel else torch.tensor(0.1, dtype=torch.float64)
    zero = torch.full(scale.shape, 5)
    wide = scale[:, None] if per_channel else scale
    up = torch.randn(6, 50, dtype=torch.float64)
    expected_y = reference(x, wide, zero[:, None] if per_channel else zero, (0, 15))
    (expected,) = torch.autograd.grad(expected_y, x, up)
    y = fake_quantize(x, scale, zero, (0, 15), 0 if per_channel else None)
    (grad,) = torch.autograd.grad(y, x, up)
    assert torch.equal(y, expected_y)
    assert torch.allclose(grad, expected, rtol=1e-14, atol=0)  # autograd multiplies with the scale and divides by it
    assert torch.equal(grad == 0, expected == 0)
    assert 0 < int((grad == 0).sum()) < grad.numel()


def test_nothing_is_clipped_where_the_scale_covers() -> None:
    x = torch.randn(4, 30, requires_grad=True)
    scale = symmetric_scale(x.detach().abs().amax(1), (-7, 7))
    y = fake_quantize_inside(x, scale, 0)
    assert torch.equal(y, fake_quantize(x, scale, torch.zeros(4), (-7, 7), 0))
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types_stay_and_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    x = (torch.randn(200) * 3).to(dtype).requires_grad_()
    scale, zero = torch.tensor(0.037), torch.tensor(7, dtype=torch.int32)
    y = fake_quantize(x, scale, zero, (0, 15))
    assert y.dtype is dtype
    if dtype.itemsize < 4:
        assert torch.equal(y, fake_quantize(x.detach().float(), scale, zero, (0, 15)).to(dtype))
    y.sum().backward()
    assert x.grad.dtype is dtype


@pytest.mark.parametrize("per_channel", [False, True])
def test_exports_and_compiles_with_dynamic_batch_on_meta_too(per_channel: bool) -> None:
    scale = torch.tensor([0.1, 0.2]) if per_channel else torch.tensor(0.1)
    zero = torch.zeros(scale.shape, dtype=torch.int32)

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", scale)
            self.register_buffer("zero", zero)

        def forward(self, x: Tensor) -> Tensor:
            return fake_quantize(x, self.scale, self.zero, (-7, 7), 1 if per_channel else None)

    net, x = Net(), torch.randn(3, 2)
    batch = torch.export.Dim("batch")
    exported = torch.export.export(net, (x,), dynamic_shapes={"x": {0: batch}})
    other = torch.randn(5, 2)
    assert torch.equal(exported.module()(other), net(other))
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled(a).sum().backward()
    net(b).sum().backward()
    assert torch.equal(a.grad, b.grad)
    assert Net().to("meta")(x.to("meta")).shape == x.shape


def test_a_channel_of_zeros_divides_by_no_zero() -> None:
    scale = symmetric_scale(torch.zeros(2), (-127, 127))
    assert torch.equal(scale, torch.full((2,), SMALLEST_SCALE))
    assert torch.equal(fake_quantize_inside(torch.zeros(2, 3), scale, 0), torch.zeros(2, 3))
    assert float(scale.half()[0]) > 0


@pytest.mark.parametrize("bits", [1, 9, 4.0, True, "8"])
def test_bits_out_of_range(bits: object) -> None:
    with pytest.raises(ConfigurationError, match=r"`bits` must be an int from 2 to 8, got"):
        integer_bounds(bits, symmetric=True)  # type: ignore[arg-type]
