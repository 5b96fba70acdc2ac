from __future__ import annotations

import heapq

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.coding import huffman
from lightning_compress.coding.blob import Reader, Writer
from lightning_compress.coding.stream import CODINGS, HUFFMAN, count, plan_stream, read_stream
from lightning_compress.core.errors import ArtifactError


def merged(counts: list[int]) -> int:
    """Return the bits of Huffman's own construction: the sum of all merged weights."""
    heap = [number for number in counts if number]
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        both = heapq.heappop(heap) + heapq.heappop(heap)
        total += both
        heapq.heappush(heap, both)
    return total


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=2, max_size=90).filter(lambda counts: sum(map(bool, counts)) > 1))
def test_lengths_are_as_short_as_huffmans(counts: list[int]):
    array = np.array(counts)
    lengths = huffman.code_lengths(array)
    assert ((lengths > 0) == (array > 0)).all()
    assert (0.5 ** lengths[lengths > 0]).sum() == 1
    assert lengths.max() <= huffman.MAX_LENGTH
    if (depth := int(lengths.max())) < huffman.MAX_LENGTH:  # the bound does not bind
        assert int((lengths * array).sum()) == merged(counts), depth


def best_bounded(counts: tuple[int, ...], limit: int) -> int:
    """Return the fewest bits of any prefix code within ``limit``, by trying all lengths."""
    best = None
    for lengths in np.ndindex(*[limit] * len(counts)):
        sizes = np.array(lengths) + 1
        if (2.0**-sizes).sum() <= 1:
            bits = int((sizes * counts).sum())
            best = bits if best is None else min(best, bits)
    assert best is not None
    return best


@pytest.mark.parametrize("counts", [(100, 30, 10, 3, 1), (1, 1, 1, 1, 1), (89, 55, 34, 21, 13)])
def test_bounded_lengths_are_the_best(counts: tuple[int, ...]):
    for limit in (3, 4):
        lengths = huffman.code_lengths(np.array(counts), limit)
        assert int((lengths * counts).sum()) == best_bounded(counts, limit)


def test_fibonacci_counts_stay_within_the_bound():
    counts = [1, 1]
    while len(counts) < 40:  # Huffman's own code would need 39 bits
        counts.append(counts[-1] + counts[-2])
    lengths = huffman.code_lengths(np.array(counts))
    assert lengths.max() == huffman.MAX_LENGTH
    assert (0.5**lengths).sum() == 1


def test_bits_by_hand():
    # lengths 1, 2, 2: codes 0, 10, 11
    block_bits, payload = huffman.encode(np.array([0, 2, 1, 0, 2]), np.array([1, 2, 2], np.uint8))
    assert block_bits.tolist() == [8]
    assert payload.tolist() == [0b01110011]


@pytest.mark.parametrize("n", [1, 7, 4095, 4096, 4097, 3 * 4096, 300_001])
@pytest.mark.parametrize("alphabet", [2, 17, 257, 4096])
def test_round_trip(n: int, alphabet: int):
    draw = np.random.default_rng(n)
    symbols = np.minimum(draw.geometric(0.02, n), alphabet).astype(np.uint16) - 1
    symbols[-1], symbols[0] = 0, alphabet - 1
    counts = count(np.append(symbols, [0, alphabet - 1]), alphabet)
    lengths = huffman.code_lengths(counts)
    block_bits, payload = huffman.encode(symbols, lengths)
    assert payload.size == -(-int(lengths[symbols].sum(dtype=np.int64)) // 8)
    assert (huffman.decode(payload, block_bits, lengths, n) == symbols).all()


def test_blocks_that_end_elsewhere_are_refused():
    symbols = np.random.default_rng(0).integers(0, 5, 9000)
    lengths = np.array([1, 2, 3, 4, 4], np.uint8)
    block_bits, payload = huffman.encode(symbols, lengths)
    shifted = block_bits.copy()
    shifted[0], shifted[1] = shifted[0] + 3, shifted[1] - 3
    with pytest.raises(ArtifactError, match="do not end with their block"):
        huffman.decode(payload, shifted, lengths, 9000)
    with pytest.raises(ArtifactError, match="bytes of codes"):
        huffman.decode(payload[:-1], block_bits, lengths, 9000)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(CODINGS)),
    st.lists(st.integers(0, 300), max_size=400),
    st.sampled_from(["uint8", "uint16"]),
)
def test_streams_are_as_long_as_planned(coding: str, numbers: list[int], dtype: str):
    symbols = np.minimum(np.array(numbers, np.uint16), 255 if dtype == "uint8" else 300).astype(dtype)
    plan, writer = plan_stream(count(symbols, 301), CODINGS[coding]), Writer()
    plan.write(writer, symbols)
    part = writer.tensor()
    assert abs(part.numel() - plan.bytes) <= 8
    reader = Reader(part)
    back = read_stream(reader, symbols.size, 301, "values").decode()
    reader.close()
    assert (back == symbols).all()
    assert plan.coder in CODINGS[coding]


def test_the_smallest_coder_is_taken():
    even = plan_stream(np.full(16, 1000), CODINGS["auto"])
    skewed = plan_stream(np.array([9000, 500, 500]), CODINGS["auto"])
    few = plan_stream(np.array([4, 2, 1, 1]), CODINGS["huffman"])
    assert even.bytes == 16 * 1000 // 2 + 4
    assert skewed.bytes < plan_stream(np.array([9000, 500, 500]), CODINGS["huffman"]).bytes
    assert HUFFMAN in {plan_stream(np.array([9000, 500, 500]), CODINGS["huffman"]).coder}
    assert few.bytes <= 6
