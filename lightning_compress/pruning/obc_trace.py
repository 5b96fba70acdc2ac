"""Greedy removal of weights, each row by its own inverse Hessian (Frantar & Alistarh 2022, arXiv:2208.11580).

The exact rule removes one weight of a row at a time and downdates the inverse by rank 1. Here a block of removals is
kept as vectors, from which single columns of the downdated inverse follow, and is then taken off the inverses of many
rows at once with one matrix product: the same numbers, at the speed of matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_compress.core.errors import ConfigurationError

_BLOCK = 32
_SPARSE = 0.7
_CHUNK_BYTES = 1 << 27


@dataclass(frozen=True)
class Trace:
    """In which order each row would lose its weights, and at what price.

    Args:
        order: Column indices (rows, steps).
        losses: Rise of the row's squared error at each removal (rows, steps).
    """

    order: Tensor
    losses: Tensor


@dataclass(frozen=True)
class Pattern:
    """How many columns of each set may go from each row.

    Args:
        sets: The set of each column, counted from 0, (columns,).
        most: How many of a set may go.
    """

    sets: Tensor
    most: int


def input_pattern(inputs: int, positions: int, n: int, m: int) -> Pattern:
    """Return the pattern that keeps n of every m consecutive inputs, at each position of a kernel by itself.

    Args:
        inputs: A multiple of m.
        positions: Of the kernel; 1 for matrices.
        n: How many stay.
        m: Of how many.

    >>> input_pattern(4, 2, 1, 2).sets.tolist()
    [0, 1, 0, 1, 2, 3, 2, 3]
    """
    column = torch.arange(inputs * positions)
    return Pattern(column // positions // m * positions + column % positions, m - n)


def obc_trace(
    weight: Tensor,
    hessian: Tensor,
    steps: int | None = None,
    prunable: int | None = None,
    pattern: Pattern | None = None,
) -> Trace:
    r"""Remove the weights of each row greedily, with downdates of the row's own inverse Hessian.

    .. math:: p = \arg\min_p \frac{w_p^2}{[H^{-1}]_{pp}}, \quad w \leftarrow w - H^{-1} e_p \frac{w_p}{[H^{-1}]_{pp}}

    Takes about ``2 d^3 / 3`` operations a row, nearly all of them in matrix products.

    Args:
        weight: (rows, d).
        hessian: Positive definite (d, d), shared by the rows.
        steps: How many weights to remove of each row; default all that may go.
        prunable: Only the first so many columns may go (what follows is a bias); default all.
        pattern: Sets among the first ``prunable`` columns of which only so many may go.

    Returns:
        Order and losses; nothing is changed.

    Raises:
        ConfigurationError: If shapes do not fit, ``steps`` is out of range, or the Hessian is not positive definite.

    >>> H = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> obc_trace(torch.tensor([[1.0, 3.0], [3.0, 1.0]]), H).order.tolist()
    [[0, 1], [1, 0]]
    """
    size = weight.shape[1]
    limit = size if prunable is None else prunable
    most = limit if pattern is None else int(torch.bincount(pattern.sets).clamp(max=pattern.most).sum())
    steps = most if steps is None else steps
    if hessian.shape != (size, size):
        raise ConfigurationError(f"`hessian` must be ({size}, {size}), got {tuple(hessian.shape)}")
    if not 0 <= steps <= most <= limit <= size:
        raise ConfigurationError(f"`steps` must lie in 0..{min(most, limit)}, got {steps}")
    hessian, value = hessian.double(), weight.detach().double()
    if pattern is not None:
        return _trace_all(value, _inverse(hessian), steps, limit, pattern)
    tied = (hessian - hessian.diagonal().diag() != 0).any(0)
    tied[limit:] = True
    alone, joined = (~tied).nonzero().flatten(), tied.nonzero().flatten()
    inverse = _inverse(hessian[joined[:, None], joined])
    shared = min(steps, int((joined < limit).sum()))
    found = _trace_all(value[:, joined], inverse, shared, limit - alone.numel())
    found = Trace(joined[found.order], found.losses)
    return _with_alone(found, alone, value[:, alone].square() * hessian.diagonal()[alone], steps)


def _with_alone(trace: Trace, alone: Tensor, prices: Tensor, steps: int) -> Trace:
    """Add columns that have nothing in common with others (inputs that are always 0), whose price never changes."""
    cheapest = prices.argsort(1)
    order = torch.cat([alone[cheapest], trace.order], 1)
    losses = torch.cat([prices.gather(1, cheapest), trace.losses], 1)
    rank = torch.cat([prices.gather(1, cheapest), trace.losses.cummax(1).values], 1).argsort(stable=True, dim=1)[
        :, :steps
    ]
    return Trace(order.gather(1, rank), losses.gather(1, rank))


def _inverse(hessian: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(hessian)
    if bool(info.any()):
        raise ConfigurationError("`hessian` is not positive definite; raise `damping` or give more calibration data")
    return torch.cholesky_inverse(factor)


def _trace_all(weight: Tensor, inverse: Tensor, steps: int, prunable: int, pattern: Pattern | None = None) -> Trace:
    chunk = max(1, _CHUNK_BYTES // (8 * max(1, len(inverse)) ** 2))
    parts = [_Rows(part, inverse, prunable, pattern).remove(steps) for part in weight.split(chunk)]
    return Trace(torch.cat([part.order for part in parts]), torch.cat([part.losses for part in parts]))


class _Rows:
    """Some rows of a weight, what is left of their inverse Hessians, and the removals that are not in those yet."""

    def __init__(self, weight: Tensor, inverse: Tensor, prunable: int, pattern: Pattern | None) -> None:
        (count, size), device = weight.shape, weight.device
        self.rows = torch.arange(count, device=device)
        self.value, self.place = weight.clone(), torch.arange(size, device=device).expand(count, size)
        self.inverse, self.shared = inverse.expand(count, size, size), True
        self.diagonal = inverse.diagonal().expand(count, size).clone()
        self.open, self.alive = self.place < prunable, torch.ones_like(weight, dtype=torch.bool)
        self.vectors, self.used = weight.new_empty(count, min(_BLOCK, size), size), 0
        self.sets: Tensor | None = None
        if pattern is not None:  # columns that may not go are in a set of their own
            own = pattern.sets.to(device)
            self.sets = torch.cat([own, own.max() + 1 + torch.arange(size - len(own), device=device)]).expand(
                count, size
            )
            self.room = torch.full((count, int(self.sets.max()) + 1), pattern.most, device=device)

    def remove(self, steps: int) -> Trace:
        """Remove so many weights of each row, the cheapest next one each time."""
        count = len(self.rows)
        order = torch.empty(count, steps, dtype=torch.long, device=self.rows.device)
        losses = self.value.new_empty(count, steps)
        for step in range(steps):
            if self.used == self.vectors.shape[1]:
                self._take_off()
            prices = torch.where(self.open, self.value.square() / self.diagonal, torch.inf)
            losses[:, step], worst = prices.min(1)
            order[:, step] = self.place[self.rows, worst]
            self._remove(worst)
        return Trace(order, losses)

    def _remove(self, worst: Tensor) -> None:
        rows, known = self.rows, self.vectors[:, : self.used]
        column = self.inverse[rows, worst]
        if self.used:
            column = column - torch.bmm(known[rows, :, worst].unsqueeze(1), known).squeeze(1)
        pivot = column[rows, worst].unsqueeze(1)
        self.value -= column * (self.value[rows, worst].unsqueeze(1) / pivot)
        vector = column / pivot.sqrt()
        self.diagonal -= vector.square()
        self.vectors[:, self.used] = vector
        self.used += 1
        self.open[rows, worst], self.alive[rows, worst] = False, False
        if self.sets is not None:
            group = self.sets[rows, worst]
            self.room[rows, group] -= 1
            full = self.room[rows, group] == 0
            self.open &= ~(full.unsqueeze(1) & (self.sets == group.unsqueeze(1)))

    def _take_off(self) -> None:
        """Downdate the inverses by the removals so far, and now and then drop the rows and columns that are gone."""
        vectors, own = self.vectors[:, : self.used], self.inverse
        if int(self.alive[0].sum()) < _SPARSE * self.alive.shape[1]:
            kept = self.alive.nonzero()[:, 1].reshape(len(self.rows), -1)
            own = own[self.rows[:, None, None], kept[:, :, None], kept[:, None, :]]
            vectors = vectors.gather(2, kept.unsqueeze(1).expand(-1, self.used, -1))
            self.value, self.place, self.open = (t.gather(1, kept) for t in (self.value, self.place, self.open))
            self.sets = None if self.sets is None else self.sets.gather(1, kept)
            self.alive = torch.ones_like(self.open)
        elif self.shared:
            own = own.clone()
        self.shared = False
        self.inverse = own.baddbmm_(vectors.transpose(1, 2), vectors, alpha=-1)
        self.diagonal = own.diagonal(dim1=1, dim2=2).clone()
        count, size = self.value.shape
        self.vectors, self.used = vectors.new_empty(count, min(_BLOCK, size), size), 0
