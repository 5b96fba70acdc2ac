"""The best product of two thin matrices: Eckart and Young, by eigenvectors of the smaller Gram matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compress.low_rank.moments import Moment

_EXACT_UP_TO = 2048
"""Gram matrices up to this size are built in float64, where that costs seconds at most."""


def as_float(values: Tensor) -> Tensor:
    """Return detached values in at least float32: half precision has no eigenvectors."""
    values = values.detach()
    return values if values.dtype == torch.float64 else values.float()


def energy(values: Tensor) -> float:
    """Return the sum of squares, in float64 (float32 sums are 1 % off at a hundred million numbers), piece by piece.

    >>> energy(torch.tensor([3.0, 4.0]))
    25.0
    """
    pieces = values.detach().reshape(-1).split(_PIECE)
    return sum(float(piece.double().square().sum()) for piece in pieces)


_PIECE = 1 << 22


def gram(matrix: Tensor) -> Tensor:
    r"""Return :math:`W W^\top`; of large matrices its lower triangle alone, which is all that eigenvectors need.

    >>> gram(torch.tensor([[3.0, 4.0]])).tolist()
    [[25.0]]
    """
    size = len(matrix)
    if size <= _BLOCK:
        return matrix @ matrix.t()
    found = matrix.new_zeros(size, size)
    for start in range(0, size, _BLOCK):
        stop = min(start + _BLOCK, size)
        found[start:stop, :stop] = matrix[start:stop] @ matrix[:stop].t()
    return found


_BLOCK = 512
"""Rows that are multiplied at a time."""


def principal(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squared singular values of a matrix, falling, and the directions along its smaller side.

    >>> strengths, directions = principal(torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 2.0]]))
    >>> strengths.tolist(), directions.abs().tolist()
    ([9.0, 4.0], [[1.0, 0.0], [0.0, 1.0]])
    """
    thin = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()
    exact = thin.double() if thin.shape[0] <= _EXACT_UP_TO else thin
    values, vectors = torch.linalg.eigh(gram(exact))
    return values.clamp(min=0).flip(0), vectors.flip(1).to(matrix.dtype)


def gram_vectors(matrix: Tensor, rank: int) -> Tensor:
    r"""Return the leading left singular vectors of a matrix, from :math:`W W^\top`.

    Args:
        matrix: (m, n), best with m <= n.
        rank: How many.

    Returns:
        (m, rank), orthonormal, in the matrix's dtype, strongest first.

    >>> gram_vectors(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), 1).abs().tolist()
    [[0.0], [1.0]]
    """
    exact = matrix.double() if matrix.shape[0] <= _EXACT_UP_TO else matrix
    vectors: Tensor = torch.linalg.eigh(gram(exact))[1]
    return vectors[:, -rank:].flip(1).to(matrix.dtype)


def leading_vectors(matrix: Tensor, rank: int) -> Tensor:
    """Return the leading left singular vectors; of large matrices at a small rank by random projection.

    Subspace iteration from a seeded random start (Halko et al. 2011, arXiv 0909.4061), with half as many directions
    again as the rank and four rounds: then the error of a truncation is at most some 0.5 % above the optimum, for a
    matrix without any structure. Random states stay as they are.

    Args:
        matrix: (m, n), best with m <= n.
        rank: How many.
    """
    if matrix.shape[0] <= _EXACT_UP_TO or rank > matrix.shape[0] // 8:
        return gram_vectors(matrix, rank)
    start = torch.randn(matrix.shape[1], rank + rank // 2 + 10, generator=torch.Generator().manual_seed(0))
    seen = matrix @ start.to(matrix)
    for _ in range(4):
        seen = matrix @ (matrix.t() @ torch.linalg.qr(seen).Q)
    basis = torch.linalg.qr(seen).Q
    return basis @ gram_vectors(basis.t() @ matrix, rank)


def singular_values(matrix: Tensor) -> Tensor:
    """Return the singular values of a matrix, falling.

    >>> singular_values(torch.tensor([[0.0, 2.0], [3.0, 0.0]])).tolist()
    [3.0, 2.0]
    """
    thin = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()
    exact = thin.double() if thin.shape[0] <= _EXACT_UP_TO else thin
    values: Tensor = torch.linalg.eigvalsh(gram(exact))
    return values.clamp(min=0).sqrt().flip(0).to(matrix.dtype)


def split_matrix(
    matrix: Tensor, rank: int, moment: Moment | None = None, directions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Return the two factors of the best approximation of a given rank (truncated SVD, Eckart and Young 1936).

    .. math:: W \approx B A, \qquad B = U_k S_k^{1/2}, \quad A = S_k^{1/2} V_k^\top

    One factor is a projection of the matrix (:math:`U_k^\top W`), so that a full rank gives back the matrix itself.
    With the second moment :math:`M = \mathrm{E}\, x x^\top` of the inputs the error of the outputs is minimal instead,
    :math:`\lVert (W - B A) M^{1/2} \rVert_F` (whitening; Wang et al. 2024, arXiv 2403.07378). Directions in which there
    are no inputs count a little, so that M may be singular.

    Args:
        matrix: (m, n).
        rank: 1 to min(m, n).
        moment: Of the inputs; or nothing.
        directions: The first of those that :func:`principal` finds in the (whitened) matrix, at least as many as the
            rank; or nothing.

    Returns:
        B (m, rank) and A (rank, n), with norms that are even.

    >>> left, right = split_matrix(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), 1)
    >>> [[round(value, 6) for value in row] for row in (left @ right).tolist()]
    [[3.0, 0.0], [0.0, 0.0]]
    >>> from lightning_compress.low_rank.moments import SquareMoment
    >>> moment = SquareMoment(torch.diag(torch.tensor([0.01, 1.0])))
    >>> left, right = split_matrix(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), 1, moment)
    >>> [[round(value, 6) for value in row] for row in (left @ right).tolist()]
    [[0.0, 0.0], [0.0, 1.0]]
    """
    directions = None if directions is not None and directions.shape[1] < rank else directions
    if moment is not None:
        return _split_whitened(matrix, rank, moment, directions)
    if matrix.shape[0] > matrix.shape[1]:
        right, left = split_matrix(matrix.t(), rank, None, directions)
        return left.t(), right.t()
    left = leading_vectors(matrix, rank) if directions is None else directions[:, :rank]
    return balance(left, left.t() @ matrix)


def _split_whitened(matrix: Tensor, rank: int, moment: Moment, directions: Tensor | None) -> tuple[Tensor, Tensor]:
    if directions is None:
        directions = principal(moment.whiten(matrix))[1]
    turned = directions[:, :rank].double()
    if matrix.shape[0] <= matrix.shape[1]:
        left, right = turned, turned.t() @ matrix.double()
    else:
        left, right = moment.whiten(matrix) @ turned, moment.unwhiten(turned.t())
    left, right = balance(left, right)
    return left.to(matrix.dtype), right.to(matrix.dtype)


def balance(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Give each column of ``left`` and the row of ``right`` behind it the same norm; their product stays.

    >>> left, right = balance(torch.tensor([[1.0]]), torch.tensor([[4.0]]))
    >>> left.item(), right.item()
    (2.0, 2.0)
    """
    first, second = left.norm(dim=0), right.norm(dim=1)
    usable = (first > 0) & (second > 0)
    scale = torch.where(usable, second / torch.where(usable, first, 1), 1.0).sqrt()
    return left * scale, right / scale[:, None]
