"""Words without structure, written the smallest way: raw, as a palette, or plane by plane."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lightning_compress.coding.blob import Reader, Writer
from lightning_compress.coding.palette import plan_palette, read_palette
from lightning_compress.coding.planes import plan_planes, read_planes
from lightning_compress.coding.words import Words, word_bytes

RAW, PALETTE, PLANES = range(3)
"""What the number before the values says about them."""

PLANES_MUST_SAVE = 0.01
"""Share of the raw size; for less, dense numbers are not worth the time to code them."""

_PLANES_AT_BEST = 8
"""Where a palette takes less than this part of the raw size, planes are not tried."""


@dataclass(frozen=True)
class ValuesPlan:
    """How values will be written.

    Args:
        kind: :data:`RAW`, :data:`PALETTE` or :data:`PLANES`.
        bytes: Size, to within what the streams' are known to.
        write: Appends the values alone, without the kind.
    """

    kind: int
    bytes: int
    write: Callable[[Writer], None]


def plan_values(words: Words, dtype: torch.dtype, allowed: tuple[int, ...]) -> ValuesPlan:
    """Return the smallest plan; at equal size the simplest."""
    plans = [ValuesPlan(RAW, words.nbytes, lambda writer: writer.data(words))]
    palette = plan_kind(PALETTE, words, dtype, allowed)
    plans += [palette] if palette else []
    if palette is None or _PLANES_AT_BEST * palette.bytes > words.nbytes:
        planes = plan_kind(PLANES, words, dtype, allowed)
        plans += [planes] if planes else []
    return min(plans, key=lambda plan: plan.bytes)


def plan_kind(kind: int, words: Words, dtype: torch.dtype, allowed: tuple[int, ...]) -> ValuesPlan | None:
    """Return the plan of one kind, or ``None`` where it does not apply or does not help."""
    if kind == PALETTE:
        palette = plan_palette(words, allowed)
        return None if palette is None else ValuesPlan(kind, palette.bytes, palette.write)
    planes = plan_planes(words, dtype, allowed)
    if planes is None or planes.bytes > (1 - PLANES_MUST_SAVE) * words.nbytes:
        return None
    return ValuesPlan(kind, planes.bytes, planes.write)


def read_values(reader: Reader, n: int, dtype: torch.dtype, kind: int) -> Callable[[], Words]:
    """Return what decodes the next ``n`` values.

    Raises:
        ArtifactError: If what is declared cannot be, before anything is allocated.
    """
    width = word_bytes(dtype)
    if kind == PALETTE:
        return read_palette(reader, n, width).decode
    if kind == PLANES:
        return read_planes(reader, n, width, dtype).decode
    words = reader.data(n, f"u{width}", "values")
    return lambda: words
