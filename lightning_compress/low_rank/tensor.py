"""Tucker-2 by alternating projections, and tensor trains by successive SVDs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_compress.low_rank.matrix import gram_vectors


def tucker2(
    weight: Tensor, ranks: tuple[int, int], steps: int = 20, tolerance: float = 1e-4
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return the Tucker-2 factors of a kernel (Kim et al. 2016, arXiv 1511.06530).

    .. math:: W \approx G \times_1 U_{out} \times_2 U_{in}

    Higher-order orthogonal iteration: each basis becomes the leading eigenvectors of the Gram matrix of the weight seen
    through the other one. With orthonormal bases the squared error is :math:`\lVert W \rVert^2 - \lVert G \rVert^2`.

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
    into = gram_vectors(weight.transpose(0, 1).flatten(1), ranks[0])
    energy, before = float(weight.double().square().sum()), math.inf
    for _ in range(steps):
        seen = into.t() @ weight  # (out, r_in, positions)
        out = gram_vectors(seen.flatten(1), ranks[1])
        inside = torch.tensordot(out.t(), weight, 1)  # (r_out, in, positions)
        into = gram_vectors(inside.transpose(0, 1).flatten(1), ranks[0])
        core = into.t() @ inside
        error = math.sqrt(max(0.0, energy - float(core.double().square().sum())) / energy) if energy else 0.0
        if before - error < tolerance:
            break
        before = error
    return into, core, out


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
