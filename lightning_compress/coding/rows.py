"""Few distinct values in each row, as where the weights of a filter share a scale: a codebook a row, common indices."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_compress.coding.blob import Reader, Writer, require
from lightning_compress.coding.stream import Stream, StreamPlan, Symbols, count, plan_stream, read_stream
from lightning_compress.coding.words import Words

MAX_VALUES = 16
"""Most distinct values of a row."""

_SAMPLE = 8
_CHUNK = 1 << 20


@dataclass(frozen=True)
class RowsPlan:
    """How a matrix will be written.

    Args:
        sizes: Number of distinct values of each row.
        codebooks: Those of the first row, of the second, and so on, each sorted.
        indices: One a word, into the codebook of its row.
        stream: How the indices are written.
    """

    sizes: NDArray[np.uint8]
    codebooks: Words
    indices: Symbols
    stream: StreamPlan

    @property
    def bytes(self) -> int:
        """Size, to within what the stream's is known to."""
        return 1 + (0 if self._even else self.sizes.size) + self.codebooks.nbytes + self.stream.bytes

    @property
    def _even(self) -> bool:
        return bool((self.sizes == self.sizes[0]).all())

    def write(self, writer: Writer) -> None:
        """Append it."""
        writer.number(int(self.sizes[0]) if self._even else 0)
        if not self._even:
            writer.data(self.sizes)
        writer.data(self.codebooks)
        self.stream.write(writer, self.indices)


def plan_rows(words: Words, rows: int, allowed: tuple[int, ...]) -> RowsPlan | None:
    """Return the plan, or ``None`` where a row has more than :data:`MAX_VALUES` values.

    Args:
        words: Flat unsigned integers ``(rows * columns,)``.
        rows: Number of rows.
        allowed: Entropy coders that may be used.

    >>> plan = plan_rows(np.array([5, 5, 7, 9, 9, 9], np.uint32), 2, (0,))
    >>> plan.sizes.tolist(), plan.codebooks.tolist(), plan.indices.tolist()
    ([2, 1], [5, 7, 9], [0, 0, 1, 0, 0, 0])
    """
    if rows < 2 or words.size < 2 * rows:
        return None
    matrix = words.reshape(rows, -1)
    if any(np.unique(row).size > MAX_VALUES for row in matrix[:: max(1, rows // _SAMPLE)]):
        return None
    sizes, codebooks = np.empty(rows, np.uint8), []
    indices = np.empty(matrix.shape, np.uint8)
    step = max(1, _CHUNK // matrix.shape[1])
    for start in range(0, rows, step):
        chunk = matrix[start : start + step]
        ordered = np.sort(chunk, axis=1)
        first = np.ones(chunk.shape, np.bool_)
        np.not_equal(ordered[:, 1:], ordered[:, :-1], out=first[:, 1:])
        found = first.sum(axis=1)
        if int(found.max()) > MAX_VALUES:
            return None
        sizes[start : start + step] = found
        codebooks.append(ordered[first])
        indices[start : start + step] = _places(chunk, _padded(codebooks[-1], found))
    flat = indices.reshape(-1)
    return RowsPlan(sizes, np.concatenate(codebooks), flat, plan_stream(count(flat, MAX_VALUES), allowed))


def _padded(codebooks: Words, sizes: NDArray[np.integer]) -> Words:
    """Return codebooks as a matrix; what a row lacks is its last value again."""
    starts = np.cumsum(sizes, dtype=np.int64) - sizes
    columns = np.minimum(np.arange(int(sizes.max())), sizes[:, None].astype(np.int64) - 1)
    table: Words = codebooks[starts[:, None] + columns]
    return table


def _places(chunk: Words, table: Words) -> NDArray[np.uint8]:
    """Return how many values of its row's codebook are smaller than each word."""
    places = np.zeros(chunk.shape, np.uint8)
    for column in range(table.shape[1] - 1):
        places += chunk > table[:, column : column + 1]
    return places


@dataclass(frozen=True)
class Rows:
    """As found in a file, not yet decoded.

    Args:
        sizes: As in :class:`RowsPlan`.
        codebooks: As there.
        stream: Indices.
    """

    sizes: NDArray[np.uint8]
    codebooks: Words
    stream: Stream

    def decode(self) -> Words:
        """Return the words ``(n,)``."""
        indices = self.stream.decode().reshape(self.sizes.size, -1)
        table = _padded(self.codebooks, self.sizes)
        words = np.empty(indices.shape, self.codebooks.dtype)
        step = max(1, _CHUNK // indices.shape[1])
        for start in range(0, self.sizes.size, step):
            part = slice(start, start + step)
            chunk = indices[part]
            require(bool((chunk < self.sizes[part, None]).all()), "an index beyond the codebook of its row")
            words[part] = np.take_along_axis(table[part], chunk.astype(np.intp), axis=1)
        flat: Words = words.reshape(-1)
        return flat


def read_rows(reader: Reader, n: int, rows: int, width: int) -> Rows:
    """Return the next codebooks of words of ``width`` bytes and their stream of ``n`` indices.

    Raises:
        ArtifactError: If what is declared cannot be, before anything is allocated.
    """
    require(rows >= 2 and n >= 2 * rows, f"{n} numbers in {rows} rows")
    size = reader.number(MAX_VALUES, "the size of the codebooks")
    if size:
        codebooks = reader.data(rows * size, f"u{width}", "codebooks")
        sizes = np.full(rows, size, np.uint8)  # no more of them than codebooks, which the file was found to hold
    else:
        sizes = reader.data(rows, "u1", "codebooks")
        require(int(sizes.min()) > 0 and int(sizes.max()) <= MAX_VALUES, "codebooks that are empty or too large")
        codebooks = reader.data(int(sizes.sum(dtype=np.int64)), f"u{width}", "codebooks")
    return Rows(sizes, codebooks, read_stream(reader, n, MAX_VALUES, "values"))
