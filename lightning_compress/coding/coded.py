"""Packings with a code: few distinct values, at all or in a row, few weights among zeros, dense numbers by planes.

Each is one part ``data``: header entries are dear for small tensors. It begins with what says how it is to be read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from lightning_compress.coding import values
from lightning_compress.coding.blob import Reader, Writer, require
from lightning_compress.coding.packed import Packed, Packing, Plan, entry_bytes
from lightning_compress.coding.rows import plan_rows, read_rows
from lightning_compress.coding.sparse import plan_sparse, read_sparse
from lightning_compress.coding.words import Words, from_words, to_words, word_bytes

SINCE = 2
_TINY = 64
"""Bytes of a tensor that no code makes smaller, as the header says more of it than of a dense one."""

_LARGE = 1 << 16
"""Words of a tensor for which only the likely packings are tried."""


class _Plan(Protocol):
    @property
    def bytes(self) -> int: ...

    def write(self, writer: Writer) -> None: ...


def _plan_values(kind: int, name: str) -> Callable[[Tensor, tuple[int, ...]], Plan | None]:
    def plan(tensor: Tensor, allowed: tuple[int, ...]) -> Plan | None:
        if tensor.numel() * tensor.element_size() < _TINY or _mostly_zeros(tensor):
            return None
        found = values.plan_kind(kind, to_words(tensor), tensor.dtype, allowed)
        return None if found is None else _plan(name, tensor, found)

    return plan


def _plan_rows(tensor: Tensor, allowed: tuple[int, ...]) -> Plan | None:
    if tensor.numel() * tensor.element_size() < _TINY or tensor.dim() < 2 or tensor.is_complex():
        return None
    found = plan_rows(to_words(tensor), tensor.shape[0], allowed)
    return None if found is None else _plan("rows", tensor, found)


def _plan_sparse(tensor: Tensor, allowed: tuple[int, ...]) -> Plan | None:
    if tensor.numel() * tensor.element_size() < _TINY:
        return None
    found = plan_sparse(to_words(tensor), tensor.dtype, allowed)
    return None if found is None else _plan("sparse", tensor, found)


def _plan(name: str, tensor: Tensor, plan: _Plan) -> Plan:
    config = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}

    def build() -> Packed:
        writer = Writer()
        plan.write(writer)
        return Packed(name, {"data": writer.tensor()}, config)

    return Plan(plan.bytes + entry_bytes(1) + 20, build)


def _mostly_zeros(tensor: Tensor) -> bool:
    """Return whether ``tensor`` is so large and sparse that only the sparse packing needs to be tried."""
    if tensor.numel() < _LARGE or tensor.is_complex():
        return False
    words = to_words(tensor)
    some = int((words != 0).sum())
    return 0 < some < words.size // 2


def _read(packed: Packed) -> tuple[Reader, Callable[[], Words]]:
    """Check what a part declares; nothing is decoded yet."""
    require({"shape", "dtype"} <= packed.config.keys(), f"no shape or type for a {packed.packing} tensor")
    dtype, reader = packed.dtype, Reader(packed.parts["data"])
    n = math.prod(packed.shape) * (dtype.itemsize // word_bytes(dtype))
    require(n < 2**60, f"a tensor of {n} numbers")
    if packed.packing == "sparse":
        decode = read_sparse(reader, n, dtype).decode
    elif packed.packing == "rows":
        require(len(packed.shape) > 1, "rows of a tensor that has none")
        decode = read_rows(reader, n, packed.shape[0], word_bytes(dtype)).decode
    else:
        decode = values.read_values(reader, n, dtype, _KINDS[packed.packing])
    reader.close()
    return reader, decode


def _decode(packed: Packed) -> Tensor:
    _, decode = _read(packed)
    return from_words(decode(), packed.dtype, packed.shape)


def _bits(packed: Packed) -> Mapping[str, int]:
    reader, _ = _read(packed)
    bits: dict[str, Any] = {role: 8 * size for role, size in reader.bytes_by_role.items()}
    return {**bits, "other": 8 * packed.parts["data"].numel() - sum(bits.values())}


_KINDS = {"palette": values.PALETTE, "planes": values.PLANES}
_ROLES = {"data": "other"}

CODED: dict[str, Packing] = {
    name: Packing(plan, _decode, _ROLES, _bits, SINCE)
    for name, plan in (
        ("palette", _plan_values(values.PALETTE, "palette")),
        ("rows", _plan_rows),
        ("sparse", _plan_sparse),
        ("planes", _plan_values(values.PLANES, "planes")),
    )
}
"""What the second version of the format adds."""
