"""What a packed tensor is, and what a packing has to offer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_compress.core.errors import ArtifactError, did_you_mean

Parts = Mapping[str, Tensor]
Config = Mapping[str, Any]

ROLES = ("values", "indices", "codebooks", "other")
"""What the bits of a part are counted as; headers count as ``other``."""

NATIVE_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
"""Types that every supported safetensors release can hold, with their names there; all others are stored as bytes."""

_BYTE_DTYPES = (
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
)
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (*NATIVE_DTYPES, *_BYTE_DTYPES)}


@dataclass(frozen=True)
class Packed:
    """One tensor as it lies on disk.

    Args:
        packing: Key of :data:`PACKINGS`, or ``"alias"`` for a tensor that is stored under another key.
        parts: Tensors by name; what they are called and counted as is the packing's ``roles``.
        config: JSON-able rest; ``shape`` and ``dtype`` stand there when they differ from those of the part ``values``.
    """

    packing: str
    parts: Parts = field(default_factory=dict)
    config: Config = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the unpacked tensor, known without unpacking it."""
        declared = self.config.get("shape")
        if declared is None:
            return tuple(self._values().shape)
        if not isinstance(declared, list) or not all(type(size) is int and 0 <= size < 2**63 for size in declared):
            raise ArtifactError(f"`shape` must be a list of sizes, got {str(declared)[:80]}; the file is damaged")
        return tuple(declared)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the unpacked tensor, known without unpacking it."""
        declared = self.config.get("dtype")
        if declared is None:
            return self._values().dtype
        if not isinstance(declared, str) or declared not in DTYPES:
            raise ArtifactError(f"unknown `dtype` {str(declared)[:80]!r}; {did_you_mean(str(declared)[:80], DTYPES)}")
        return DTYPES[declared]

    def _values(self) -> Tensor:
        if "values" not in self.parts:
            raise ArtifactError(f"no shape or type for a {self.packing} tensor; the file is damaged")
        return self.parts["values"]

    def disk_bytes(self) -> int:
        """Return the bytes of the parts and of their header entries (these but for a few digits of the offsets)."""
        size = len(json.dumps([self.packing, dict(self.config)]))
        for name, part in self.parts.items():
            data = part.numel() * part.element_size()
            entry = {name: {"dtype": "F32", "shape": list(part.shape), "data_offsets": [data, data]}}
            size += data + len(json.dumps(entry))
        return size


@dataclass(frozen=True)
class Plan:
    """One way to pack a tensor, before anything is packed.

    Args:
        bytes: What its parts and their header entries would take, nearly.
        build: Packs.
    """

    bytes: int
    build: Callable[[], Packed]


@dataclass(frozen=True)
class Packing:
    """Pure, bit-exact functions and what their parts count as.

    Args:
        plan: From a contiguous CPU tensor and the coders that are allowed to a plan, or ``None`` where the packing
            does not apply or cannot be the smallest.
        decode: Back; raises :class:`ArtifactError` for parts that do not fit the config, before it allocates.
        roles: One of :data:`ROLES` for each part.
        bits: What a part counts as where it has several roles; raises :class:`ArtifactError` for damaged ones.
        since: Version of the format that has it.
    """

    plan: Callable[[Tensor, tuple[int, ...]], Plan | None]
    decode: Callable[[Packed], Tensor]
    roles: Mapping[str, str]
    bits: Callable[[Packed], Mapping[str, int]] | None = None
    since: int = 1

    def encode(self, tensor: Tensor, allowed: tuple[int, ...] = tuple(range(3))) -> Packed | None:
        """Pack a contiguous CPU tensor, where that is possible."""
        plan = self.plan(tensor, allowed)
        return None if plan is None else plan.build()


def entry_bytes(parts: int) -> int:
    """Return about what the header says of a tensor with so many parts."""
    return 60 + 80 * parts
