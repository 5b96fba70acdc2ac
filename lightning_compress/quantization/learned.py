"""Ranges that are parameters: LSQ, LSQ+ and PACT; and DoReFa's weights. Functions with the gradients of the papers."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from lightning_compress.quantization.affine import along, exact, fake_quantize_inside, in_python, round_of, times


def learned_step(
    x: Tensor, scale: Tensor, zero_point: Tensor, bounds: tuple[int, int], axis: int | None = None
) -> Tensor:
    r"""Fake-quantize with a learned step size (LSQ, Esser et al. 2020, arXiv:1902.08153).

    With :math:`v = x / s` and :math:`n = q_{min} - z,\ p = q_{max} - z`

    .. math:: \hat x = \mathrm{round}(\mathrm{clamp}(v, n, p))\, s,\qquad
              \frac{\partial \hat x}{\partial s} = g \cdot
              \begin{cases} \mathrm{round}(v) - v & n < v < p \\ n & v \le n \\ p & v \ge p \end{cases}

    with :math:`g = 1/\sqrt{N p_{max}}`, where N counts the elements of one sample, or of one channel of a weight, and
    :math:`p_{max} = \max(|n|, p)`. The gradient of x passes where n < v < p.

    Args:
        x: Activations with the samples along dimension 0, or a weight if ``axis`` is given or it has no samples.
        scale: s, a scalar or one value for each index along ``axis``.
        zero_point: z, an integer, fixed; 0 for signed grids and for inputs that are never negative.
        bounds: Least and greatest integer.
        axis: Dimension of the channels.

    >>> x, s = torch.tensor([[0.6, 5.0, -1.0]]), torch.tensor(1.0, requires_grad=True)
    >>> y = learned_step(x, s, torch.tensor(0), (0, 3))
    >>> y.sum().backward()
    >>> y.tolist(), round(float(s.grad) * (3 * 3) ** 0.5, 4)
    ([[1.0, 3.0, 0.0]], 3.4)
    """
    return cast(
        Tensor, _LearnedStep.apply(x, along(scale, x, axis), along(zero_point, x, axis), *bounds, axis is not None)
    )


def learned_weight_step(weight: Tensor, scale: Tensor, bounds: tuple[int, int], axis: int | None = None) -> Tensor:
    """Do the same for a weight, of which all elements (of a channel) count as N."""
    zero = torch.zeros((), dtype=torch.int32, device=weight.device)
    return cast(Tensor, _LearnedStep.apply(weight, along(scale, weight, axis), zero, *bounds, True))


def learned_affine(x: Tensor, scale: Tensor, offset: Tensor, bounds: tuple[int, int]) -> Tensor:
    r"""Fake-quantize with learned step size and offset (LSQ+, Bhalgat et al. 2020, arXiv:2004.09576).

    The offset :math:`\beta` is the value of :math:`q_{min} = 0`. It takes effect as the zero point
    :math:`z = \mathrm{round}(-\beta / s)`, whose rounding is passed straight through, so that zero stays exact:

    .. math:: \hat x = (\mathrm{round}(\mathrm{clamp}(x / s,\, n,\, p)))\, s,\qquad
              \frac{\partial \hat x}{\partial \beta} = \begin{cases} 0 & n < x/s < p \\ 1 & \text{else} \end{cases}

    and the gradient of s as in :func:`learned_step`, plus :math:`-\beta / s` outside, as there n and p move with z.
    Both gradients are scaled by g.

    Args:
        x: Activations with the samples along dimension 0.
        scale: s, a scalar.
        offset: beta, a scalar; at most 0, as zero must be within.
        bounds: Least and greatest integer.
    """
    return cast(Tensor, _LearnedAffine.apply(x, scale, offset, *bounds))


def learned_bound(x: Tensor, bound: Tensor, zero_point: Tensor, bounds: tuple[int, int]) -> Tensor:
    r"""Clip at a learned bound, then quantize (PACT, Choi et al. 2018, arXiv:1805.06085).

    .. math:: \hat x = \mathrm{round}(\mathrm{clamp}(x, n s, \alpha) / s)\, s,\quad s = \alpha / p,\qquad
              \frac{\partial \hat x}{\partial \alpha} = 1[x \ge \alpha] + \tfrac{n}{p}\, 1[x \le n s]

    With a zero point of 0 (inputs that are never negative) n = 0, and this is the paper's; the weight decay of the
    optimizer is its regularizer.

    Args:
        x: Any shape.
        bound: alpha, a scalar above 0.
        zero_point: An integer, fixed.
        bounds: Least and greatest integer.

    >>> x, a = torch.tensor([0.4, 2.5, -1.0]), torch.tensor(1.5, requires_grad=True)
    >>> y = learned_bound(x, a, torch.tensor(0), (0, 3))
    >>> y.sum().backward()
    >>> y.tolist(), float(a.grad)
    ([0.5, 1.5, 0.0], 1.0)
    """
    return cast(Tensor, _LearnedBound.apply(x, bound, zero_point, *bounds))


def tanh_weight(weight: Tensor, bits: int, zero: bool = True) -> Tensor:
    r"""Quantize a weight that a tanh has squeezed into [-1, 1] (DoReFa, Zhou et al. 2016, arXiv:1606.06160).

    .. math:: t = \frac{\tanh w}{\max |\tanh w|},\qquad \hat w = \mathrm{round}(t\, q_{max}) / q_{max}

    with :math:`q_{max} = 2^{b-1} - 1`, where zero stays zero; or, as in the paper, on :math:`2^b` values none of which
    is zero: :math:`\hat w = 2\,\mathrm{round}((t/2 + 1/2)(2^b - 1)) / (2^b - 1) - 1`. Gradients pass straight through
    the rounding.

    Args:
        weight: Any shape.
        bits: b, 2 to 8.
        zero: Whether zero is one of the values, as masks need it.

    >>> tanh_weight(torch.tensor([1.0, -0.4, 0.1]), 2), tanh_weight(torch.tensor([1.0, -0.4, 0.1]), 2, zero=False)
    (tensor([1., -0., 0.]), tensor([ 1.0000, -0.3333,  0.3333]))
    """
    squeezed = torch.tanh(exact(weight))
    t = squeezed / squeezed.abs().amax().clamp_min(1e-12)
    if zero:
        return fake_quantize_inside(t, t.new_tensor(1 / (2 ** (bits - 1) - 1))).to(weight.dtype)
    unit = fake_quantize_inside(t / 2 + 0.5, t.new_tensor(1 / (2**bits - 1)))
    return (2 * unit - 1).to(weight.dtype)


def attach(x: Tensor, *parameters: Tensor) -> Tensor:
    """Return ``x`` itself, as if it depended on the parameters, whose gradient is zero.

    Ranges that wait for quantization to begin are part of the graph so, as data-parallel training demands.
    """
    return cast(Tensor, _Attach.apply(x, *parameters)) if parameters else x


def _gradient_scale(x: Tensor, weight: bool, scales: int, peak: float) -> float:
    count = x.numel() / scales if weight else x.numel() / max(1, x.shape[0] if x.dim() else 1)
    return 1 / math.sqrt(max(1.0, count) * peak)


def _pass_within(grad: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    return cast(Tensor, torch.ops.aten.hardtanh_backward(grad, x, low, high))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(exact(a).reshape(-1), exact(b).reshape(-1))


class _LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, least: int, greatest: int, weight: bool
    ) -> Tensor:
        y, ctx.bounds = _rounded(x, scale, zero_point, least, greatest)
        ctx.weight, ctx.peak = weight, float(max(abs(least), abs(greatest)))
        ctx.save_for_backward(x, scale)  # not y, which the caller may change in place
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, scale), (low, high), grad = ctx.saved_tensors, ctx.bounds, grads[0]
        y = _on_grid(x, scale, low, high)
        if isinstance(low, int) and in_python(scale):
            step = scale.item()
            passed = _pass_within(grad, x, low * step, high * step)
            total = _dot(grad, y) - _dot(passed, x)
        else:
            v = exact(x) / exact(scale)
            passed = grad * ((v > low) & (v < high))
            total = (exact(grad) * y - exact(passed) * x).sum_to_size(scale.shape)
        g = _gradient_scale(x, ctx.weight, scale.numel(), ctx.peak)
        return passed, (total / exact(scale) * g).to(scale.dtype), None, None, None, None


class _LearnedAffine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, offset: Tensor, least: int, greatest: int) -> Tensor:
        zero_point = zero_point_of(scale, offset, (least, greatest))
        y, ctx.bounds = _rounded(x, scale, zero_point, least, greatest)
        ctx.peak = float(max(abs(least), abs(greatest)))
        ctx.save_for_backward(x, scale, offset)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, scale, offset), (low, high), grad = ctx.saved_tensors, ctx.bounds, grads[0]
        y = _on_grid(x, scale, low, high)
        if isinstance(low, int):
            step = scale.item()
            passed = _pass_within(grad, x, low * step, high * step)
        else:
            v = exact(x) / exact(scale)
            passed = grad * ((v > low) & (v < high))
        g = _gradient_scale(x, False, 1, ctx.peak)
        outside = exact(grad).sum() - exact(passed).sum()
        total = (_dot(grad, y) - _dot(passed, x)) / exact(scale) - exact(offset) / exact(scale) * outside
        return passed, (total * g).to(scale.dtype), (outside * g).to(offset.dtype), None, None


class _LearnedBound(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: Tensor, zero_point: Tensor, least: int, greatest: int) -> Tensor:
        scale = exact(bound) / (greatest - zero_point)
        y, ctx.bounds = _rounded(x, scale, zero_point, least, greatest)
        ctx.save_for_backward(x, bound, scale)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, bound, scale), (low, high), grad = ctx.saved_tensors, ctx.bounds, grads[0]
        wide = exact(x)
        above, below = wide >= exact(bound), wide <= low * scale
        passed = grad * ~(above | below)
        total = (exact(grad) * above).sum() + (exact(grad) * below).sum() * (low / high)
        return passed, total.to(bound.dtype), None, None, None


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.kinds = [(tuple(p.shape), p.dtype, p.device) for p in parameters]  # they may move before the backward pass
        return x.clone()  # not a view: blocks add to what they get in place

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.kinds)


def zero_point_of(scale: Tensor, offset: Tensor, bounds: tuple[int, int]) -> Tensor:
    """Return the zero point of a learned offset, as int32."""
    return torch.round(bounds[0] - exact(offset) / exact(scale)).clamp(*bounds).to(torch.int32)


def _rounded(x: Tensor, scale: Tensor, zero_point: Tensor, least: int, greatest: int) -> tuple[Tensor, Any]:
    """Return ``x`` on the grid, and the bounds of the grid around 0: ints where they can be read, else tensors."""
    low: Any = least - zero_point
    high: Any = greatest - zero_point
    if in_python(zero_point):
        low, high = int(low.item()), int(high.item())
    return _on_grid(x, scale, low, high), (low, high)


def _on_grid(x: Tensor, scale: Tensor, low: Any, high: Any) -> Tensor:
    """Return ``x`` on a grid between integers ``low`` and ``high``, which are numbers or tensors."""
    if isinstance(low, int) and in_python(scale):
        step = scale.item()
        return (exact(x) / step).round_().clamp_(low, high).mul_(step).to(x.dtype)
    q = round_of(exact(x) / exact(scale))
    if isinstance(low, int):
        q = q.clamp(low, high)
    else:
        q = torch.minimum(torch.maximum(q, low.to(q.dtype)), high.to(q.dtype))
    return times(q, exact(scale), x.dtype)
