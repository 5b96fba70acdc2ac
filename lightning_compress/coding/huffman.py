"""Canonical Huffman codes of bounded length (Huffman, 1952), vectorised: the coder of Deep Compression.

Only the lengths are stored. Blocks of :data:`BLOCK` symbols start at known bits, so that all blocks are read at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_compress.coding.blob import require

MAX_LENGTH = 15
"""Bits of the longest code; four bits hold a length, and a block's bits fit 16."""

BLOCK = 4096
_LANES = 1024
_CHUNK = 1 << 18


def code_lengths(counts: NDArray[np.int64], limit: int = MAX_LENGTH) -> NDArray[np.uint8]:
    """Return the lengths of an optimal prefix code with none above ``limit`` (package-merge).

    Larmore and Hirschberg, *A fast algorithm for optimal length-limited Huffman codes*, 1990.

    Args:
        counts: Occurrences ``(k,)``, at least two of them above zero and at most ``2 ** limit``.
        limit: Bits of the longest code.

    Returns:
        Bits ``(k,)``; 0 for symbols that do not occur.

    >>> code_lengths(np.array([8, 1, 0, 4, 2])).tolist()
    [1, 3, 0, 2, 3]
    >>> code_lengths(np.array([8, 1, 1, 4, 2]), limit=3).tolist()
    [1, 3, 3, 3, 3]
    """
    present = np.flatnonzero(counts)
    order = present[np.argsort(counts[present], kind="stable")]
    leaves = counts[order].astype(np.int64)
    merged, is_leaf = leaves, [np.ones(leaves.size, bool)]
    for _ in range(limit - 1):
        packages = merged[: merged.size // 2 * 2].reshape(-1, 2).sum(axis=1)
        both = np.concatenate([leaves, packages])
        rank = np.argsort(both, kind="stable")  # at equal weight a symbol comes before a package
        merged, kind = both[rank], rank < leaves.size
        is_leaf.append(kind)
    lengths, taken = np.zeros(counts.size, np.uint8), 2 * leaves.size - 2
    for kind in reversed(is_leaf):
        symbols = int(kind[:taken].sum())
        lengths[order[:symbols]] += 1
        taken = 2 * (taken - symbols)
    return lengths


def canonical_codes(lengths: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """Return the codes that the lengths alone determine: in order of length, then of symbol.

    >>> [f"{code:0{n}b}" for code, n in zip(canonical_codes(np.array([1, 3, 3, 2])), [1, 3, 3, 2])]
    ['0', '110', '111', '10']
    """
    order = _canonical_order(lengths)
    codes, code, last = np.zeros(lengths.size, np.uint32), 0, 0
    for symbol, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        code <<= length - last
        codes[symbol] = code
        code, last = code + 1, length
    return codes


def pack_lengths(lengths: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return two lengths a byte, the first in the high half.

    >>> pack_lengths(np.array([1, 2, 2], np.uint8)).tolist()
    [18, 32]
    """
    even = np.append(lengths, np.zeros(lengths.size % 2, np.uint8)).astype(np.uint8)
    return (even[0::2] << 4 | even[1::2]).astype(np.uint8)


def unpack_lengths(packed: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    """Undo :func:`pack_lengths`."""
    return np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[:count]


def blocks(n: int) -> int:
    """Return the number of blocks of ``n`` symbols."""
    return -(-n // BLOCK)


def encode(symbols: NDArray[Any], lengths: NDArray[np.uint8]) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
    """Return the bits of each block ``(blocks,)`` and all codes one after another as bytes, the first bit highest.

    Args:
        symbols: Integers ``(n,)``, each with a length above zero.
        lengths: From :func:`code_lengths`.
    """
    block_bits = np.empty(blocks(symbols.size), np.uint16)
    codes, pieces, carried = canonical_codes(lengths), [], np.zeros(0, np.uint8)
    for start in range(0, symbols.size, _CHUNK):
        chunk = symbols[start : start + _CHUNK]
        sizes = lengths[chunk].astype(np.int64)
        first = start // BLOCK
        sums = np.add.reduceat(sizes, np.arange(0, sizes.size, BLOCK))
        block_bits[first : first + sums.size] = sums
        packed, carried = _place(codes[chunk], sizes, carried)
        pieces.append(packed)
    return block_bits, np.concatenate([*pieces, np.packbits(carried)])


def _place(
    codes: NDArray[np.uint32], sizes: NDArray[np.int64], carried: NDArray[np.uint8]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return whole bytes of ``carried`` bits and codes, and the bits that are left, at most seven."""
    ends = np.cumsum(sizes) + carried.size
    total = int(ends[-1])
    starts = ends - sizes
    wide = codes.astype(np.uint64) << (64 - (starts & 31) - sizes).astype(np.uint64)
    word = starts >> 5
    count = (total >> 5) + 2
    # codes never overlap, so the floats that are summed are exact integers below 2**32
    high = np.bincount(word, (wide >> np.uint64(32)).astype(np.float64), count)
    low = np.bincount(word + 1, (wide & np.uint64(0xFFFFFFFF)).astype(np.float64), count)
    packed = (high + low).astype(np.uint64).astype(">u4").view(np.uint8)
    packed[: 1 if carried.size else 0] |= np.packbits(carried)
    whole = total // 8
    return packed[:whole], np.unpackbits(packed[whole : whole + 1])[: total % 8]


def decode(
    payload: NDArray[np.uint8], block_bits: NDArray[np.uint16], lengths: NDArray[np.uint8], n: int
) -> NDArray[Any]:
    """Undo :func:`encode`.

    Raises:
        ArtifactError: If the lengths are no complete prefix code, or a block does not end where the next one begins.
    """
    table, longest = _lookup(lengths)
    ends = np.cumsum(block_bits, dtype=np.int64)
    require(payload.size == -(-int(ends[-1] if n else 0) // 8), f"{payload.size} bytes of codes for {n} symbols")
    starts = ends - block_bits
    symbols = np.empty((ends.size, BLOCK), np.uint8 if lengths.size <= 256 else np.uint16)
    for first in range(0, ends.size, _LANES):
        lanes = slice(first, min(first + _LANES, ends.size))
        tail = n - (ends.size - 1) * BLOCK if lanes.stop == ends.size else BLOCK
        byte = int(starts[first]) >> 3
        piece = payload[byte : -(-int(ends[lanes.stop - 1]) >> 3) + 1]
        stopped = _read_lanes(piece, starts[lanes] - 8 * byte, table, longest, symbols[lanes], tail)
        require(bool((stopped == ends[lanes] - 8 * byte).all()), "codes that do not end with their block")
    return symbols.reshape(-1)[:n]


def _read_lanes(
    payload: NDArray[np.uint8],
    starts: NDArray[np.int64],
    table: NDArray[np.uint32],
    longest: int,
    out: NDArray[Any],
    tail: int,
) -> NDArray[np.int64]:
    """Read one block a lane, ``tail`` symbols in the last one; returns where each lane stopped."""
    beyond = np.zeros(BLOCK * MAX_LENGTH // 8 + 3, np.uint8)  # as far as damaged codes can lead
    padded = np.append(payload, beyond).astype(np.uint32)
    windows = padded[:-2] << 16 | padded[1:-1] << 8 | padded[2:]
    position, mask = starts.copy(), np.uint32((1 << longest) - 1)
    columns = np.empty((BLOCK, starts.size), out.dtype)
    for step in range(BLOCK):
        if step == tail:
            position, last = position[:-1], position[-1:]
        if not position.size:
            break
        shift = (24 - longest - (position & 7)).astype(np.uint32)
        entry = table[(windows[position >> 3] >> shift) & mask]
        columns[step, : position.size] = entry >> 4
        position += entry & 15
    out[:] = columns.T
    return np.append(position, last) if tail < BLOCK else position


def _lookup(lengths: NDArray[np.uint8]) -> tuple[NDArray[np.uint32], int]:
    """Return ``symbol << 4 | length`` for every window of as many bits as the longest code has."""
    longest = int(lengths.max(initial=0))
    present = _canonical_order(lengths)
    sizes = lengths[present].astype(np.int64)
    complete = 0 < longest <= MAX_LENGTH and int((1 << (longest - sizes)).sum()) == 1 << longest
    require(complete, "lengths that are no complete prefix code")
    entries = present.astype(np.uint32) << 4 | sizes.astype(np.uint32)
    return np.repeat(entries, 1 << (longest - sizes)), longest


def _canonical_order(lengths: NDArray[np.uint8]) -> NDArray[np.int64]:
    present = np.flatnonzero(lengths)
    return present[np.argsort(lengths[present], kind="stable")]
