"""Tucker-2 by alternating projections, and tensor trains by successive SVDs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_compress.low_rank.matrix import energy, gram_vectors


def tucker2(
    weight: Tensor, ranks: tuple[int, int], steps: int = 20, tolerance: float = 1e-4
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return the Tucker-2 factors of a kernel (Kim et al. 2016, arXiv 1511.06530).

    .. math:: W \approx G \times_1 U_{out} \times_2 U_{in}

    Higher-order orthogonal iteration: each basis becomes the leading eigenvectors of the Gram matrix of the weight seen
    through the other one. With orthonormal bases the squared error is :math:`\lVert W \rVert^2 - \lVert G \rVert^2`.
    The kernel is kept as one matrix (out, in) for each position, so that nothing is ever unfolded. Wide sides are
    turned in float32 first, and in float64 only where the error is so small that this makes a difference.

    Args:
        weight: (out, in, positions).
        ranks: Of the input and of the output side.
        steps: Iterations at most; two or three are usual.
        tolerance: Stop when the relative error falls by less.

    Returns:
        U_in (in, r_in), G (r_out, r_in, positions), U_out (out, r_out).

    >>> generator = torch.Generator().manual_seed(0)
    >>> into, core, out = tucker2(torch.randn(6, 4, 9, generator=generator), (4, 6))
    >>> into.shape, core.shape, out.shape
    (torch.Size([4, 4]), torch.Size([6, 4, 9]), torch.Size([6, 6]))
    """
    slices = weight.permute(2, 0, 1).contiguous()
    whole = energy(slices)
    into = _leading(slices.mT, ranks[0], exact=False)
    into, core, out, error = _alternate(slices, whole, into, ranks, steps, tolerance, exact=False)
    if error < _FINE and max(weight.shape[:2]) > _EXACT_UP_TO and weight.dtype == torch.float32:
        into = _leading(slices.mT, ranks[0], exact=True)
        into, core, out, _ = _alternate(slices, whole, into, ranks, steps, tolerance, exact=True)
    return into, core.permute(1, 2, 0).contiguous(), out


_EXACT_UP_TO = 192
"""Sides up to this many channels are always turned in float64, which costs milliseconds."""
_FINE = 0.05
"""Relative error below which directions matter that float32 cannot tell from rounding errors of the largest."""


def _alternate(
    slices: Tensor, whole: float, into: Tensor, ranks: tuple[int, int], steps: int, tolerance: float, exact: bool
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Renew both bases in turn until the error hardly falls; returns U_in, G (positions, ...), U_out, the error."""
    before = math.inf
    for _ in range(steps):
        out = _leading(slices @ into, ranks[1], exact)
        inside = out.t() @ slices  # (positions, r_out, in)
        into = _leading(inside.mT, ranks[0], exact)
        core = inside @ into
        error = math.sqrt(max(0.0, whole - energy(core)) / whole) if whole else 0.0
        if before - error < tolerance:
            break
        before = error
    return into, core, out, error


def _leading(parts: Tensor, rank: int, exact: bool) -> Tensor:
    """Return the leading left singular vectors of matrices (n, size, any) side by side: (size, rank)."""
    size = parts.shape[1]
    if rank == size:
        return torch.eye(size, dtype=parts.dtype, device=parts.device)
    dtype = parts.dtype
    parts = parts.double() if exact or size <= _EXACT_UP_TO else parts
    gram = torch.zeros(size, size, dtype=parts.dtype, device=parts.device)
    for part in parts:
        gram.addmm_(part, part.t())
    vectors: Tensor = torch.linalg.eigh(gram)[1]
    return vectors[:, -rank:].flip(1).to(dtype)


def tensor_train(tensor: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    r"""Return the cores of a tensor train (TT-SVD, Oseledets 2011).

    .. math:: X_{i_1 \dots i_d} \approx \sum G^1_{i_1 r_1} G^2_{r_1 i_2 r_2} \cdots G^d_{r_{d-1} i_d}

    The error is at most the root of the summed squares that the d - 1 truncations leave out.

    Args:
        tensor: Of any number of dimensions.
        ranks: One less; each at most what :func:`train_ranks` says.

    Returns:
        Cores (r_before, size, r_after), of which the first has r_before = 1 and the last r_after = 1.

    >>> cores = tensor_train(torch.randn(3, 4, 5), (3, 5))
    >>> [tuple(core.shape) for core in cores]
    [(1, 3, 3), (3, 4, 5), (5, 5, 1)]
    """
    rest, cores, before = tensor, [], 1
    for size, rank in zip(tensor.shape[:-1], ranks, strict=True):
        left, rest = _orthogonal_split(rest.reshape(before * size, -1), rank)
        cores.append(left.reshape(before, size, rank))
        before = rank
    return [*cores, rest.reshape(before, tensor.shape[-1], 1)]


def train_ranks(sizes: Sequence[int], ranks: Sequence[int] | None = None) -> tuple[int, ...]:
    """Return the largest ranks of use for a tensor of these sizes, at most ``ranks``.

    >>> train_ranks((3, 4, 5)), train_ranks((3, 4, 5), (2, 100))
    ((3, 5), (2, 5))
    """
    found = list(ranks) if ranks is not None else [math.prod(sizes)] * (len(sizes) - 1)
    for index, before in enumerate([1, *found[:-1]]):
        before = 1 if index == 0 else found[index - 1]
        found[index] = min(found[index], before * sizes[index])
    for index in reversed(range(len(found))):
        after = 1 if index == len(found) - 1 else found[index + 1]
        found[index] = min(found[index], after * sizes[index + 1])
    return tuple(found)


def _orthogonal_split(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best product of a given rank, its left factor with orthonormal columns."""
    if matrix.shape[0] <= matrix.shape[1]:
        left = gram_vectors(matrix, rank)
        return left, left.t() @ matrix
    right = gram_vectors(matrix.t(), rank)
    left = matrix @ right
    sizes = left.norm(dim=0)
    return left / torch.where(sizes > 0, sizes, 1), sizes[:, None] * right.t()


def balanced_factors(number: int, count: int) -> tuple[int, ...]:
    """Return ``count`` numbers of nearly equal size whose product is ``number``, rising.

    >>> balanced_factors(25088, 3), balanced_factors(7, 2)
    ((28, 28, 32), (1, 7))
    """
    found, rest, divisor, primes = [1] * count, number, 2, []
    while rest > 1:
        if rest % divisor == 0:
            primes.append(divisor)
            rest //= divisor
        else:
            divisor = divisor + 1 if divisor * divisor <= rest else rest
    for prime in reversed(primes):
        found[found.index(min(found))] *= prime
    return tuple(sorted(found))
