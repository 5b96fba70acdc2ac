r"""Rounding a layer's weights so that its own outputs change least: column by column with the inverse Hessian (GPTQ).

For one output row the squared error is the quadratic :math:`\frac{1}{2}\,\delta H \delta^\top` with
:math:`H = \frac{2}{n} X X^\top`, the same for all rows that see the same inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_compress.core.hessians import damp

_BLOCK = 128
"""Columns whose errors reach the columns behind them in one product."""
_WORTH = 1e-3
"""Share of the error of a row that another sweep should save."""


@dataclass(frozen=True)
class Grid:
    """The values that the rows of a weight can take.

    Args:
        scale: (rows, 1) or (1, 1).
        zero_point: Of the same shape.
        bounds: Least and greatest integer.
    """

    scale: Tensor
    zero_point: Tensor
    bounds: tuple[int, int]

    def integers(self, values: Tensor, toward: float | None = None) -> Tensor:
        """Return the nearest integers of (rows, columns) values, less the zero point.

        >>> grid = Grid(torch.tensor([[0.5]]), torch.tensor([[0]]), (-1, 1))
        >>> grid.integers(torch.tensor([[0.3, 9.0]])).tolist()
        [[1.0, 1.0]]
        """
        return self.clamp(torch.round(values / self.scale))

    def clamp(self, integers: Tensor) -> Tensor:
        """Return integers, less the zero point, within the bounds."""
        low, high = self.bounds[0] - self.zero_point, self.bounds[1] - self.zero_point
        return torch.minimum(torch.maximum(integers, low.to(integers.dtype)), high.to(integers.dtype))

    def nearest(self, values: Tensor) -> Tensor:
        """Return the nearest values on the grid; zero is one of them."""
        return self.integers(values) * self.scale


def without_bias(hessian: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return the Hessian of the weights once the bias is the best for them, and the mean of each input.

    .. math:: H' = H_{ww} - H_{wb} H_{bw} / H_{bb},\qquad \Delta b = -\delta\, H_{wb} / H_{bb}

    Args:
        hessian: (groups, d + 1, d + 1), the bias last.

    Returns:
        (groups, d, d), and (groups, d).

    >>> without_bias(torch.tensor([[[5.0, 2.0], [2.0, 1.0]]]))
    (tensor([[[1.]]]), tensor([[2.]]))
    """
    means = hessian[:, :-1, -1] / hessian[:, -1:, -1]
    return hessian[:, :-1, :-1] - hessian[:, :-1, -1:] * means[:, None, :], means


def output_error(change: Tensor, hessian: Tensor) -> float:
    r"""Return :math:`\frac{1}{2} \sum_r \delta_r H \delta_r^\top`, the mean squared error of a layer's outputs, summed.

    >>> output_error(torch.tensor([[1.0, 2.0]]), torch.eye(2))
    2.5
    """
    return float(0.5 * torch.einsum("ri,ij,rj->", change, hessian, change))


def gptq_round(rows: Tensor, hessian: Tensor, grid: Grid, damping: float = 0.01) -> Tensor:
    r"""Round a weight column by column; what is left adapts to each error (Frantar et al. 2023, arXiv:2210.17323).

    With :math:`H^{-1} = U^\top U`, column j becomes q and every later column k moves:

    .. math:: w_k \leftarrow w_k - \frac{w_j - q}{U_{jj}}\, U_{jk}

    which is the optimal move of Optimal Brain Compression (arXiv:2208.11580) in a fixed order; the columns with the
    largest inputs go first. Weights that are zero stay zero, and the others make up for them. A row that would
    have been better off rounded to the nearest values is.

    Args:
        rows: (rows, d).
        hessian: (d, d), not damped.
        grid: The values allowed.
        damping: Share of the Hessian's mean diagonal that is added to it, above 0.

    Returns:
        (rows, d) on the grid, in the type of ``hessian``.

    Raises:
        ConfigurationError: If the Hessian is all zero or not finite.

    >>> hessian = torch.tensor([[2.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    >>> grid = Grid(torch.ones(1, 1), torch.zeros(1, 1), (-7, 7))
    >>> gptq_round(torch.tensor([[0.4, 1.3]]), hessian, grid, damping=1e-9).tolist()
    [[0.0, 2.0]]
    """
    order = hessian.diagonal().argsort(descending=True, stable=True)
    damped = damp(hessian, damping)[order][:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(inverse, upper=True)
    left = rows.to(hessian.dtype)[:, order]
    kept, rounded = rows[:, order] == 0, torch.zeros_like(left)
    for start in range(0, left.shape[1], _BLOCK):
        stop = min(start + _BLOCK, left.shape[1])
        errors = torch.zeros_like(left[:, start:stop])
        for j in range(start, stop):
            rounded[:, j] = grid.nearest(left[:, j : j + 1])[:, 0].masked_fill(kept[:, j], 0.0)
            errors[:, j - start] = (left[:, j] - rounded[:, j]) / upper[j, j]
            left[:, j + 1 : stop] -= errors[:, j - start, None] * upper[j, j + 1 : stop]
        left[:, stop:] -= errors @ upper[start:stop, stop:]
    rounded, nearest = rounded[:, order.argsort()] + 0.0, grid.nearest(rows).to(hessian.dtype)  # + 0.0: no -0.0
    worse = _row_errors(rounded - rows, hessian) > _row_errors(nearest - rows, hessian)
    return torch.where(worse[:, None], nearest, rounded)


def fitted_scale(rows: Tensor, integers: Tensor, hessian: Tensor) -> Tensor:
    r"""Return the scale of each row with which given integers change the outputs least.

    .. math:: s = \frac{q H w^\top}{q H q^\top}

    Args:
        rows: (rows, d), w.
        integers: (rows, d), q, less the zero point.
        hessian: (d, d).

    Returns:
        (rows, 1) in the type of ``hessian``; 0 for rows of which no positive scale is the best.

    >>> fitted_scale(torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 1.0]]), torch.eye(2)).tolist()
    [[1.5]]
    """
    q = integers.to(hessian.dtype)
    seen = q @ hessian
    up, down = (seen * rows).sum(1, keepdim=True), (seen * q).sum(1, keepdim=True)
    return torch.where(down > 0, up / down.clamp_min(torch.finfo(down.dtype).tiny), 0.0).clamp_min(0.0)


def gptq_fit(rows: Tensor, hessian: Tensor, grid: Grid, damping: float = 0.01, sweeps: int = 3) -> tuple[Tensor, Grid]:
    """Round as :func:`gptq_round`, fit the scales to the integers, round again on the new grid, and so on.

    With few bits a range that suits the weights is not the one that suits the outputs. No row gets worse: what is kept
    is the best that was seen of each.

    Args:
        rows: (rows, d).
        hessian: (d, d), not damped.
        grid: With a scale for each row; a single one stays as it is.
        damping: Share of the Hessian's mean diagonal that is added to it, above 0.
        sweeps: How often, at least 0.

    Returns:
        (rows, d) in the type of ``hessian``, and the grid that they are on.

    >>> hessian = torch.tensor([[2.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    >>> grid = Grid(torch.tensor([[0.8]]), torch.zeros(1, 1), (-1, 1))
    >>> rounded, fitted = gptq_fit(torch.tensor([[1.0, 1.0]]), hessian, grid)
    >>> rounded.tolist(), round(fitted.scale.item(), 3)
    ([[1.0, 1.0]], 1.0)
    """
    best = gptq_round(rows, hessian, grid, damping)
    if len(grid.scale) != len(rows):
        return best, grid
    errors = _row_errors(best - rows, hessian)
    for _ in range(sweeps):
        integers = grid.integers(best)
        scale = fitted_scale(rows, integers, hessian).to(grid.scale.dtype)
        fitted = replace(grid, scale=torch.where(scale > 0, scale, grid.scale))
        moved = False
        for found in (integers * fitted.scale, gptq_round(rows, hessian, fitted, damping)):
            found_errors = _row_errors(found - rows, hessian)
            better = found_errors < errors
            moved |= bool((found_errors < (1 - _WORTH) * errors).any())
            best = torch.where(better[:, None], found.to(best.dtype), best)
            grid = replace(grid, scale=torch.where(better[:, None], fitted.scale, grid.scale))
            errors = torch.where(better, found_errors, errors)
        if not moved:
            break
    return best, grid


def _row_errors(change: Tensor, hessian: Tensor) -> Tensor:
    return ((change.to(hessian.dtype) @ hessian) * change).sum(1)
