"""Few distinct values: a codebook and indices into it, as weight sharing, quantization and binarization leave."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_compress.coding.blob import Reader, Writer, require
from lightning_compress.coding.stream import (
    MAX_ALPHABET,
    Counts,
    Stream,
    StreamPlan,
    Symbols,
    count,
    plan_stream,
    read_stream,
)
from lightning_compress.coding.words import Words

_CHUNK = 1 << 20
_SAMPLE = 1 << 16


def distinct(words: Words, limit: int = MAX_ALPHABET) -> tuple[Words, Symbols, Counts] | None:
    """Return the sorted distinct words, the index of each word into them, and their counts.

    Args:
        words: Flat unsigned integers ``(n,)``.
        limit: Most distinct words.

    Returns:
        ``None`` where there are more than ``limit``, which a sample mostly tells.

    >>> codebook, indices, counts = distinct(np.array([7, 9, 7, 7], np.uint32))
    >>> codebook.tolist(), indices.tolist(), counts.tolist()
    ([7, 9], [0, 1, 0, 0], [3, 1])
    """
    if words.itemsize <= 2:
        return _distinct_narrow(words, limit)
    codebook = np.unique(words[:: max(1, words.size // _SAMPLE)])
    for start in range(0, words.size, _CHUNK):
        if codebook.size > limit:
            return None
        chunk = words[start : start + _CHUNK]
        missing = chunk[codebook[_place(codebook, chunk)] != chunk]
        if missing.size:
            codebook = np.union1d(codebook, missing)
    if codebook.size > limit:
        return None
    indices = np.empty(words.size, _index_type(codebook.size))
    for start in range(0, words.size, _CHUNK):
        indices[start : start + _CHUNK] = _place(codebook, words[start : start + _CHUNK])
    return codebook, indices, count(indices, codebook.size)


def _place(codebook: Words, chunk: Words) -> NDArray[np.int64]:
    return np.minimum(np.searchsorted(codebook, chunk), codebook.size - 1)


def _distinct_narrow(words: Words, limit: int) -> tuple[Words, Symbols, Counts] | None:
    counts = count(words, 1 << 8 * words.itemsize)
    codebook = np.flatnonzero(counts)
    if codebook.size > limit:
        return None
    place = np.zeros(counts.size, _index_type(codebook.size))
    place[codebook] = np.arange(codebook.size)
    return codebook.astype(words.dtype), place[words], counts[codebook]


def _index_type(size: int) -> type[np.uint8 | np.uint16]:
    return np.uint8 if size <= 256 else np.uint16


@dataclass(frozen=True)
class PalettePlan:
    """How words will be written as a codebook and indices.

    Args:
        codebook: Sorted distinct words.
        indices: One a word.
        stream: How the indices are written.
    """

    codebook: Words
    indices: Symbols
    stream: StreamPlan

    @property
    def bytes(self) -> int:
        """Size, to within what the stream's is known to."""
        return 2 + self.codebook.nbytes + self.stream.bytes

    def write(self, writer: Writer) -> None:
        """Append it."""
        writer.number(self.codebook.size)
        writer.data(self.codebook)
        self.stream.write(writer, self.indices)


def plan_palette(words: Words, allowed: tuple[int, ...]) -> PalettePlan | None:
    """Return the plan, or ``None`` for no words and for too many distinct ones."""
    found = distinct(words) if words.size else None
    if found is None:
        return None
    codebook, indices, counts = found
    return PalettePlan(codebook, indices, plan_stream(counts, allowed))


@dataclass(frozen=True)
class Palette:
    """As found in a file, not yet decoded.

    Args:
        codebook: Distinct words.
        stream: Indices into it.
    """

    codebook: Words
    stream: Stream

    def decode(self) -> Words:
        """Return the words ``(n,)``."""
        return self.codebook[self.stream.decode()]


def read_palette(reader: Reader, n: int, width: int) -> Palette:
    """Return the next codebook of words of ``width`` bytes and its stream of ``n`` indices."""
    size = reader.number(MAX_ALPHABET, "the size of a codebook")
    require(size > 0, "an empty codebook")
    codebook = reader.data(size, f"u{width}", "codebooks")
    return Palette(codebook, read_stream(reader, n, size, "values"))
