"""Rounding up or down by gradient descent (AdaRound)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compress.core.hessians import damp
from lightning_compress.quantization.post_training.rounding import Grid

STRETCH = (-0.1, 1.1)
"""Range of the sigmoid before it is clipped to 0 to 1."""
_SHARPNESS = (20.0, 2.0)
_WARM_UP = 0.2
_WEIGHT = 30.0
"""Of the penalty, beside the error as a share of that of rounding to the nearest."""


def rectified_sigmoid(v: Tensor) -> Tensor:
    r"""Return :math:`h(v) = \mathrm{clip}(\sigma(v)\,(\zeta - \gamma) + \gamma, 0, 1)`, gamma = -0.1 and zeta = 1.1.

    >>> rectified_sigmoid(torch.tensor([-9.0, 0.0, 9.0]))
    tensor([0.0000, 0.5000, 1.0000])
    """
    return (torch.sigmoid(v) * (STRETCH[1] - STRETCH[0]) + STRETCH[0]).clamp(0, 1)


def rounding_penalty(h: Tensor, sharpness: float) -> Tensor:
    r"""Return the mean of :math:`1 - |2h - 1|^\beta`, which is 0 where every h is 0 or 1.

    >>> float(rounding_penalty(torch.tensor([0.0, 0.5]), 2.0))
    0.5
    """
    return (1 - (2 * h - 1).abs().pow(sharpness)).mean()


def ada_round(
    rows: Tensor, hessian: Tensor, grid: Grid, damping: float = 0.01, iterations: int = 300, rate: float = 0.05
) -> Tensor:
    r"""Choose for each weight whether it is rounded up or down (Nagel et al. 2020, arXiv:2004.10568).

    .. math:: \hat w = s \cdot \mathrm{clamp}(\lfloor w / s \rfloor + h(v)),\qquad
              \min_v \tfrac{1}{2}\, \delta H \delta^\top + \lambda \sum (1 - |2 h(v) - 1|^\beta)

    by Adam. The error is that of all calibration inputs, which the Hessian sums up, so every step is exact and nothing
    is random. The error counts as a share of that of rounding to the nearest; beta falls from 20 to 2. Should nearest
    rounding be better in the end, it is returned: the result is never worse.

    Args:
        rows: (rows, d).
        hessian: (d, d), not damped.
        grid: The values allowed.
        damping: Share of the Hessian's mean diagonal that is added to it, above 0.
        iterations: Steps, 1 or more.
        rate: Adam's learning rate.

    Returns:
        (rows, d) on the grid, in the type of ``hessian``; zeros stay zeros.

    Raises:
        ConfigurationError: If the Hessian is all zero or not finite.

    >>> hessian = torch.tensor([[2.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    >>> grid = Grid(torch.ones(1, 1), torch.zeros(1, 1), (-7, 7))
    >>> ada_round(torch.tensor([[0.4, 1.3]]), hessian, grid).tolist()
    [[1.0, 1.0]]
    """
    weight, curvature = rows.detach().to(hessian.dtype), damp(hessian, damping)
    scale = grid.scale.to(hessian.dtype)
    below = torch.floor(weight / scale)
    best = nearest = grid.nearest(weight).to(hessian.dtype)
    least = goal = _error(nearest - weight, curvature)
    if not bool(goal > 0):
        return nearest
    inside = grid.clamp(torch.round(weight / scale)) == torch.round(weight / scale)
    free = inside & (rows != 0)
    share = ((weight / scale - below) - STRETCH[0]) / (STRETCH[1] - STRETCH[0])
    with torch.enable_grad():
        v = torch.logit(share).requires_grad_()
        optimizer = torch.optim.Adam([v], rate)
        for step in range(iterations):
            progress = max(0.0, (step / iterations - _WARM_UP) / (1 - _WARM_UP))
            h = rectified_sigmoid(v)
            soft = torch.where(free, grid.clamp(below + h) * scale, nearest)
            loss = _error(soft - weight, curvature) / goal
            if step >= _WARM_UP * iterations:
                sharpness = _SHARPNESS[0] + (_SHARPNESS[1] - _SHARPNESS[0]) * progress
                loss = loss + _WEIGHT * rounding_penalty(h, sharpness)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    rounded = grid.clamp(below + (v.detach() >= 0)) * scale
    rounded = torch.where(free, rounded, nearest)
    if _error(rounded - weight, curvature) < least:
        best = rounded
    return best


def _error(change: Tensor, hessian: Tensor) -> Tensor:
    return 0.5 * ((change @ hessian) * change).sum()
