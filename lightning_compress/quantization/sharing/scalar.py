"""Scalar quantization for what comes after it, an entropy coder: uniform steps, and entropy-constrained clusters."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.quantization.sharing.kmeans import Array, as_array
from lightning_compress.quantization.sharing.rates import entropy_bits

_CELLS = 1 << 21
_HALVINGS = 40


class Codebook(NamedTuple):
    """Shared values, and which of them stands for each number.

    Args:
        centroids: In rising order, float64, (k,).
        codes: Index of each number's centroid, ``int32``, (n,).
    """

    centroids: Tensor
    codes: Tensor

    @property
    def bits(self) -> float:
        """Entropy of the codes in bits a number."""
        return entropy_bits(torch.bincount(self.codes, minlength=len(self.centroids)))


def uniform_codebook(values: Tensor, step: float, weights: Tensor | None = None) -> Codebook:
    r"""Round numbers to multiples of a step, and represent each cell by the mean of its members.

    Cells are :math:`[(j - 1/2)\Delta, (j + 1/2)\Delta)`. At high rates and with an entropy coder behind it no scalar
    quantizer is much better (Gish & Pierce 1968; Choi et al., arXiv:1612.01543, section 4.2).

    Args:
        values: Finite numbers, (n,).
        step: :math:`\Delta`, above 0.
        weights: Importance of each number in its cell's mean, at least 0.

    Returns:
        The codebook of the cells that are not empty.

    >>> uniform_codebook(torch.tensor([0.75, 1.0, 1.25, 4.25]), 1.0).centroids.tolist()
    [1.0, 4.25]
    """
    points = as_array(values, "values")
    if not step > 0:
        raise ConfigurationError(f"`step` must be a number above 0, got {step!r}")
    return _with_means(points, _ranks(np.floor(points / step + 0.5)), _importance(weights, points))


def uniform_to_bits(values: Tensor, bits: float, clusters: int, weights: Tensor | None = None) -> Codebook:
    """Return the uniform codebook with the smallest step whose codes have at most so much entropy.

    Args:
        values: Finite numbers, (n,).
        bits: Entropy, bits a number.
        clusters: At most about this many cells, at least 2: the step is no finer than the range by one less.
        weights: As in :func:`uniform_codebook`.

    >>> round(uniform_to_bits(torch.linspace(-1, 1, 4097), 3.0, 256).bits, 1)
    3.0
    """
    points = as_array(values, "values")
    width = float(points.max() - points.min())
    if width == 0:
        return _with_means(points, np.zeros(len(points), np.intp), np.ones_like(points))
    coarsest = max(4 * float(np.abs(points).max()), 4 * width)
    return _least(lambda step: uniform_codebook(values, step, weights), width / (clusters - 1), coarsest, bits)


def entropy_constrained(
    values: Tensor, centroids: Tensor, trade_off: float, weights: Tensor | None = None, iterations: int = 50
) -> Codebook:
    r"""Entropy-constrained scalar quantization, ECSQ (Choi et al., arXiv:1612.01543, section 4.3).

    Lloyd's algorithm on :math:`J = \frac{1}{n} \sum_i h_i (w_i - c_{k(i)})^2 - \lambda \log_2 p_{k(i)}`: each number
    takes the centroid with the lowest distortion plus :math:`\lambda` times the length of its code word, each centroid
    is the weighted mean of its numbers, and :math:`p_k` their share. Centroids that nothing takes are dropped.

    Args:
        values: Finite numbers, (n,).
        centroids: Where to begin, (k,).
        trade_off: :math:`\lambda` at least 0, in units of the distortion; 0 is (Hessian-weighted) k-means.
        weights: h, at least 0; they are scaled to a mean of 1. All alike if missing.
        iterations: Upper limit.

    >>> values = torch.tensor([0.0, 0.1, 0.2, 1.0])
    >>> entropy_constrained(values, torch.tensor([0.0, 0.2, 1.0]), trade_off=0.0).codes.tolist()
    [0, 0, 1, 2]
    >>> entropy_constrained(values, torch.tensor([0.0, 0.2, 1.0]), trade_off=0.1).codes.tolist()
    [0, 0, 0, 1]
    """
    if not trade_off >= 0:
        raise ConfigurationError(f"`trade_off` must be a number of at least 0, got {trade_off!r}")
    points, places = as_array(values, "values"), np.unique(as_array(centroids, "centroids"))
    importance = _importance(weights, points)
    codes = _cheapest(points, importance, places, np.zeros(len(places)))
    book = _with_means(points, codes, importance)
    for _ in range(iterations):
        places, codes = book.centroids.numpy(), book.codes.numpy()
        share = np.bincount(codes, minlength=len(places)) / len(points)
        chosen = _cheapest(points, importance, places, -trade_off * np.log2(share))
        if np.array_equal(chosen, codes):
            break
        book = _with_means(points, chosen, importance)
    return book


def entropy_constrained_to_bits(
    values: Tensor, centroids: Tensor, bits: float, weights: Tensor | None = None
) -> Codebook:
    r"""Return the ECSQ codebook with the smallest :math:`\lambda` whose codes have at most so much entropy.

    Clusters that are all of one size cost the same, so that no :math:`\lambda` moves a number: as where there is one
    for each number. Then it begins again with half of them.

    Args:
        values: Finite numbers, (n,).
        centroids: Where to begin, (k,).
        bits: Entropy, bits a number; :math:`\lambda` is found by bisection.
        weights: As in :func:`entropy_constrained`.

    >>> book = entropy_constrained_to_bits(torch.linspace(-1, 1, 1025), torch.linspace(-1, 1, 32), 3.0)
    >>> 2.8 < book.bits <= 3.0
    True
    """
    free = entropy_constrained(values, centroids, 0.0, weights)
    if free.bits <= bits:
        return free
    spread = float(as_array(values, "values").var())
    book = _least(lambda t: entropy_constrained(values, centroids, t, weights), spread * 2.0**-24, spread * 64, bits)
    return book if book.bits <= bits else entropy_constrained_to_bits(values, free.centroids[::2], bits, weights)


def _least(quantize: Callable[[float], Codebook], low: float, high: float, bits: float) -> Codebook:
    """Return the codebook at the smallest argument from ``low`` to ``high`` that keeps to ``bits``, by bisection.

    If not even ``high`` does, return what that gives.
    """
    found = quantize(low)
    if found.bits <= bits:
        return found
    found = quantize(high)
    for _ in range(_HALVINGS if found.bits <= bits else 0):
        middle = (low * high) ** 0.5
        tried = quantize(middle)
        if tried.bits <= bits:
            found, high = tried, middle
            if bits - tried.bits < 0.005 * bits:
                break
        else:
            low = middle
        if high / low < 1.0001:
            break
    return found


def _ranks(cells: Array) -> NDArray[np.intp]:
    """Return the place of each cell among those that occur; counting is ten times as fast as sorting, if they are few.

    >>> _ranks(np.array([5.0, -2.0, 5.0])).tolist()
    [1, 0, 1]
    """
    low = cells.min()
    if cells.max() - low >= _CELLS:
        return np.unique(cells, return_inverse=True)[1].reshape(-1)
    numbers = (cells - low).astype(np.intp)
    places: NDArray[np.intp] = np.cumsum(np.bincount(numbers) > 0) - 1
    return places[numbers]


def _importance(weights: Tensor | None, points: Array) -> Array:
    if weights is None:
        return np.ones_like(points)
    given = as_array(weights, "weights")
    if given.shape != points.shape or given.min() < 0:
        raise ConfigurationError(
            f"`weights` must be {len(points)} numbers of at least 0, got {given.shape[0]} from {given.min():g} on"
        )
    mean = given.mean()
    return np.maximum(given / mean, 1e-9) if mean > 0 else np.ones_like(given)


def _with_means(points: Array, codes: NDArray[np.intp], importance: Array) -> Codebook:
    """Return a codebook of the weighted means of the codes that occur, in rising order."""
    mass = np.bincount(codes, weights=importance)
    moment = np.bincount(codes, weights=importance * points)
    used = np.flatnonzero(mass > 0)
    means = moment[used] / mass[used]
    order = np.argsort(means, kind="stable")
    place = np.zeros(len(mass), np.int32)
    place[used[order]] = np.arange(len(used), dtype=np.int32)
    return Codebook(torch.from_numpy(means[order]), torch.from_numpy(place[codes]))


def _cheapest(points: Array, importance: Array, places: Array, prices: Array) -> NDArray[np.intp]:
    """Return which centroid is the cheapest for each point: its weighted squared distance plus its price."""
    chosen = np.empty(len(points), np.intp)
    rows = max(1, _CELLS // len(places))
    for start in range(0, len(points), rows):
        part = slice(start, start + rows)
        cost = importance[part, None] * np.square(points[part, None] - places) + prices
        chosen[part] = cost.argmin(1)
    return chosen
