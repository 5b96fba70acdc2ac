"""A stream of small integers: fixed width, canonical Huffman or ANS, whichever is smallest for what occurs in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_compress.coding import ans, huffman
from lightning_compress.coding.bits import pack_fixed, unpack_fixed
from lightning_compress.coding.blob import Reader, Writer, require
from lightning_compress.core.errors import ConfigurationError, did_you_mean

Symbols = NDArray[Any]
Counts = NDArray[np.int64]

RAW, HUFFMAN, ANS = range(3)
"""What the first number of a stream says about the rest."""

CODINGS: Mapping[str, tuple[int, ...]] = {
    "auto": (RAW, HUFFMAN, ANS),
    "huffman": (RAW, HUFFMAN),
    "ans": (RAW, ANS),
    "none": (RAW,),
}
"""Which coders a user's word allows; fixed width always is, for it can be the smallest."""

MAX_ALPHABET = 4096
_CHUNK = 1 << 20


def coders(coding: str) -> tuple[int, ...]:
    """Return the coders that ``coding`` allows.

    Raises:
        ConfigurationError: If it is none of :data:`CODINGS`.
    """
    if not isinstance(coding, str) or coding not in CODINGS:
        options = ", ".join(map(repr, CODINGS))
        raise ConfigurationError(
            f"`coding` must be one of {options}, got {coding!r}; {did_you_mean(str(coding), CODINGS)}"
        )
    return CODINGS[coding]


def count(symbols: Symbols, alphabet: int) -> Counts:
    """Return how often each symbol occurs ``(alphabet,)``, in pieces, for the counting widens them to 64 bits."""
    total = np.zeros(alphabet, np.int64)
    for start in range(0, symbols.size, _CHUNK):
        total += np.bincount(symbols[start : start + _CHUNK], minlength=alphabet)
    return total


def entropy_bits(counts: Counts) -> float:
    """Return the fewest bits that independent symbols with these counts can take.

    >>> entropy_bits(np.array([2, 1, 1, 0]))
    6.0
    """
    present = counts[counts > 0]
    return float(-(present * np.log2(present / present.sum())).sum()) if present.size > 1 else 0.0


@dataclass(frozen=True)
class StreamPlan:
    """How a stream will be written.

    Args:
        coder: :data:`RAW`, :data:`HUFFMAN` or :data:`ANS`.
        bytes: Size, the numbers at its start included: exact, with ANS to within eight bytes and a byte in 100,000.
        first: Lowest symbol that occurs; the others are stored relative to it.
        alphabet: Highest symbol minus ``first``, plus one.
        table: Code lengths or frequencies, by symbol.
    """

    coder: int
    bytes: int
    first: int
    alphabet: int
    table: NDArray[np.uint8]

    def write(self, writer: Writer, symbols: Symbols) -> None:
        """Append the stream of ``symbols``, whose counts the plan was made from."""
        for number in (self.coder, self.first, self.alphabet):
            writer.number(number)
        shifted = symbols - symbols.dtype.type(self.first) if self.first else symbols
        if self.coder == RAW:
            writer.data(pack_fixed(shifted, _width(self.alphabet)))
        elif self.coder == HUFFMAN:
            writer.data(huffman.pack_lengths(self.table))
            for array in huffman.encode(shifted, self.table):
                writer.data(array)
        else:
            words = ans.encode(shifted, self.table)
            writer.number(words.size)
            writer.data(self.table)
            writer.data(words)


def plan_stream(counts: Counts, allowed: tuple[int, ...]) -> StreamPlan:
    """Return the smallest way to write symbols with these counts; at equal size the one that reads fastest.

    >>> plan_stream(np.array([0, 0, 900, 50, 50]), (RAW, HUFFMAN, ANS)).coder == ANS
    True
    """
    present = np.flatnonzero(counts)
    first, last = (int(present[0]), int(present[-1])) if present.size else (0, 0)
    used, n = counts[first : last + 1], int(counts.sum())
    none = np.zeros(0, np.uint8)
    plans = [StreamPlan(RAW, -(-n * _width(used.size) // 8), first, used.size, none)]
    if HUFFMAN in allowed and present.size > 1:
        lengths = huffman.code_lengths(used)
        size = -(-used.size // 2) + 2 * huffman.blocks(n) + -(-int((used * lengths).sum()) // 8)
        plans.append(StreamPlan(HUFFMAN, size, first, used.size, lengths))
    if ANS in allowed and present.size > 1:
        table = ans.frequency_table(used)
        size = used.size + 3 + ans.expected_bytes(used, table)
        plans.append(StreamPlan(ANS, size, first, used.size, table))
    best = min(plans, key=lambda plan: plan.bytes)
    return StreamPlan(best.coder, best.bytes + 4, best.first, best.alphabet, best.table)


@dataclass(frozen=True)
class Stream:
    """A stream as found in a file, not yet decoded.

    Args:
        coder: As in :class:`StreamPlan`.
        n: Number of symbols.
        first: Lowest symbol.
        alphabet: Number of symbols from the lowest to the highest.
        table: Code lengths or frequencies.
        payload: The codes.
        block_bits: Bits of each block, with Huffman.
    """

    coder: int
    n: int
    first: int
    alphabet: int
    table: NDArray[Any]
    payload: NDArray[Any]
    block_bits: NDArray[Any]

    def decode(self) -> Symbols:
        """Return the symbols ``(n,)``, each below ``first + alphabet``.

        Raises:
            ArtifactError: If the codes are damaged.
        """
        if self.coder == RAW:
            symbols = unpack_fixed(self.payload, _width(self.alphabet), self.n)
        elif self.coder == HUFFMAN:
            symbols = huffman.decode(self.payload, self.block_bits, self.table, self.n)
        else:
            symbols = ans.decode(self.payload, self.table, self.n)
        highest = int(symbols.max(initial=0)) if self.coder == RAW else 0
        require(highest < self.alphabet, f"the symbol {highest} in a stream of {self.alphabet}")
        if not self.first:
            return symbols
        wide = self.first + self.alphabet > 256
        symbols = symbols.astype(np.uint16) if wide else symbols
        symbols += symbols.dtype.type(self.first)
        return symbols


def read_stream(reader: Reader, n: int, limit: int, role: str) -> Stream:
    """Return the next stream of ``n`` symbols below ``limit``; its codes count as ``role``, its table as codebooks.

    Raises:
        ArtifactError: If what it declares is impossible, before anything is allocated.
    """
    coder = reader.number(ANS, "the coder of a stream")
    first = reader.number(limit - 1, "the lowest symbol of a stream")
    alphabet = reader.number(limit - first, "the number of symbols of a stream")
    require(alphabet > (coder != RAW), f"a stream of {alphabet} symbols")
    none = np.zeros(0, np.uint8)
    if coder == RAW:
        payload = reader.data(-(-n * _width(alphabet) // 8), "u1", role)
        return Stream(coder, n, first, alphabet, none, payload, none)
    if coder == HUFFMAN:
        packed = reader.data(-(-alphabet // 2), "u1", "codebooks")
        block_bits = reader.data(huffman.blocks(n), "u2", role)
        payload = reader.data(-(-int(block_bits.sum(dtype=np.int64)) // 8), "u1", role)
        lengths = huffman.unpack_lengths(packed, alphabet)
        return Stream(coder, n, first, alphabet, lengths, payload, block_bits)
    words = reader.number(2**60, "the number of words of a stream")
    table = reader.data(alphabet, "u1", "codebooks")
    return Stream(coder, n, first, alphabet, table, reader.data(words, "u4", role), none)


def _width(alphabet: int) -> int:
    return (alphabet - 1).bit_length()
