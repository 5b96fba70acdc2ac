"""Packings: how one tensor becomes parts on disk. A closed registry of pairs of pure, bit-exact functions."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_compress.coding.bits import pack_bits, unpack_bits
from lightning_compress.core.errors import ArtifactError, ConfigurationError, did_you_mean

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
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (*NATIVE_DTYPES, *_BYTE_DTYPES)}
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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
            return tuple(self.parts["values"].shape)
        if not isinstance(declared, list) or not all(type(size) is int and 0 <= size < 2**63 for size in declared):
            raise ArtifactError(f"`shape` must be a list of sizes, got {str(declared)[:80]}; the file is damaged")
        return tuple(declared)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the unpacked tensor, known without unpacking it."""
        declared = self.config.get("dtype")
        if declared is None:
            return self.parts["values"].dtype
        if not isinstance(declared, str) or declared not in _DTYPES:
            raise ArtifactError(f"unknown `dtype` {str(declared)[:80]!r}; {did_you_mean(str(declared)[:80], _DTYPES)}")
        return _DTYPES[declared]

    def bits(self) -> dict[str, int]:
        """Return the bits of the parts by role."""
        total = dict.fromkeys(ROLES, 0)
        for name, part in self.parts.items():
            total[PACKINGS[self.packing].roles[name]] += 8 * part.numel() * part.element_size()
        return total

    def disk_bytes(self) -> int:
        """Return the bytes of the parts and of their header entries (these but for a few digits of the offsets)."""
        size = len(json.dumps([self.packing, dict(self.config)]))
        for name, part in self.parts.items():
            data = part.numel() * part.element_size()
            entry = {name: {"dtype": "F32", "shape": list(part.shape), "data_offsets": [data, data]}}
            size += data + len(json.dumps(entry))
        return size


@dataclass(frozen=True)
class Packing:
    """A pair of pure functions and what their parts count as.

    Args:
        encode: From a contiguous CPU tensor to its packed form, or ``None`` where the packing does not apply.
        decode: Back; raises :class:`ArtifactError` for parts that do not fit the config, before it allocates.
        roles: One of :data:`ROLES` for each part.
    """

    encode: Callable[[Tensor], Packed | None]
    decode: Callable[[Packed], Tensor]
    roles: Mapping[str, str]


def pack(tensor: Tensor) -> Packed:
    """Return the packing of ``tensor`` that takes the fewest bytes on disk, header entries included.

    Args:
        tensor: Plain strided tensor of any shape, on any device but ``meta``.

    Raises:
        ConfigurationError: For sparse, quantized, ``meta`` or wrapped tensors, and types without a stable byte layout.

    >>> pack(torch.eye(64)).packing, pack(torch.ones(64)).packing
    ('bitmap', 'dense')
    """
    _check_plain(tensor)
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    packed = (packing.encode(plain) for packing in PACKINGS.values())
    return min((candidate for candidate in packed if candidate is not None), key=Packed.disk_bytes)


def unpack(packed: Packed) -> Tensor:
    """Undo :func:`pack`, bit for bit.

    Raises:
        ArtifactError: If the packing is unknown, or its parts and config contradict each other.
    """
    packing = PACKINGS.get(packed.packing)
    if packing is None:
        raise ArtifactError(
            f"unknown packing {str(packed.packing)[:80]!r}; {did_you_mean(str(packed.packing)[:80], PACKINGS)}; "
            "a newer lightning-compress may know it"
        )
    if set(packed.parts) != set(packing.roles):
        raise ArtifactError(
            f"the packing {packed.packing!r} needs the parts {sorted(packing.roles)}, got {sorted(packed.parts)}; "
            "the file is damaged"
        )
    return packing.decode(packed)


def is_plain(tensor: Tensor) -> bool:
    """Return whether ``tensor`` is an ordinary dense tensor with memory of its own, as :func:`pack` needs."""
    ordinary = type(tensor) in (Tensor, torch.nn.Parameter, torch.nn.Buffer) and tensor.layout == torch.strided
    return ordinary and tensor.device.type != "meta" and tensor.dtype in _DTYPES.values()


def _check_plain(tensor: Tensor) -> None:
    if not is_plain(tensor):
        raise ConfigurationError(
            f"only plain dense tensors can be packed, got {type(tensor).__name__} of {tensor.dtype}, "
            f"{tensor.layout}, on {tensor.device}; gather, materialize or dequantize it first"
        )


def _require(fits: bool, what: str) -> None:
    if not fits:
        raise ArtifactError(f"{what}; the file is damaged")


def _stored(flat: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Return ``flat`` in a type the container can hold, and the config that undoes it."""
    if flat.dtype in NATIVE_DTYPES:
        return flat, {}
    return flat.reshape(-1).view(torch.uint8), {"dtype": str(flat.dtype).removeprefix("torch.")}


def _restored(packed: Packed) -> Tensor:
    """Return the part ``values`` in the unpacked tensor's type."""
    values, dtype = packed.parts["values"], packed.dtype
    if values.dtype == dtype:
        return values
    fits = values.dtype == torch.uint8 and values.dim() == 1 and values.numel() % dtype.itemsize == 0
    _require(fits, f"{tuple(values.shape)} values of {values.dtype} cannot hold {dtype}")
    return values.clone().view(dtype)  # a copy starts at an aligned address


def _words(flat: Tensor) -> Tensor:
    """View elements as integers of the same width (16 bytes: as pairs), so that -0.0 and NaN keep their bits."""
    width = flat.element_size()
    return flat.view(_WORDS[width]) if width in _WORDS else flat.view(torch.int64).reshape(-1, width // 8)


def _encode_dense(tensor: Tensor) -> Packed:
    values, config = _stored(tensor)
    return Packed("dense", {"values": values}, {**config, "shape": list(tensor.shape)} if config else {})


def _decode_dense(packed: Packed) -> Tensor:
    values = _restored(packed)
    _require(values.numel() == math.prod(packed.shape), f"{values.numel()} values for the shape {packed.shape}")
    return values.reshape(packed.shape)


def _encode_bitmap(tensor: Tensor) -> Packed:
    flat = tensor.reshape(-1)
    words = _words(flat)
    present = words != 0 if words.dim() == 1 else (words != 0).any(dim=1)
    values, config = _stored(words[present].reshape(-1).view(tensor.dtype))
    return Packed("bitmap", {"bitmap": pack_bits(present), "values": values}, {**config, "shape": list(tensor.shape)})


def _decode_bitmap(packed: Packed) -> Tensor:
    present, values = _unpacked_bitmap(packed), _restored(packed)
    _require(values.dim() == 1, f"values of shape {tuple(values.shape)} in a bitmap packing")
    count = int(present.sum())
    _require(values.numel() == count, f"{values.numel()} values for {count} set bits")
    tensor = torch.zeros(present.numel(), dtype=packed.dtype)
    _words(tensor)[present] = _words(values)
    return tensor.reshape(packed.shape)


def _encode_signed(tensor: Tensor) -> Packed | None:
    """Pack what a weight times a mask of zeros leaves: half of the zeros are -0.0, and each keeps its sign."""
    if not tensor.is_floating_point():
        return None
    words = _words(tensor.reshape(-1))
    zero, negative = words == 0, words == torch.iinfo(words.dtype).min
    if not negative.any():
        return None
    absent = zero | negative
    values, config = _stored(words[~absent].view(tensor.dtype))
    parts = {"bitmap": pack_bits(~absent), "signs": pack_bits(negative[absent]), "values": values}
    return Packed("signed_bitmap", parts, {**config, "shape": list(tensor.shape)})


def _decode_signed(packed: Packed) -> Tensor:
    tensor = _decode_bitmap(packed)
    words, absent = _words(tensor.reshape(-1)), ~_unpacked_bitmap(packed)
    signs, count = packed.parts["signs"], int(absent.sum())
    fits = words.dim() == 1 and signs.dtype == torch.uint8 and tuple(signs.shape) == (-(-count // 8),)
    _require(fits, f"signs of shape {tuple(signs.shape)} for {count} zeros of {packed.dtype}")
    words[absent] = unpack_bits(signs, count).to(words.dtype) * torch.iinfo(words.dtype).min
    return tensor


def _encode_bits(tensor: Tensor) -> Packed | None:
    if tensor.dtype != torch.bool:
        return None
    return Packed("bits", {"bitmap": pack_bits(tensor)}, {"dtype": "bool", "shape": list(tensor.shape)})


def _decode_bits(packed: Packed) -> Tensor:
    _require(packed.dtype == torch.bool, f"{packed.dtype} in a packing for booleans")
    return _unpacked_bitmap(packed).reshape(packed.shape)


def _unpacked_bitmap(packed: Packed) -> Tensor:
    bitmap, n = packed.parts["bitmap"], math.prod(packed.shape)
    fits = "shape" in packed.config and bitmap.dtype == torch.uint8 and bitmap.dim() == 1
    _require(fits and bitmap.numel() == -(-n // 8), f"a bitmap of {bitmap.numel()} bytes for the shape {packed.shape}")
    return unpack_bits(bitmap, n)


PACKINGS: dict[str, Packing] = {
    "dense": Packing(_encode_dense, _decode_dense, {"values": "values"}),
    "bitmap": Packing(_encode_bitmap, _decode_bitmap, {"bitmap": "indices", "values": "values"}),
    "signed_bitmap": Packing(
        _encode_signed, _decode_signed, {"bitmap": "indices", "signs": "values", "values": "values"}
    ),
    "bits": Packing(_encode_bits, _decode_bits, {"bitmap": "values"}),
}
"""Every packing by the name that stands in the file; the first of equally small ones is taken."""
