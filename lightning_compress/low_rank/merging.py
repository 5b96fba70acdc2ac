"""Factors multiplied out again, with what stands between them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.low_rank.matrix import as_float
from lightning_compress.low_rank.methods import method_named
from lightning_compress.low_rank.shapes import LayerShape, blocks_of

NORMS: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""What can stand between the factors of a convolution with 1, 2 and 3 axes."""

Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
Affine = tuple[Tensor, Tensor]
"""Scale and shift of each channel."""


def multiply(method: str, weights: Sequence[Tensor], shapes: Sequence[LayerShape], whole: LayerShape) -> Tensor:
    r"""Return the product of factors as (groups, out, in, \*kernel), see ``blocks_of``.

    Args:
        method: Name of the method that made them.
        weights: In the order in which they run.
        shapes: Of the factors.
        whole: Shape of the layer that they make together.
    """
    ordered = list(zip(weights, shapes, strict=True))
    if shapes[0].kind == "conv_transpose":
        ordered = ordered[::-1]
    groups = whole.groups
    blocks = [
        blocks_of(weight, shape) if shape.kind == "embedding" else weight.unflatten(0, (groups, -1))
        for weight, shape in ordered
    ]
    merge = method_named(method).merge
    return torch.stack([merge([block[group] for block in blocks], whole) for group in range(groups)])


def affine_of(norm: Norm) -> Affine:
    """Return the scale and the shift of a batch norm in evaluation mode.

    >>> [round(value.item(), 4) for value in affine_of(nn.BatchNorm2d(1, eps=0.0))]
    [1.0, 0.0]
    """
    if norm.running_var is None or norm.running_mean is None:
        raise ConfigurationError("a batch norm without running statistics cannot be folded: it normalizes each batch")
    scale = (as_float(norm.running_var) + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * as_float(norm.weight)
    shift = -as_float(norm.running_mean) * scale
    return scale, shift if norm.bias is None else shift + as_float(norm.bias)


def absorb(
    weights: Sequence[Tensor], shapes: Sequence[LayerShape], norms: Sequence[Affine]
) -> tuple[list[Tensor], Tensor]:
    """Return weights that contain the scales of the batch norms behind them, and what the shifts add to the output.

    Args:
        weights: Of the factors, in the order in which they run.
        shapes: Of the factors; only the first may pad, so that a shift reaches all positions alike.
        norms: Scale and shift behind each factor but the last.

    Returns:
        The weights, and one number for each output channel.
    """
    scaled, shift = list(weights), torch.zeros(norms[0][0].shape, device=norms[0][0].device)
    for index, (scale, added) in enumerate(norms):
        scaled[index] = scaled[index] * scale.reshape(-1, *(1,) * (scaled[index].dim() - 1))
        groups = shapes[index + 1].groups
        mixing = scaled[index + 1].flatten(2).sum(2).unflatten(0, (groups, -1))
        shift = (mixing @ (added + shift * scale).reshape(groups, -1, 1)).flatten()
    return scaled, shift
