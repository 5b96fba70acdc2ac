"""Dense numbers byte by byte: the plane of all highest bytes, then of all second ones, each coded on its own.

The exponents of trained weights have about 2.5 bits of entropy in eight; mantissas have none to save and stay raw.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_compress.coding.blob import Reader, Writer
from lightning_compress.coding.stream import RAW, Stream, StreamPlan, count, entropy_bits, plan_stream, read_stream
from lightning_compress.coding.words import Words, fold, unfold

_CHUNK = 1 << 20
_SAMPLE = 1 << 16


@dataclass(frozen=True)
class PlanesPlan:
    """How words will be written plane by plane.

    Args:
        words: All of them.
        dtype: What they stand for.
        streams: One a plane, the highest bytes first.
    """

    words: Words
    dtype: torch.dtype
    streams: tuple[StreamPlan, ...]

    @property
    def bytes(self) -> int:
        """Size, to within what the streams' are known to."""
        return sum(stream.bytes for stream in self.streams)

    def write(self, writer: Writer) -> None:
        """Append it."""
        for place, stream in enumerate(self.streams):
            stream.write(writer, _plane(self.words, self.dtype, self.words.itemsize - 1 - place))


def plan_planes(words: Words, dtype: torch.dtype, allowed: tuple[int, ...]) -> PlanesPlan | None:
    """Return the plan, or ``None`` for no words."""
    if not words.size:
        return None
    sample = words[:: max(1, words.size // _SAMPLE)]
    streams = []
    for place in reversed(range(words.itemsize)):
        few = count(_plane(sample, dtype, place), 256)
        hopeless = words.size > 2 * _SAMPLE and entropy_bits(few) > 7.9 * sample.size
        counts = np.zeros(256, np.int64) if hopeless else count(_plane(words, dtype, place), 256)
        if hopeless:  # a plane of noise is not worth counting
            streams.append(StreamPlan(RAW, 5 + words.size, 0, 256, np.zeros(0, np.uint8)))
        else:
            streams.append(plan_stream(counts, allowed))
    return PlanesPlan(words, dtype, tuple(streams))


def _plane(words: Words, dtype: torch.dtype, place: int) -> NDArray[np.uint8]:
    """Return one byte of each folded word, counted from the lowest."""
    plane = np.empty(words.size, np.uint8)
    shift = words.dtype.type(8 * place)
    for start in range(0, words.size, _CHUNK):
        plane[start : start + _CHUNK] = (fold(words[start : start + _CHUNK], dtype) >> shift).astype(np.uint8)
    return plane


@dataclass(frozen=True)
class Planes:
    """As found in a file, not yet decoded.

    Args:
        dtype: What the words stand for.
        width: Bytes of a word.
        streams: One a plane, the highest bytes first.
    """

    dtype: torch.dtype
    width: int
    streams: tuple[Stream, ...]

    def decode(self) -> Words:
        """Return the words ``(n,)``."""
        words = np.zeros(self.streams[0].n, f"u{self.width}")
        for place, stream in enumerate(self.streams):
            plane, shift = stream.decode(), words.dtype.type(8 * (self.width - 1 - place))
            for start in range(0, words.size, _CHUNK):
                words[start : start + _CHUNK] |= plane[start : start + _CHUNK].astype(words.dtype) << shift
        for start in range(0, words.size, _CHUNK):
            words[start : start + _CHUNK] = unfold(words[start : start + _CHUNK], self.dtype)
        return words


def read_planes(reader: Reader, n: int, width: int, dtype: torch.dtype) -> Planes:
    """Return the next streams of ``n`` bytes, one for each byte of a word."""
    return Planes(dtype, width, tuple(read_stream(reader, n, 256, "values") for _ in range(width)))
