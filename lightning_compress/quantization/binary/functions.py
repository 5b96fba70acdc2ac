r"""Weights of two or three values, and inputs of two, with the gradients that train them.

Forward passes use the few values, updates go to real weights behind them; what a gradient is multiplied with on its way
there is what the methods differ in, besides the scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


def signs(x: Tensor) -> Tensor:
    """Return +1 where ``x >= 0`` and -1 elsewhere, in the type of ``x``.

    >>> signs(torch.tensor([-0.5, 0.0, 2.0])).tolist()
    [-1.0, 1.0, 1.0]
    """
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def random_signs(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    r"""Return +1 with probability :math:`\mathrm{clip}((x + 1)/2, 0, 1)`, else -1 (BinaryConnect, arXiv:1511.00363).

    Args:
        x: Real weights of any shape.
        generator: Source of randomness on the device of ``x``; the global one by default.

    >>> random_signs(torch.tensor([-1.0, 1.0])).tolist()
    [-1.0, 1.0]
    """
    uniform = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float32)
    return torch.where(uniform * 2 < x.float() + 1, 1.0, -1.0).to(x.dtype)


def glorot_bound(weight: Tensor) -> float:
    r"""Return :math:`\sqrt{1.5/(\text{in} + \text{out})}`, the size of a weight that is initialized after Glorot.

    What BinaryConnect's authors scale learning rates by: real weights within this bound change their sign after as many
    steps as weights within 1 at a rate that much larger.

    Args:
        weight: (out, in, ...); a kernel's positions count on both sides.

    >>> glorot_bound(torch.zeros(200, 400))
    0.05
    """
    positions = weight[0, 0].numel() if weight.dim() > 2 else 1
    return round(math.sqrt(1.5 / ((weight.shape[0] + weight.shape[1]) * positions)), 8)


class _Levels(torch.autograd.Function):
    """``levels * scale`` forward; backward the gradient times ``slope`` for ``x``, nothing for the others."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, levels: Tensor, scale: Tensor | None, slope: Tensor | None) -> Tensor:
        ctx.save_for_backward(slope)
        return levels.clone() if scale is None else levels * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        gradient = gradients[0]
        return (gradient if slope is None else gradient * slope), None, None, None


def straight_through(x: Tensor, levels: Tensor, scale: Tensor | None = None, slope: Tensor | None = None) -> Tensor:
    r"""Return ``levels * scale`` exactly, with the gradient of ``slope * x``.

    Args:
        x: What the gradient goes to.
        levels: Values of the same shape, taken as constants.
        scale: Factor, broadcast to ``levels``, taken as a constant; 1 by default.
        slope: What gradients are multiplied with; 1 by default.

    >>> x = torch.tensor([0.3, -2.0], requires_grad=True)
    >>> straight_through(x, signs(x), slope=(x.abs() <= 1).float()).sum().backward()
    >>> x.grad.tolist()
    [1.0, 0.0]
    """
    return cast(Tensor, _Levels.apply(x, levels, scale, slope))


def mean_by_filter(x: Tensor, groups: int = 1, transposed: bool = False) -> Tensor:
    """Return the mean over each filter (output) of a weight, in a shape that broadcasts to the weight.

    Args:
        x: (out, in / groups, ...), or (in, out / groups, ...) of a transposed convolution.
        groups: Groups of a transposed convolution, each of which has outputs of its own.
        transposed: Whether it belongs to a transposed convolution.

    >>> mean_by_filter(torch.tensor([[1.0, 3.0], [0.0, 4.0]])).tolist()
    [[2.0], [2.0]]
    >>> mean_by_filter(torch.tensor([[1.0, 3.0], [0.0, 4.0]]), transposed=True).tolist()
    [[0.5, 3.5], [0.5, 3.5]]
    """
    if not transposed:
        return x.mean(dim=tuple(range(1, x.dim())), keepdim=True)
    parts = x.unflatten(0, (groups, -1))  # (groups, in / groups, out / groups, ...)
    means = parts.mean(dim=(1, *range(3, parts.dim())), keepdim=True)
    narrow = [1] * (x.dim() - 2)
    return means.expand(-1, parts.shape[1], -1, *narrow).reshape(x.shape[0], x.shape[1], *narrow)


def scaled_sign_slope(weight: Tensor, scale: Tensor, shared: int) -> Tensor:
    r"""Return :math:`1/n + \alpha\,1_{|w| \le 1}`: what reaches a real weight of a scaled sign (arXiv:1603.05279).

    Args:
        weight: Real weights.
        scale: :math:`\alpha`, broadcast to ``weight``.
        shared: n, the number of weights that have one scale in common.

    >>> scaled_sign_slope(torch.tensor([[0.5, -2.0]]), torch.tensor([[1.25]]), 2).tolist()
    [[1.75, 0.5]]
    """
    return 1.0 / shared + scale * (weight.abs() <= 1)


def ternary_levels(weight: Tensor, threshold: float = 0.7) -> Tensor:
    r"""Return -1, 0 or +1 for each weight (Ternary Weight Networks, arXiv:1605.04711).

    Zero is where :math:`|w| \le t \cdot \mathrm{mean}|w|`, the sign elsewhere.

    Args:
        weight: Real weights of any shape.
        threshold: t; 0.7 is close to the best for weights that are normally distributed.

    >>> ternary_levels(torch.tensor([0.1, -1.0, 0.7, 0.2])).tolist()
    [0.0, -1.0, 1.0, 0.0]
    """
    magnitude = weight.abs()
    return torch.where(magnitude > threshold * magnitude.mean(), signs(weight), 0.0)


def ternary_scale(weight: Tensor, levels: Tensor) -> Tensor:
    """Return the mean magnitude of the weights whose level is not zero, the best scale for given levels; 0-dim.

    >>> ternary_scale(torch.tensor([0.1, -1.0, 0.5]), torch.tensor([0.0, -1.0, 1.0])).item()
    0.75
    """
    used = levels.abs()
    return (weight.abs() * used).sum() / used.sum().clamp_min(1)


def loss_aware_scale(weight: Tensor, curvature: Tensor) -> Tensor:
    r"""Return :math:`\lVert d \odot w\rVert_1 / \lVert d\rVert_1`, 0-dim (loss-aware binarization, arXiv:1611.01600).

    With :math:`\alpha` of this size, :math:`\alpha\,\mathrm{sign}(w)` is the proximal Newton step: the binary weights
    nearest to w in the metric of the diagonal Hessian d.

    Args:
        weight: Real weights, after the optimizer's step.
        curvature: d, at least 0, of the same shape: the root of an adaptive optimizer's second moment.

    >>> loss_aware_scale(torch.tensor([1.0, -3.0]), torch.tensor([3.0, 1.0])).item()
    1.5
    """
    total, magnitude = curvature.sum(), weight.abs()
    return torch.where(total > 0, (curvature * magnitude).sum() / total, magnitude.mean())  # without asking a GPU


def binarize_inputs(x: Tensor) -> Tensor:
    r"""Return the signs of ``x``; gradients pass where :math:`|x| \le 1` (BinaryNet, arXiv:1602.02830).

    >>> binarize_inputs(torch.tensor([0.2, -3.0])).tolist()
    [1.0, -1.0]
    """
    return straight_through(x, signs(x), slope=(x.abs() <= 1).to(x.dtype))


def input_scale(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: str | Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> Tensor:
    r"""Return XNOR-Net's scale of the inputs under every kernel, :math:`K = A * k` (arXiv:1603.05279, section 3.2).

    A is the mean of :math:`|x|` over the channels of a group, k a box filter of the kernel's size; what is padded
    counts as zero.

    Args:
        x: (batch, channels, ...) with as many dimensions behind as ``kernel`` has sizes, one to three.
        kernel: Sizes of the convolution's kernel.
        stride: As of the convolution.
        padding: As of the convolution.
        dilation: As of the convolution.
        groups: As of the convolution.

    Returns:
        (batch, groups, ...), as large as the convolution's output.

    >>> input_scale(torch.tensor([[[1.0, -3.0], [1.0, 1.0]]]), [2], [1], [0], [1]).tolist()
    [[[1.5]]]
    """
    means = x.abs().unflatten(1, (groups, -1)).mean(2)
    box = torch.full((groups, 1, *kernel), 1 / math.prod(kernel), dtype=x.dtype, device=x.device)
    convolve = cast(Any, _CONVOLUTIONS[len(kernel) - 1])
    return cast(Tensor, convolve(means, box, None, stride, padding, dilation, groups))
