"""Ranges of weights, which are at hand as a whole: by channel or for the tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compress.quantization.affine import affine_parameters, along, exact, symmetric_scale
from lightning_compress.quantization.spec import QuantizerSpec


def peak_of(weight: Tensor, axis: int | None) -> Tensor:
    """Return the greatest magnitude, for each index along ``axis`` or of all."""
    if axis is None:
        return exact(torch.maximum(weight.amax(), -weight.amin()))
    rows = weight.movedim(axis, 0).flatten(1)
    return exact(torch.maximum(rows.amax(1), -rows.amin(1)))


def rows_of(weight: Tensor, axis: int | None) -> Tensor:
    """Return the weight as a matrix with a row for each channel, in float32 at least; one row if ``axis`` is None."""
    rows = exact(weight.detach())
    return rows.reshape(1, -1) if axis is None else rows.movedim(axis, 0).flatten(1)


def weight_range(weight: Tensor, spec: QuantizerSpec, axis: int | None) -> tuple[Tensor, Tensor]:
    """Return scale and zero point for a weight by the rule of ``spec.range``.

    Args:
        weight: Any shape.
        spec: ``"percentile"`` and ``"mse"`` are followed, everything else covers the weight.
        axis: Dimension of the channels; ``None`` for one scale.

    >>> spec = QuantizerSpec(8, symmetric=True, range="minmax")
    >>> weight_range(torch.tensor([1.27, -0.5]), spec, None)
    (tensor(0.0100), tensor(0, dtype=torch.int32))
    """
    rows = rows_of(weight, axis)
    low, high = rows.amin(1), rows.amax(1)
    if spec.range == "percentile":
        tail = 1 - spec.percentile / 100
        low, high = (_quantile(rows, share) for share in (tail, 1 - tail))
    elif spec.range == "mse":
        low, high = _least_squares(rows, low, high, spec)
    scale, zero_point = _parameters(low, high, spec)
    return (scale[0], zero_point[0]) if axis is None else (scale, zero_point)


def _parameters(low: Tensor, high: Tensor, spec: QuantizerSpec) -> tuple[Tensor, Tensor]:
    if spec.symmetric:
        scale = symmetric_scale(torch.maximum(-low, high), spec.bounds)
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    return affine_parameters(low, high, spec.bounds)


def _quantile(rows: Tensor, share: float) -> Tensor:
    """Return a quantile of each row, between neighbours in proportion (``torch.quantile`` takes 16 M values only)."""
    place = share * (rows.shape[1] - 1)
    ordered = rows.sort(dim=1).values
    below = ordered[:, int(place)]
    return torch.lerp(below, ordered[:, min(int(place) + 1, rows.shape[1] - 1)], place - int(place))


def _least_squares(
    rows: Tensor, low: Tensor, high: Tensor, spec: QuantizerSpec, tries: int = 48
) -> tuple[Tensor, Tensor]:
    """Return the range of each row, shrunk by one of some shares, with the least squared error."""
    best = torch.full_like(low, torch.inf)
    chosen_low, chosen_high = low, high
    for step in range(tries):
        share = 1 - step * 0.8 / tries
        scale, zero_point = _parameters(low * share, high * share, spec)
        zero = along(zero_point, rows, 0)
        wide = along(scale, rows, 0)
        q = torch.round(rows / wide).clamp_(spec.bounds[0] - zero, spec.bounds[1] - zero)
        error = q.mul_(wide).sub_(rows).square_().sum(1)
        better = error < best
        best = torch.where(better, error, best)
        chosen_low = torch.where(better, low * share, chosen_low)
        chosen_high = torch.where(better, high * share, chosen_high)
    return chosen_low, chosen_high
