"""Asymmetric numeral systems: streams within a thousandth of their entropy, through the library ``constriction``.

Probabilities are written as one byte a symbol and turned into floats by exact integer and IEEE operations, so that
every platform builds the same model: 0 for an absent symbol, and b for the weight (16 + b % 16) * 2**(b // 16).
"""

from __future__ import annotations

from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

from lightning_compress.coding.blob import require
from lightning_compress.core.errors import ArtifactError

_BYTES = np.arange(256)
WEIGHTS: NDArray[np.int64] = np.where(_BYTES == 0, 0, (16 + _BYTES % 16) << (_BYTES // 16)).astype(np.int64)
"""Relative frequency that each byte of a table stands for: within 1/32 of any from 1 to 1/60,000 of the largest."""

_CHUNK = 1 << 20


def frequency_table(counts: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return one byte a symbol that says how frequent it is, relative to the most frequent one.

    Args:
        counts: Occurrences ``(k,)``, not all zero, each below 2**42.

    Returns:
        Bytes ``(k,)``; 0 exactly where the count is 0.

    >>> WEIGHTS[frequency_table(np.array([100, 50, 0, 1]))] / 1015808
    array([1.        , 0.5       , 0.        , 0.01008065])
    """
    scaled = counts.astype(np.int64) * int(WEIGHTS[-1]) // int(counts.max())
    between = (WEIGHTS[1:-1] + WEIGHTS[2:]) // 2
    return np.where(counts == 0, 0, 1 + np.searchsorted(between, scaled, side="left")).astype(np.uint8)


def expected_bytes(counts: NDArray[np.int64], table: NDArray[np.uint8]) -> int:
    """Return what a stream of these symbols takes: the cross entropy, and the state of 32 bits at its end."""
    present = counts > 0
    weights = WEIGHTS[table].astype(np.float64)
    bits = -(counts[present] * np.log2(weights[present] / weights.sum())).sum()
    return 4 * (int(bits) // 32 + 1)


def encode(symbols: NDArray[Any], table: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """Return the words of a stream.

    Args:
        symbols: Integers ``(n,)`` below ``len(table)``.
        table: From :func:`frequency_table`, with at least two symbols.
    """
    model = _model(table)
    coder = constriction.stream.stack.AnsCoder()
    for end in range(symbols.size, 0, -_CHUNK):  # a stack: the last symbols go in first
        coder.encode_reverse(symbols[max(0, end - _CHUNK) : end].astype(np.int32), model)
    return coder.get_compressed()


def decode(words: NDArray[np.uint32], table: NDArray[np.uint8], n: int) -> NDArray[Any]:
    """Undo :func:`encode`; ``n`` symbols are allocated, whatever the stream holds.

    Raises:
        ArtifactError: If the table is none, or the stream does not end with the last symbol.
    """
    require(bool((table > 0).any()), "a table of frequencies that are all zero")
    symbols = np.empty(n, np.uint8 if table.size <= 256 else np.uint16)
    try:
        coder, model = constriction.stream.stack.AnsCoder(words), _model(table)
        for start in range(0, n, _CHUNK):
            count = min(_CHUNK, n - start)
            symbols[start : start + count] = coder.decode(model, count)
    except ValueError as error:
        raise ArtifactError(f"an entropy-coded stream that cannot be read ({error}); the file is damaged") from error
    require(bool(coder.is_empty()), f"an entropy-coded stream that does not end after {n} symbols")
    return symbols


def _model(table: NDArray[np.uint8]) -> constriction.stream.model.Categorical:
    weights = WEIGHTS[table].astype(np.float64)
    return constriction.stream.model.Categorical(weights / weights.sum(), perfect=False)
