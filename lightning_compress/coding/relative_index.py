"""The relative index of Deep Compression (Han, Mao and Dally, 2016): distances to the last weight, in n bits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_compress.core.errors import ConfigurationError

MAX_INDEX_BITS = 12
_DENSE_GAPS = 1 << 16


def relative_index(positions: NDArray[np.int64], index_bits: int) -> NDArray[np.uint16]:
    """Return the zeros before each weight as ``index_bits`` bits; what passes further goes in steps, by fillers.

    The highest number is a filler: it passes ``2**index_bits - 1`` zeros and has no weight, so it costs an index but
    no value (the paper's filler passes one zero more and stores that zero as a value).

    Args:
        positions: Rising positions of the weights ``(m,)``.
        index_bits: From 1 to 12.

    Returns:
        Integers ``(m + fillers,)``.

    >>> relative_index(np.array([1, 4, 12, 15]), 3).tolist()  # 7 passes seven zeros
    [1, 2, 7, 0, 2]
    """
    _check_bits(index_bits)
    step = (1 << index_bits) - 1
    gaps = np.diff(positions, prepend=-1) - 1
    fillers, rest = np.divmod(gaps, step)
    symbols = np.full(gaps.size + int(fillers.sum()), step, np.uint16)
    symbols[np.cumsum(fillers + 1) - 1] = rest
    return symbols


def absolute_index(symbols: NDArray[Any], index_bits: int, start: int = 0) -> tuple[NDArray[np.int64], int]:
    """Undo :func:`relative_index`: the positions of the weights, and the position after the last symbol.

    >>> absolute_index(np.array([1, 2, 7, 0, 2]), 3)
    (array([ 1,  4, 12, 15]), 16)
    """
    weight = symbols != (1 << index_bits) - 1
    ends = np.cumsum(symbols + weight.astype(np.int64)) + start
    return ends[weight] - 1, int(ends[-1]) if ends.size else start


def symbol_counts(positions: NDArray[np.int64], index_bits: range) -> dict[int, NDArray[np.int64]]:
    """Return how often each symbol of :func:`relative_index` would occur ``(2**n,)``, for each number of bits n."""
    gaps = np.diff(positions, prepend=-1) - 1
    large = gaps[gaps >= _DENSE_GAPS]
    dense = np.bincount(gaps[gaps < _DENSE_GAPS])
    gap = np.concatenate([np.arange(dense.size), large])
    times = np.concatenate([dense, np.ones(large.size, np.int64)])
    counts = {}
    for bits in index_bits:
        fillers, rest = np.divmod(gap, (1 << bits) - 1)
        counts[bits] = np.bincount(rest, times, 1 << bits).astype(np.int64)
        counts[bits][-1] = (fillers * times).sum()
    return counts


def expected_fillers(density: float, step: int) -> float:
    r"""Return the fillers for each weight where weights lie independently: :math:`q^s / (1 - q^s)`, q = 1 - density.

    Args:
        density: Share of weights that are left, above 0 and at most 1.
        step: Entries that a filler passes: ``2**n - 1`` in :func:`relative_index`, ``2**n`` in the paper.

    Raises:
        ConfigurationError: If ``density`` or ``step`` is out of range.

    >>> round(expected_fillers(0.08, 2**5), 4)
    0.0745
    """
    if not 0 < density <= 1:
        raise ConfigurationError(f"`density` must be above 0 and at most 1, got {density!r}")
    if step < 1:
        raise ConfigurationError(f"`step` must be at least 1, got {step!r}")
    passed = (1 - density) ** step
    return passed / (1 - passed)


def deep_compression_bits(
    weights: int, density: float, index_bits: float, weight_bits: float, codebook: int = 0, span_bits: int | None = None
) -> float:
    """Return the bits that the paper's format needs for one layer: entries with an index and a value, and a codebook.

    Args:
        weights: Weights of the layer before pruning.
        density: Share of them that is left; they are taken to lie independently.
        index_bits: Bits of an index: n, or what Huffman coding makes of it on average.
        weight_bits: Bits of a value, likewise.
        codebook: Shared float32 values.
        span_bits: The n of the fillers; by default ``index_bits``, which must then be whole.

    >>> round(deep_compression_bits(300 * 784, 0.08, index_bits=5, weight_bits=6, codebook=64) / (32 * 300 * 784), 4)
    0.0298
    """
    span = index_bits if span_bits is None else span_bits
    if span != int(span):
        raise ConfigurationError(f"`span_bits` must be given where `index_bits` is not whole, got {index_bits!r}")
    entries = weights * density * (1 + expected_fillers(density, 2 ** int(span)))
    return entries * (index_bits + weight_bits) + 32 * codebook


def _check_bits(index_bits: int) -> None:
    if not 1 <= index_bits <= MAX_INDEX_BITS:
        raise ConfigurationError(f"`index_bits` must be from 1 to {MAX_INDEX_BITS}, got {index_bits!r}")
