"""Exact k-means of numbers on a line: one sort, then every step takes microseconds, however many numbers there are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_compress.core.errors import ConfigurationError, did_you_mean

Array = NDArray[np.float64]

_SEEDS = 1 << 16
_FLOOR = 1e-9
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Line:
    """Sorted numbers with their weights, summed up so that any interval's mean takes two look-ups.

    Args:
        points: In rising order, float64, (n,).
        mass: Sum of the weights before each point and of all, (n + 1,).
        moment: Sum of weight times point, likewise.
    """

    points: Array
    mass: Array
    moment: Array

    @classmethod
    def of(cls, values: Tensor, weights: Tensor | None = None) -> Line:
        """Sort ``values`` (n,).

        Args:
            values: Finite numbers of any real type, at least one.
            weights: What each counts, at least 0; all alike if missing. Numbers that count nothing count almost
                nothing instead, so that no centre is undefined.

        Raises:
            ConfigurationError: If there are none, they are not finite, or a weight is negative.
        """
        points = as_array(values, "values")
        if weights is None:
            points.sort()
            return cls(points, np.arange(len(points) + 1, dtype=np.float64), _sums(points))
        given = as_array(weights, "weights")
        if given.shape != points.shape or given.min() < 0:
            raise ConfigurationError(
                f"`weights` must be {len(points)} numbers of at least 0, got {given.shape[0]} from {given.min():g} on"
            )
        given = np.maximum(given, _FLOOR * given.mean()) if given.any() else np.ones_like(given)
        order = np.argsort(points, kind="stable")
        points, given = points[order], given[order]
        return cls(points, _sums(given), _sums(given * points))

    def means(self, cuts: NDArray[np.intp]) -> tuple[Array, Array]:
        """Return the weight and the weighted mean of each piece between cuts (k + 1,); a piece may be empty."""
        mass, moment = np.diff(self.mass[cuts]), np.diff(self.moment[cuts])
        return mass, np.divide(moment, mass, out=np.zeros_like(moment), where=mass > 0)

    def error(self, first: int, last: int, mean: float) -> float:
        """Return the weighted squared error of a piece around its mean."""
        weights = np.diff(self.mass[first : last + 1])
        return float(weights @ np.square(self.points[first:last] - mean))

    def cuts(self, centroids: Array) -> NDArray[np.intp]:
        """Return where the pieces begin and end of which each rising centroid is the nearest one."""
        inner = np.searchsorted(self.points, midpoints(centroids), side="right")
        return np.concatenate([[0], inner, [len(self.points)]])


def as_array(values: Tensor, name: str) -> Array:
    """Return a copy as a flat float64 array.

    Raises:
        ConfigurationError: If it is empty, or a number is not finite.
    """
    array = values.detach().reshape(-1).cpu().to(torch.float64, copy=True).numpy()
    if array.size == 0:
        raise ConfigurationError(f"`{name}` is empty: there is nothing to cluster")
    if not np.isfinite(array).all():
        raise ConfigurationError(f"`{name}` holds NaN or infinity; look for the step at which training diverged")
    return array


def midpoints(centroids: Array) -> Array:
    """Return the middle between each centroid and the next one."""
    return centroids[:-1] + np.diff(centroids) / 2


def nearest(values: Tensor, centroids: Tensor) -> Tensor:
    """Return the index of the nearest centroid of each value; the lower one where two are equally near.

    Args:
        values: Any shape and real type.
        centroids: In rising order, (k,).

    Returns:
        ``int32`` in the shape of ``values``, on the CPU.

    >>> nearest(torch.tensor([-5.0, 0.9, 1.0, 1.1]), torch.tensor([0.0, 2.0])).tolist()
    [0, 0, 0, 1]
    """
    edges = torch.from_numpy(midpoints(as_array(centroids, "centroids")))
    flat = values.detach().reshape(-1).cpu()
    parts = [torch.bucketize(part.double(), edges, out_int32=True) for part in flat.split(_CHUNK)]
    return torch.cat(parts).reshape(values.shape) if parts else torch.zeros(values.shape, dtype=torch.int32)


def initial_centroids(line: Line, clusters: int, init: str, generator: torch.Generator | None = None) -> Array:
    """Return where k-means begins, in rising order.

    Args:
        line: The sorted numbers.
        clusters: How many.
        init: ``"linear"``: evenly from the smallest to the largest, which keeps large weights apart and was the best
            for Deep Compression; ``"density"``: evenly along the distribution function; ``"random"``: numbers drawn at
            random; ``"k-means++"``: drawn one after the other in proportion to the squared distance to those drawn
            before (from at most 65,536 of the numbers, taken evenly in rising order).
        generator: For the random ones; by default one with seed 0.

    >>> initial_centroids(Line.of(torch.tensor([0.0, 1.0, 2.0, 9.0])), 2, "linear").tolist()
    [0.0, 9.0]
    """
    if init not in INITS:
        raise ConfigurationError(f"`init` is {init!r}: {did_you_mean(str(init), INITS, 4)}")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    return np.sort(INITS[init](line, clusters, generator))


def kmeans(
    values: Tensor,
    clusters: int,
    init: str = "linear",
    weights: Tensor | None = None,
    generator: torch.Generator | None = None,
    iterations: int = 1000,
) -> Tensor:
    r"""Return the centroids of Lloyd's algorithm at its fixed point (Han et al., arXiv:1510.00149, section 3).

    Minimizes :math:`\sum_i h_i (w_i - c_{k(i)})^2`: each number belongs to the nearest centroid, each centroid is
    the mean :math:`c_k = \sum h w / \sum h` of its numbers. With h from the diagonal of the Hessian that is
    Hessian-weighted k-means (Choi et al., arXiv:1612.01543). A centroid left without numbers splits the cluster
    with the largest error. Exact, not a minibatch: ten million numbers take about the time of sorting them.

    Args:
        values: The numbers, any shape and real type.
        clusters: At most how many centroids, at least 1; there are never more than distinct numbers.
        init: See :func:`initial_centroids`.
        weights: h, at least 0, one a number; all alike if missing.
        generator: For random inits.
        iterations: Upper limit.

    Returns:
        Centroids in rising order, float64, (at most clusters,).

    Raises:
        ConfigurationError: For a value outside its range, or numbers that are not finite.

    >>> kmeans(torch.tensor([1.0, 2.0, 9.0, 12.0]), 2).tolist()
    [1.5, 10.5]
    >>> kmeans(torch.tensor([1.0, 2.0, 9.0, 12.0]), 2, weights=torch.tensor([3.0, 1.0, 1.0, 2.0])).tolist()
    [1.25, 11.0]
    """
    if isinstance(clusters, bool) or not isinstance(clusters, int) or clusters < 1:
        raise ConfigurationError(f"`clusters` must be an int >= 1, got {clusters!r}")
    line = Line.of(values, weights)
    centroids = initial_centroids(line, clusters, init, generator)
    for _ in range(iterations):
        previous, centroids = centroids, _step(line, centroids)
        if np.array_equal(previous, centroids):
            break
    return torch.from_numpy(np.unique(centroids))


def _step(line: Line, centroids: Array) -> Array:
    """Return the centroids after one step of Lloyd's algorithm; those without numbers split the worst clusters."""
    cuts = line.cuts(centroids)
    mass, means = line.means(cuts)
    full, empty = np.flatnonzero(mass > 0), np.flatnonzero(mass <= 0)
    if not len(empty):
        return np.sort(means)
    errors = np.array([line.error(cuts[k], cuts[k + 1], means[k]) for k in full])
    worst = np.argsort(-errors, kind="stable")[: min(len(empty), int((errors > 0).sum()))]
    if not len(worst):  # as many centroids as distinct numbers
        return np.sort(means[full])
    means[empty] = centroids[empty]
    for place, k in zip(empty, full[worst], strict=False):
        middle = np.searchsorted(line.points, means[k], side="right")
        _, (means[k], means[place]) = line.means(np.array([cuts[k], middle, cuts[k + 1]]))
    return np.sort(means)


def _sums(values: Array) -> Array:
    return np.concatenate([[0.0], np.cumsum(values)])


def _linear(line: Line, clusters: int, generator: torch.Generator) -> Array:
    first, last = line.points[0], line.points[-1]
    return np.linspace(first, last, clusters) if clusters > 1 else np.array([(first + last) / 2])


def _density(line: Line, clusters: int, generator: torch.Generator) -> Array:
    levels = (np.arange(clusters) + 0.5) / clusters * line.mass[-1]
    return line.points[np.minimum(np.searchsorted(line.mass[1:], levels), len(line.points) - 1)]


def _random(line: Line, clusters: int, generator: torch.Generator) -> Array:
    count = len(line.points)
    if count <= _SEEDS:
        drawn = torch.randperm(count, generator=generator)[:clusters]
    else:
        drawn = torch.randint(count, (clusters,), generator=generator)
    return line.points[drawn.numpy()]


def _plus_plus(line: Line, clusters: int, generator: torch.Generator) -> Array:
    count = len(line.points)
    index = np.unique(np.linspace(0, count - 1, min(count, _SEEDS)).round().astype(np.intp))
    points, weights = line.points[index], np.diff(line.mass)[index]
    chosen: list[float] = []
    squares = np.ones_like(points)
    for _ in range(min(clusters, len(points))):
        odds = np.cumsum(weights * squares)
        if odds[-1] <= 0:
            break
        drawn = torch.rand((), generator=generator, dtype=torch.float64).item() * odds[-1]
        chosen.append(float(points[min(int(np.searchsorted(odds, drawn, side="right")), len(points) - 1)]))
        distances = np.square(points - chosen[-1])
        squares = distances if len(chosen) == 1 else np.minimum(squares, distances)
    return np.array(chosen)


INITS: dict[str, Callable[[Line, int, torch.Generator], Array]] = {
    "linear": _linear,
    "density": _density,
    "random": _random,
    "k-means++": _plus_plus,
}
"""How the centroids may begin, by word."""
