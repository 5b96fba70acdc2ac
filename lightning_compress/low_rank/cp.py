r"""CP decomposition of convolution kernels: alternating least squares over spatial slices, with a stable end.

A kernel :math:`W_{n c i j} \approx \sum_r e_{n r} a_{c r} b_{i r} d_{j r}` (Lebedev et al. 2015, arXiv 1412.6553) is
kept as one matrix (out, in) for each spatial position. They are multiplied with one factor at a time, so no
Khatri-Rao product with (in x positions) rows is ever formed, and one product serves all spatial factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce

import torch
from torch import Tensor

from lightning_compress.low_rank.matrix import gram_vectors

Solve = Callable[[Tensor, Tensor], Tensor]
"""Returns the factor from its right side (size, R) and the Gram matrix (R, R) of all other factors."""


@dataclass
class Terms:
    """Rank-one terms: column r of each factor belongs to term r.

    Attributes:
        out: (out, R).
        into: (in, R).
        axes: (size, R) for each spatial axis.
    """

    out: Tensor
    into: Tensor
    axes: list[Tensor]

    def positions(self) -> Tensor:
        """Return the product of the spatial factors at every position, (positions, R)."""
        return reduce(lambda one, other: (one[:, None] * other).flatten(0, 1), self.axes)

    def sizes(self) -> Tensor:
        """Return the norm of each term."""
        return torch.stack([factor.norm(dim=0) for factor in (self.out, self.into, *self.axes)]).prod(dim=0)

    def copy(self) -> Terms:
        """Return terms that stay as they are when these go on."""
        return Terms(self.out, self.into, list(self.axes))

    def take(self, other: Terms) -> None:
        """Become another set of terms."""
        self.out, self.into, self.axes = other.out, other.into, list(other.axes)

    def lean(self, before: Terms, momentum: float) -> None:
        """Go on in the direction from ``before`` to here."""
        self.into = self.into + momentum * (self.into - before.into)
        self.axes = [now + momentum * (now - then) for now, then in zip(self.axes, before.axes, strict=True)]

    def to(self, dtype: torch.dtype) -> Terms:
        """Return the terms in another dtype."""
        return Terms(self.out.to(dtype), self.into.to(dtype), [axis.to(dtype) for axis in self.axes])

    def even(self) -> Terms:
        """Return the same terms with the norm of each spread evenly over its factors."""
        sizes, count = self.sizes(), 2 + len(self.axes)
        share = sizes ** (1 / count)
        return Terms(unit(self.out) * share, unit(self.into) * share, [unit(axis) * share for axis in self.axes])

    def dense(self) -> Tensor:
        """Return the sum of the terms, (positions, out, in)."""
        return torch.stack([(self.out * place) @ self.into.t() for place in self.positions()])


def slices_of(weight: Tensor) -> tuple[Tensor, list[int]]:
    r"""Return a kernel (out, in, \*kernel) as (positions, out, in), and the sizes of its axes that are more than 1."""
    return weight.flatten(2).permute(2, 0, 1).contiguous(), [size for size in weight.shape[2:] if size > 1]


def cp_start(slices: Tensor, kernel: Sequence[int], rank: int) -> Terms:
    r"""Return orthogonal terms to start from.

    Rotates each spatial axis to its principal directions, and takes the strongest singular triples of all rotated
    slices. The terms are orthogonal, so the squared error is the sum of the squares left out; at a rank of
    positions x min(out, in) nothing is.

    Args:
        slices: (positions, out, in).
        kernel: Sizes of the spatial axes; positions are their product.
        rank: Number of terms.
    """
    bases = spatial_bases(slices, kernel)
    left, values, right = torch.linalg.svd(rotate(slices, bases), full_matrices=False)
    strongest = values.flatten().topk(rank).indices
    where, which = strongest // values.shape[1], strongest % values.shape[1]
    places = torch.unravel_index(where, tuple(kernel))
    axes = [basis[:, place] for basis, place in zip(bases, places, strict=True)]
    return Terms((left[where, :, which] * values[where, which, None]).t(), right[where, which].t(), axes)


def spatial_bases(slices: Tensor, kernel: Sequence[int]) -> list[Tensor]:
    """Return the principal directions of each spatial axis, (size, size) each."""
    whole = slices.reshape(*kernel, -1)
    return [gram_vectors(whole.movedim(axis, 0).flatten(1), size) for axis, size in enumerate(kernel)]


def rotate(slices: Tensor, bases: Sequence[Tensor]) -> Tensor:
    """Return slices (positions, out, in) along other spatial directions."""
    return torch.tensordot(reduce(torch.kron, bases).t(), slices, 1)


@torch.no_grad()
def decompose_cp(weight: Tensor, rank: int, steps: int | None = None, tolerance: float | None = None) -> Terms:
    r"""Return the terms of a CP decomposition, in the weight's dtype.

    Alternating least squares from orthogonal terms, with momentum that is dropped whenever the error rises (Mitchell,
    Ye and De Sterck 2020, arXiv 1810.05846). If terms cancel each other (their squares add up to several times that of
    the weight), their norms are reduced at an error that is at most 2 % higher (:func:`calm`). Nothing is random.

    Args:
        weight: (out, in, \*kernel), float32 or float64.
        rank: Number of terms.
        steps: Sweeps at most; by default 100, and 1000 for small kernels, which take a millisecond each.
        tolerance: Stop when ten sweeps lower the error by less than this share; by default 0.001, or 1e-6 if small.

    >>> generator = torch.Generator().manual_seed(0)
    >>> parts = [torch.randn(size, 8, generator=generator) for size in (16, 12, 3, 3)]
    >>> kernel = torch.einsum("nr,cr,ir,jr->ncij", *parts)
    >>> terms = decompose_cp(kernel, 8)
    >>> float((terms.dense() - kernel.flatten(2).permute(2, 0, 1)).norm() / kernel.norm()) < 1e-4
    True
    """
    slices, kernel = slices_of(weight)
    small = weight.numel() <= _SMALL and rank <= _SMALL_RANK
    exact = slices.double() if small else slices
    terms = cp_start(exact, kernel, rank)
    sweeper = Sweeper(exact, kernel, terms)
    if sweeper.energy > 0 and rank < len(slices) * min(weight.shape[:2]):
        steps = steps or (1000 if small else 100)
        error = _descend(sweeper, steps, tolerance or (1e-6 if small else 1e-3))
        if float(terms.sizes().square().sum()) > _CANCELLING * sweeper.energy:
            calm(sweeper, _SLACK * error, 30 if small else 10)
    return terms.to(weight.dtype)


_SMALL, _SMALL_RANK = 1 << 17, 256
"""Kernels and ranks up to which sweeps take milliseconds also in float64."""
_SLACK = 1.02
"""By how much the error may rise where terms cancel each other, so that they can let go."""
_CANCELLING = 4.0
"""Sum of the squared norms of terms, relative to the weight's, from which they count as cancelling; orthogonal: 1."""


class Sweeper:
    """Alternating least squares: each factor in turn becomes the best one while the others stay.

    Args:
        slices: (positions, out, in).
        kernel: Sizes of the spatial axes.
        terms: Where to start; changed in place.
    """

    def __init__(self, slices: Tensor, kernel: Sequence[int], terms: Terms) -> None:
        self.slices, self.kernel, self.terms = slices, tuple(kernel), terms
        self.energy = float(slices.double().square().sum())

    def sweep(self, solve: Solve) -> float:
        """Renew every factor once, and return the relative error. Norms end up in the factor of the inputs."""
        terms, places = self.terms, self.terms.positions()
        terms.into = unit(terms.into)
        through = self.slices @ terms.into  # (positions, out, R): serves the outputs and all axes
        terms.out = unit(solve(torch.einsum("pnr,pr->nr", through, places), self._gram("out")))
        seen = torch.einsum("pnr,nr->pr", through, terms.out)
        for axis in range(len(self.kernel)):
            terms.axes[axis] = unit(solve(self._collect(seen, axis), self._gram(axis)))
        back = self.slices.transpose(1, 2) @ terms.out
        right, gram = torch.einsum("pcr,pr->cr", back, terms.positions()), self._gram("into")
        terms.into = solve(right, gram)
        return self._error(right, gram)

    def _collect(self, seen: Tensor, axis: int) -> Tensor:
        """Return the right side for one axis: what is seen at each position, summed over all other axes."""
        ones = torch.ones_like
        others = [ones(factor) if index == axis else factor for index, factor in enumerate(self.terms.axes)]
        weighted = seen * Terms(seen, seen, others).positions()
        return weighted.unflatten(0, self.kernel).movedim(axis, 0).reshape(self.kernel[axis], -1, seen.shape[1]).sum(1)

    def _gram(self, left_out: str | int) -> Tensor:
        named: dict[str | int, Tensor] = {
            "out": self.terms.out,
            "into": self.terms.into,
            **dict(enumerate(self.terms.axes)),
        }
        return torch.stack([factor.t() @ factor for name, factor in named.items() if name != left_out]).prod(0)

    def _error(self, right: Tensor, gram: Tensor) -> float:
        factor = self.terms.into.double()
        inner, size = (factor * right.double()).sum(), ((factor @ gram.double()) * factor).sum()
        return math.sqrt(max(0.0, self.energy - 2 * float(inner) + float(size)) / self.energy)


def unit(factor: Tensor) -> Tensor:
    """Return a factor with columns of norm 1, or 0."""
    sizes = factor.norm(dim=0)
    return factor / torch.where(sizes > 0, sizes, 1)


def _descend(sweeper: Sweeper, steps: int, tolerance: float, ridge: float = 0.0) -> float:
    """Sweep with momentum until the error hardly falls, and return it."""
    terms, history, since = sweeper.terms, [math.inf], 0
    good = terms.copy()
    for _ in range(steps):
        error = sweeper.sweep(partial(least_squares, ridge=ridge))
        if error > history[-1] and since > 1:  # too far: go on from the last good place, without momentum
            terms.take(good)
            error, since = history[-1], 0
        else:
            since += 1
            before, good = good, terms.copy()
            if since > 1:
                terms.lean(before, (since - 1) / (since + 2))
        history.append(error)
        if error < 1e-7 or (len(history) > 11 and history[-11] - error < tolerance * error):
            break
    terms.take(good)
    return history[-1]


def least_squares(right: Tensor, gram: Tensor, ridge: float = 0.0) -> Tensor:
    """Return ``right`` times the inverse of ``gram``, with at least the ridge that keeps it finite."""
    added = max(ridge, torch.finfo(gram.dtype).eps * float(gram.diagonal().mean()))
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for _ in range(8):
        factor, failed = torch.linalg.cholesky_ex(gram + added * eye)
        if not bool(failed):
            return torch.cholesky_solve(right.t(), factor).t()
        added *= 10
    return right @ torch.linalg.pinv(gram, hermitian=True)


def calm(sweeper: Sweeper, error: float, sweeps: int) -> float:
    r"""Reduce the norms of terms that cancel each other, within a given error; return their squares over the weight's.

    Terms that diverge lose accuracy in half precision and do not survive fine-tuning (Phan et al. 2020,
    arXiv 2008.05441). Minimizes :math:`\sum_r \lambda_r^2` subject to the error, in two ways after each other: starting
    from orthogonal terms, with a ridge that falls until the error is reached; then with the largest ridge for each
    factor in turn that the error allows (their error-preserving correction).

    Args:
        sweeper: At the end of its descent; its terms are changed.
        error: Relative error that must not be exceeded.
        sweeps: At each ridge.
    """
    start = cp_start(sweeper.slices, sweeper.kernel, sweeper.terms.out.shape[1])
    path, limit = Sweeper(sweeper.slices, sweeper.kernel, start), sweeper.energy * error**2
    for step in range(_RIDGES):
        if _descend(path, sweeps, 0.0, 0.1 * 3.0**-step) <= error:
            sweeper.terms.take(path.terms)
            break
    for _ in range(10):
        sweeper.sweep(lambda right, gram: _ridge(right.double(), gram.double(), sweeper.energy, limit).to(right.dtype))
    return float(sweeper.terms.sizes().square().sum()) / sweeper.energy


_RIDGES = 20
"""Steps from a ridge of 0.1 down to 1e-10, a third each, where the Gram matrix has ones on its diagonal."""


def _ridge(right: Tensor, gram: Tensor, energy: float, limit: float) -> Tensor:
    """Return the solution with the largest ridge whose squared error is at most ``limit``."""
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp(min=values[-1] * torch.finfo(values.dtype).eps)
    turned = right @ vectors
    weights = turned.square().sum(0)

    def off(ridge: float) -> float:
        shrunk = values + ridge
        return energy - float((weights * (2 / shrunk - values / shrunk.square())).sum())

    low, high = 0.0, float(values[-1])
    for _ in range(60):
        middle = math.sqrt(max(low, high * 1e-15) * high)
        low, high = (middle, high) if off(middle) <= limit else (low, middle)
    return (turned / (values + low)) @ vectors.t()
