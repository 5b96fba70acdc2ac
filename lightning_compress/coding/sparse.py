"""Few weights among zeros: where they are, and what they are, each coded the smallest way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_compress.coding import stream, values
from lightning_compress.coding.blob import Bytes, Reader, Writer, require
from lightning_compress.coding.relative_index import MAX_INDEX_BITS, absolute_index, relative_index, symbol_counts
from lightning_compress.coding.stream import Stream, StreamPlan, Symbols, plan_stream, read_stream
from lightning_compress.coding.words import Words, negative_zero, word_bytes

_CHUNK = 1 << 20


@dataclass(frozen=True)
class PositionsPlan:
    """How positions will be written.

    Args:
        index_bits: Bits of the relative index; 0 for a bitmap, eight positions a symbol.
        symbols: How to make the symbols of the stream.
        count: Number of symbols.
        stream: How they are written.
    """

    index_bits: int
    symbols: Callable[[], Symbols]
    count: int
    stream: StreamPlan


def plan_positions(present: NDArray[np.bool_], allowed: tuple[int, ...]) -> PositionsPlan:
    """Return the smallest way to say which entries are present: a bitmap, or a relative index of the best width."""
    bitmap = np.packbits(present)
    best = PositionsPlan(0, lambda: bitmap, bitmap.size, plan_stream(stream.count(bitmap, 256), allowed))
    positions = np.flatnonzero(present)
    if not 0 < positions.size < present.size // 2:
        return best
    counts = symbol_counts(positions, range(1, MAX_INDEX_BITS + 1))
    width = min(counts, key=lambda bits: _bits_of_index(counts[bits], bits, allowed))
    plan = plan_stream(counts[width], allowed)
    if plan.bytes < best.stream.bytes:
        total = int(counts[width].sum())
        best = PositionsPlan(width, lambda: relative_index(positions, width), total, plan)
    return best


def _bits_of_index(counts: NDArray[np.int64], width: int, allowed: tuple[int, ...]) -> float:
    if allowed == (stream.RAW,):
        return width * float(counts.sum())
    return stream.entropy_bits(counts) + 8 * np.flatnonzero(counts)[-1]


@dataclass(frozen=True)
class SparsePlan:
    """How a tensor of many zeros will be written.

    Args:
        positions: Where the weights are.
        count: How many there are.
        signs: Where zeros of both signs are absent: the stream of their signs, eight a symbol, and the symbols.
        values: What the weights are.
    """

    positions: PositionsPlan
    count: int
    signs: tuple[StreamPlan, Bytes] | None
    values: values.ValuesPlan

    @property
    def bytes(self) -> int:
        """Size, to within what the streams' are known to."""
        signs = self.signs[0].bytes if self.signs else 0
        return 10 + self.positions.stream.bytes + signs + self.values.bytes

    def write(self, writer: Writer) -> None:
        """Append it."""
        for number in (self.positions.index_bits, self.positions.count, self.count, self.signs is not None):
            writer.number(int(number))
        self.positions.stream.write(writer, self.positions.symbols())
        if self.signs:
            self.signs[0].write(writer, self.signs[1])
        writer.number(self.values.kind)
        self.values.write(writer)


def plan_sparse(words: Words, dtype: torch.dtype, allowed: tuple[int, ...]) -> SparsePlan | None:
    """Return the smallest plan, or ``None`` where fewer than one word in sixteen is zero."""
    present = words != 0
    plans = [_plan(words, present, None, dtype, allowed)] if _worthwhile(present) else []
    minus = negative_zero(dtype)
    negative = None if minus is None else words == words.dtype.type(minus)
    if negative is not None and negative.any():
        present &= ~negative
        if _worthwhile(present):
            plans.append(_plan(words, present, negative[~present], dtype, allowed))
    return min(plans, key=lambda plan: plan.bytes, default=None)


def _worthwhile(present: NDArray[np.bool_]) -> bool:
    return 16 * int(np.count_nonzero(present)) < 15 * present.size


def _plan(
    words: Words,
    present: NDArray[np.bool_],
    negative: NDArray[np.bool_] | None,
    dtype: torch.dtype,
    allowed: tuple[int, ...],
) -> SparsePlan:
    kept = words[present]
    signs = None
    if negative is not None:
        packed = np.packbits(negative)
        signs = plan_stream(stream.count(packed, 256), allowed), packed
    return SparsePlan(plan_positions(present, allowed), kept.size, signs, values.plan_values(kept, dtype, allowed))


@dataclass(frozen=True)
class Sparse:
    """As found in a file, not yet decoded.

    Args:
        n: Number of words.
        dtype: What they stand for.
        index_bits: As in :class:`PositionsPlan`.
        positions: The stream that says where the weights are.
        count: How many there are.
        signs: The stream of the signs of zeros.
        values: Decodes the weights.
    """

    n: int
    dtype: torch.dtype
    index_bits: int
    positions: Stream
    count: int
    signs: Stream | None
    values: Callable[[], Words]

    def decode(self) -> Words:
        """Return the words ``(n,)``."""
        words = np.zeros(self.n, f"u{word_bytes(self.dtype)}")
        kept, symbols = self.values(), self.positions.decode()
        if self.index_bits:
            self._scatter(words, kept, symbols)
            present = words != 0 if self.signs else None
        else:
            present = self._mask(symbols)
            words[present] = kept
        if self.signs is not None and present is not None:
            self._sign(words, present, self.signs)
        return words

    def _scatter(self, words: Words, kept: Words, symbols: Symbols) -> None:
        """Put the weights at their positions, some at a time."""
        done = end = 0
        for start in range(0, symbols.size, _CHUNK):
            positions, end = absolute_index(symbols[start : start + _CHUNK], self.index_bits, end)
            require(end <= self.n and done + positions.size <= kept.size, f"positions beyond {self.n} entries")
            words[positions] = kept[done : done + positions.size]
            done += positions.size
        require(done == kept.size, f"{done} positions for {kept.size} values")

    def _mask(self, bitmap: Symbols) -> NDArray[np.bool_]:
        present: NDArray[np.bool_] = np.unpackbits(bitmap.astype(np.uint8, copy=False), count=self.n).view(np.bool_)
        found = int(np.count_nonzero(present))
        require(found == self.count, f"{found} positions for {self.count} values")
        return present

    def _sign(self, words: Words, present: NDArray[np.bool_], signs: Stream) -> None:
        absent = self.n - int(np.count_nonzero(present))
        minus = negative_zero(self.dtype)
        require(minus is not None and absent == self.n - self.count, "signs of no zeros")
        negative = np.unpackbits(signs.decode().astype(np.uint8, copy=False), count=absent)
        words[~present] = negative.astype(words.dtype) << words.dtype.type(8 * words.itemsize - 1)


def read_sparse(reader: Reader, n: int, dtype: torch.dtype) -> Sparse:
    """Return the next sparse tensor of ``n`` words.

    Raises:
        ArtifactError: If what is declared cannot be, before anything is allocated.
    """
    width = reader.number(MAX_INDEX_BITS, "the number of index bits")
    symbols = reader.number(n, "the number of indices")
    count = reader.number(n, "the number of values")
    signed = reader.number(1, "whether zeros have signs")
    require(width > 0 or symbols == -(-n // 8), f"a bitmap of {symbols} bytes for {n} entries")
    positions = read_stream(reader, symbols, 1 << width if width else 256, "indices")
    signs = read_stream(reader, -(-(n - count) // 8), 256, "values") if signed else None
    kind = reader.number(values.PLANES, "the kind of values")
    return Sparse(n, dtype, width, positions, count, signs, values.read_values(reader, count, dtype, kind))
