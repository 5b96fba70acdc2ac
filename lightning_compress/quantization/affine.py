"""Uniform affine quantization as pure functions: ranges to scales, tensors to integers and back, and fake-quantization.

An integer q stands for the real number (q - zero_point) * scale; zero is always exact, so masks and padding stay zero.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from lightning_compress.core.errors import ConfigurationError

BITS = (2, 8)
"""Least and greatest number of bits of a quantizer."""

SMALLEST_SCALE = 2.0**-23
"""Scales are at least this, so that a channel of zeros divides by no zero; half precision can still hold it."""


def integer_bounds(bits: int, symmetric: bool, narrow: bool = True) -> tuple[int, int]:
    r"""Return the least and the greatest integer of a grid.

    Args:
        bits: 2 to 8.
        symmetric: Signed integers around a zero point of 0; else unsigned ones.
        narrow: Leave out the most negative integer of a signed grid, so that it is its own mirror image.

    Raises:
        ConfigurationError: If ``bits`` is not an int from 2 to 8.

    >>> integer_bounds(8, symmetric=True), integer_bounds(8, symmetric=False), integer_bounds(2, True, narrow=False)
    ((-127, 127), (0, 255), (-2, 1))
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not BITS[0] <= bits <= BITS[1]:
        raise ConfigurationError(f"`bits` must be an int from {BITS[0]} to {BITS[1]}, got {bits!r}")
    if not symmetric:
        return 0, 2**bits - 1
    greatest = 2 ** (bits - 1) - 1
    return (-greatest if narrow else -greatest - 1), greatest


def symmetric_scale(peak: Tensor, bounds: tuple[int, int]) -> Tensor:
    r"""Return the scale :math:`s = \max|x| / q_{max}` of a signed grid.

    Args:
        peak: Greatest magnitude to be represented, of any shape.
        bounds: From :func:`integer_bounds`.

    >>> symmetric_scale(torch.tensor(2.54), (-127, 127))
    tensor(0.0200)
    """
    return (peak / bounds[1]).clamp_min(SMALLEST_SCALE)


def affine_parameters(low: Tensor, high: Tensor, bounds: tuple[int, int]) -> tuple[Tensor, Tensor]:
    r"""Return scale and zero point of the range [low, high], moved so that zero is exact (Jacob et al. 2018, sec. 3).

    .. math:: s = \frac{\max(high, 0) - \min(low, 0)}{q_{max} - q_{min}},\qquad
              z = \mathrm{round}(q_{min} - \min(low, 0) / s)

    Args:
        low: Least value, of any shape.
        high: Greatest value, of the same shape.
        bounds: From :func:`integer_bounds`.

    Returns:
        The scale in the type of ``low``, and the zero point as int32.

    >>> scale, zero = affine_parameters(torch.tensor(-1.0), torch.tensor(4.1), (0, 255))
    >>> round(float(scale), 4), int(zero)
    (0.02, 50)
    """
    low, high = low.clamp_max(0), high.clamp_min(0)
    scale = ((high - low) / (bounds[1] - bounds[0])).clamp_min(SMALLEST_SCALE)
    zero_point = torch.round(bounds[0] - low / scale).clamp(*bounds)
    return scale, zero_point.to(torch.int32)


def along(values: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """Return one value a channel, shaped so that it broadcasts against ``x``; one value for all stays as it is.

    >>> along(torch.ones(3), torch.ones(2, 3, 4), 1).shape
    torch.Size([1, 3, 1])
    """
    if axis is None:
        return values
    return values.reshape([-1 if dim == axis % x.dim() else 1 for dim in range(x.dim())])


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bounds: tuple[int, int], axis: int | None = None) -> Tensor:
    r"""Return the integers :math:`q = \mathrm{clamp}(\mathrm{round}(x / s) + z, q_{min}, q_{max})`, halves to even.

    Args:
        x: Any shape.
        scale: A scalar, or one value for each index along ``axis``.
        zero_point: Of the same shape.
        bounds: From :func:`integer_bounds`.
        axis: Dimension of ``x`` with a scale for each index; ``None`` for one scale.

    Returns:
        int8, or uint8 where ``bounds`` begin at 0.

    >>> quantize(torch.tensor([-0.3, 0.0, 0.25, 9.0]), torch.tensor(0.1), torch.tensor(3), (0, 255))
    tensor([ 0,  3,  5, 93], dtype=torch.uint8)
    """
    scale, zero_point = along(scale, x, axis), along(zero_point, x, axis)
    q = torch.round(x / scale).add(zero_point).clamp(*bounds)
    return q.to(torch.uint8 if bounds[0] >= 0 else torch.int8)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None = None) -> Tensor:
    r"""Return the real numbers :math:`(q - z)\,s` of integers, in the type of ``scale``.

    >>> dequantize(torch.tensor([0, 3, 5], dtype=torch.uint8), torch.tensor(0.5), torch.tensor(3))
    tensor([-1.5000,  0.0000,  1.0000])
    """
    scale, zero_point = along(scale, q, axis), along(zero_point, q, axis)
    return (q.to(torch.int32) - zero_point).to(scale.dtype) * scale


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, bounds: tuple[int, int], axis: int | None = None
) -> Tensor:
    r"""Quantize and dequantize; gradients go straight through where nothing is clipped (Bengio et al. 2013).

    .. math:: \hat x = \left(\mathrm{clamp}(\mathrm{round}(x / s) + z, q_{min}, q_{max}) - z\right) s,\qquad
              \frac{\partial \hat x}{\partial x} = 1[q_{min} \le \mathrm{round}(x / s) + z \le q_{max}]

    It is computed in float32 at least, and returned in the type of ``x``. Scale and zero point get no gradient; for
    learned ones see :mod:`~lightning_compress.quantization.learned`.

    Args:
        x: Any shape.
        scale: A scalar, or one value for each index along ``axis``.
        zero_point: Of the same shape, integers of any type.
        bounds: From :func:`integer_bounds`.
        axis: Dimension of ``x`` with a scale for each index; ``None`` for one scale.

    >>> x = torch.tensor([-0.6, 0.04, 0.26, 9.0], requires_grad=True)
    >>> y = fake_quantize(x, torch.tensor(0.1), torch.tensor(3), (0, 15))
    >>> y.sum().backward()
    >>> y.detach(), x.grad
    (tensor([-0.3000,  0.0000,  0.3000,  1.2000]), tensor([0., 1., 1., 0.]))
    """
    return cast(Tensor, _FakeQuantize.apply(x, along(scale, x, axis), along(zero_point, x, axis), *bounds))


def fake_quantize_inside(x: Tensor, scale: Tensor, axis: int | None = None) -> Tensor:
    r"""Do the same on a signed grid whose scale covers all of ``x``: nothing is clipped, all gradients pass.

    .. math:: \hat x = \mathrm{round}(x / s)\, s

    >>> fake_quantize_inside(torch.tensor([-0.26, 0.04]), torch.tensor(0.1))
    tensor([-0.3000,  0.0000])
    """
    return cast(Tensor, _Round.apply(x, along(scale, x, axis)))


def exact(x: Tensor) -> Tensor:
    """Return ``x``, in float32 if it has less precision than that."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def in_python(*tensors: Tensor) -> bool:
    """Return whether these scalars may be read as Python numbers, which eager kernels on a CPU compute with faster.

    Not on an accelerator, where reading waits, and not while a graph is recorded.
    """
    return not torch.compiler.is_compiling() and all(t.dim() == 0 and t.device.type == "cpu" for t in tensors)


def round_of(fresh: Tensor) -> Tensor:
    """Round a tensor that nobody else holds: in place, but not while a graph is recorded."""
    return torch.round(fresh) if torch.compiler.is_compiling() else fresh.round_()


def times(fresh: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply a tensor that nobody else holds, in place where :func:`round_of` rounds in place, and return ``dtype``.

    What is returned comes out of an operation of its own: where it was another tensor changed in place, or itself in
    the type that it has, ``torch.compile`` of torch 2.11 made the gradient of a function that defines it zero.
    """
    product = fresh * scale if torch.compiler.is_compiling() else fresh.mul_(scale)
    return product if product.dtype == dtype else product.to(dtype)


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        scale = exact(scale)
        return times(round_of(exact(x) / scale), scale, x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, least: int, greatest: int) -> Tensor:
        scale = exact(scale)
        ctx.scalar = in_python(scale, zero_point)
        if ctx.scalar:
            step, zero = scale.item(), int(zero_point.item())
            low, high = least - zero, greatest - zero
            ctx.limits = (low - 0.5) * step, (high + 0.5) * step
            ctx.save_for_backward(x)
            return (exact(x) / step).round_().clamp_(low, high).mul_(step).to(x.dtype)
        lows, highs = least - zero_point, greatest - zero_point
        ctx.save_for_backward(x, scale, lows, highs)
        q = round_of(exact(x) / scale)
        return times(torch.minimum(torch.maximum(q, lows.to(q.dtype)), highs.to(q.dtype)), scale, x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.scalar:
            (x,) = ctx.saved_tensors
            passed = torch.ops.aten.hardtanh_backward(grads[0], x, *ctx.limits)  # one pass, without a stored mask
        else:
            x, scale, lows, highs = ctx.saved_tensors
            q = torch.round(exact(x) / scale)
            passed = grads[0] * ((q >= lows) & (q <= highs))
        return passed, None, None, None, None
