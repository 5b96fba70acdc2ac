r"""Rounding a layer's weights so that its own outputs change least: column by column with the inverse Hessian (GPTQ).

For one output row the squared error is the quadratic :math:`\frac{1}{2}\,\delta H \delta^\top` with
:math:`H = \frac{2}{n} X X^\top`, the same for all rows that see the same inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_compress.core.hessians import damp

_BLOCK = 128
"""Columns whose errors reach the columns behind them in one product."""


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


def _row_errors(change: Tensor, hessian: Tensor) -> Tensor:
    return ((change.to(hessian.dtype) @ hessian) * change).sum(1)
