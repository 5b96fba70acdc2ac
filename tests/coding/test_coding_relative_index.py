from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_compress.coding.relative_index import (
    absolute_index,
    deep_compression_bits,
    expected_fillers,
    relative_index,
    symbol_counts,
)
from lightning_compress.core.errors import ConfigurationError


@given(st.sets(st.integers(0, 5000), max_size=60), st.integers(1, 12))
def test_round_trip(places: set[int], bits: int):
    positions = np.array(sorted(places), np.int64)
    symbols = relative_index(positions, bits)
    back, end = absolute_index(symbols, bits)
    assert back.tolist() == positions.tolist()
    assert end == (positions[-1] + 1 if positions.size else 0)
    counts = symbol_counts(positions, range(1, 13))[bits]
    assert counts.tolist() == np.bincount(symbols, minlength=1 << bits).tolist()


def test_long_gaps_are_counted_too():
    positions = np.array([70_000, 70_001, 400_000])
    for bits in (3, 8, 12):
        expected = np.bincount(relative_index(positions, bits), minlength=1 << bits)
        assert symbol_counts(positions, range(bits, bits + 1))[bits].tolist() == expected.tolist()


def test_by_hand():
    # four zeros, a weight, none, a weight, nine zeros, a weight; three passes three zeros
    assert relative_index(np.array([4, 5, 15]), 2).tolist() == [3, 1, 0, 3, 3, 3, 0]


@pytest.mark.parametrize("density", [0.05, 0.1, 0.3])
def test_fillers_are_as_many_as_expected(density: float):
    present = np.random.default_rng(0).random(4_000_000) < density
    positions = np.flatnonzero(present)
    for bits in (3, 4, 5):
        fillers = relative_index(positions, bits).size - positions.size
        assert fillers / positions.size == pytest.approx(expected_fillers(density, 2**bits - 1), rel=0.05, abs=2e-4)
        paper = int(((np.diff(positions, prepend=-1) - 1) // 2**bits).sum())  # a filler of the paper is an entry itself
        assert paper / positions.size == pytest.approx(expected_fillers(density, 2**bits), rel=0.05, abs=2e-4)


LENET_300_100 = [(300 * 784, 0.08), (100 * 300, 0.09), (10 * 100, 0.26)]
LENET_5 = [(20 * 25, 0.66, 8), (50 * 20 * 25, 0.12, 8), (500 * 800, 0.08, 5), (10 * 500, 0.19, 5)]


def test_deep_compression_of_lenet_300_100():
    """Table 2 of the paper: 3.1 % after pruning and sharing, 2.49 % with Huffman coding.

    The paper's weights do not lie independently and its biases are stored too; this arithmetic knows neither, which is
    why it ends up to a tenth below.
    """
    dense = 32 * sum(weights for weights, _ in LENET_300_100)
    shared = [deep_compression_bits(weights, density, 5, 6, codebook=64) for weights, density in LENET_300_100]
    coded = [
        deep_compression_bits(weights, density, 3.7, 4.4, codebook=64, span_bits=5)
        for weights, density in LENET_300_100
    ]
    assert [bits / (32 * weights) for bits, (weights, _) in zip(shared, LENET_300_100, strict=True)] == pytest.approx(
        [0.031, 0.038, 0.157], rel=0.1
    )
    assert sum(shared) / dense == pytest.approx(0.031, rel=0.05)
    assert sum(coded) / dense == pytest.approx(0.0249, rel=0.12)


def test_deep_compression_of_lenet_5():
    """Table 3 of the paper: 33 times smaller (3.05 %) with 8-bit and 5-bit values and an index of 5 bits."""
    dense = 32 * sum(weights for weights, _, _ in LENET_5)
    bits = sum(
        deep_compression_bits(weights, density, 5, width, codebook=2**width) for weights, density, width in LENET_5
    )
    assert dense / bits == pytest.approx(33, rel=0.08)


def test_arguments_are_checked():
    with pytest.raises(ConfigurationError, match="`density` must be above 0"):
        expected_fillers(0.0, 32)
    with pytest.raises(ConfigurationError, match="`step` must be at least 1"):
        expected_fillers(0.5, 0)
    with pytest.raises(ConfigurationError, match="`index_bits` must be from 1 to 12"):
        relative_index(np.array([1]), 13)
    with pytest.raises(ConfigurationError, match="`span_bits` must be given"):
        deep_compression_bits(100, 0.1, 3.7, 4.4)
