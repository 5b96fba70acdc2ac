from __future__ import annotations

import numpy as np
import pytest

from lightning_compress.coding import ans
from lightning_compress.coding.stream import entropy_bits
from lightning_compress.core.errors import ArtifactError


@pytest.mark.parametrize("alphabet", [2, 33, 256, 4096])
@pytest.mark.parametrize("n", [1, 5000, (1 << 20) + 7])
def test_round_trip_near_the_entropy(alphabet: int, n: int):
    draw = np.random.default_rng(alphabet)
    shares = draw.random(alphabet) ** 6
    symbols = draw.choice(alphabet, n, p=shares / shares.sum()).astype(np.uint16)
    counts = np.bincount(symbols, minlength=alphabet)
    table = ans.frequency_table(counts)
    words = ans.encode(symbols, table)
    assert (ans.decode(words, table, n) == symbols).all()
    assert abs(4 * words.size - ans.expected_bytes(counts, table)) <= 8 + n // 100_000
    assert 32 * words.size < 1.0015 * entropy_bits(counts) + 96


def test_tables_by_hand():
    # weights: (16 + b % 16) << (b // 16)
    assert ans.WEIGHTS[[0, 1, 15, 16, 17, 255]].tolist() == [0, 17, 31, 32, 34, 31 << 15]
    assert ans.frequency_table(np.array([31, 16, 0, 1])).tolist() == [255, 240, 0, 176]
    rare = ans.frequency_table(np.array([10**9, 1]))
    assert rare.tolist() == [255, 1]  # never 0, which would mean that it does not occur


def test_tables_are_within_a_thirtieth():
    counts = np.arange(1, 60_000)
    weights = ans.WEIGHTS[ans.frequency_table(counts)] * (counts[-1] / ans.WEIGHTS[-1])
    assert np.abs(weights[20:] / counts[20:] - 1).max() < 1 / 30


def test_damaged_streams_are_refused():
    symbols = np.arange(3000) % 7
    table = ans.frequency_table(np.bincount(symbols))
    words = ans.encode(symbols, table)
    for damaged in (words[:-1], words[1:], words[::-1].copy(), np.append(words, np.uint32(5))):
        with pytest.raises(ArtifactError, match="entropy-coded stream"):
            ans.decode(damaged, table, 3000)
    with pytest.raises(ArtifactError, match="all zero"):
        ans.decode(words, np.zeros(7, np.uint8), 3000)
