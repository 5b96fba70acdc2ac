"""Packings without a code: dense, a bitmap and what is not zero, booleans as bits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_compress.coding.bits import pack_bits, unpack_bits
from lightning_compress.coding.blob import require
from lightning_compress.coding.packed import NATIVE_DTYPES, Packed, Packing, Plan, entry_bytes

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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
    require(fits, f"{tuple(values.shape)} values of {values.dtype} cannot hold {dtype}")
    return values.clone().view(dtype)  # a copy starts at an aligned address


def _words(flat: Tensor) -> Tensor:
    """View elements as integers of the same width (16 bytes: as pairs), so that -0.0 and NaN keep their bits."""
    width = flat.element_size()
    return flat.view(_WORDS[width]) if width in _WORDS else flat.view(torch.int64).reshape(-1, width // 8)


def _encode_dense(tensor: Tensor) -> Packed:
    values, config = _stored(tensor)
    return Packed("dense", {"values": values}, {**config, "shape": list(tensor.shape)} if config else {})


def _plan_dense(tensor: Tensor, allowed: tuple[int, ...]) -> Plan:
    return Plan(tensor.numel() * tensor.element_size() + entry_bytes(1), lambda: _encode_dense(tensor))


def _decode_dense(packed: Packed) -> Tensor:
    values = _restored(packed)
    require(values.numel() == math.prod(packed.shape), f"{values.numel()} values for the shape {packed.shape}")
    return values.reshape(packed.shape)


def _present(tensor: Tensor) -> Tensor:
    words = _words(tensor.reshape(-1))
    return words != 0 if words.dim() == 1 else (words != 0).any(dim=1)


def _plan_bitmap(tensor: Tensor, allowed: tuple[int, ...]) -> Plan:
    size = -(-tensor.numel() // 8) + int(torch.count_nonzero(_present(tensor))) * tensor.element_size()
    return Plan(size + entry_bytes(2), lambda: _encode_bitmap(tensor))


def _encode_bitmap(tensor: Tensor) -> Packed:
    words, present = _words(tensor.reshape(-1)), _present(tensor)
    values, config = _stored(words[present].reshape(-1).view(tensor.dtype))
    return Packed("bitmap", {"bitmap": pack_bits(present), "values": values}, {**config, "shape": list(tensor.shape)})


def _decode_bitmap(packed: Packed) -> Tensor:
    present, values = _unpacked_bitmap(packed), _restored(packed)
    require(values.dim() == 1, f"values of shape {tuple(values.shape)} in a bitmap packing")
    count = int(present.sum())
    require(values.numel() == count, f"{values.numel()} values for {count} set bits")
    tensor = torch.zeros(present.numel(), dtype=packed.dtype)
    _words(tensor)[present] = _words(values)
    return tensor.reshape(packed.shape)


def _plan_signed(tensor: Tensor, allowed: tuple[int, ...]) -> Plan | None:
    """Plan for what a weight times a mask of zeros leaves: half of the zeros are -0.0, and each keeps its sign."""
    if not tensor.is_floating_point():
        return None
    words = _words(tensor.reshape(-1))
    if not (words == torch.iinfo(words.dtype).min).any():
        return None
    zeros = int(torch.count_nonzero((words == 0) | (words == torch.iinfo(words.dtype).min)))
    size = -(-tensor.numel() // 8) + -(-zeros // 8) + (tensor.numel() - zeros) * tensor.element_size()
    return Plan(size + entry_bytes(3), lambda: _encode_signed(tensor))


def _encode_signed(tensor: Tensor) -> Packed:
    words = _words(tensor.reshape(-1))
    negative = words == torch.iinfo(words.dtype).min
    absent = negative | (words == 0)
    values, config = _stored(words[~absent].view(tensor.dtype))
    parts = {"bitmap": pack_bits(~absent), "signs": pack_bits(negative[absent]), "values": values}
    return Packed("signed_bitmap", parts, {**config, "shape": list(tensor.shape)})


def _decode_signed(packed: Packed) -> Tensor:
    tensor = _decode_bitmap(packed)
    words, absent = _words(tensor.reshape(-1)), ~_unpacked_bitmap(packed)
    signs, count = packed.parts["signs"], int(absent.sum())
    fits = words.dim() == 1 and signs.dtype == torch.uint8 and tuple(signs.shape) == (-(-count // 8),)
    require(fits, f"signs of shape {tuple(signs.shape)} for {count} zeros of {packed.dtype}")
    words[absent] = unpack_bits(signs, count).to(words.dtype) * torch.iinfo(words.dtype).min
    return tensor


def _plan_bits(tensor: Tensor, allowed: tuple[int, ...]) -> Plan | None:
    if tensor.dtype != torch.bool:
        return None
    return Plan(-(-tensor.numel() // 8) + entry_bytes(1), lambda: _encode_bits(tensor))


def _encode_bits(tensor: Tensor) -> Packed:
    return Packed("bits", {"bitmap": pack_bits(tensor)}, {"dtype": "bool", "shape": list(tensor.shape)})


def _decode_bits(packed: Packed) -> Tensor:
    require(packed.dtype == torch.bool, f"{packed.dtype} in a packing for booleans")
    return _unpacked_bitmap(packed).reshape(packed.shape)


def _unpacked_bitmap(packed: Packed) -> Tensor:
    bitmap, n = packed.parts["bitmap"], math.prod(packed.shape)
    fits = "shape" in packed.config and bitmap.dtype == torch.uint8 and bitmap.dim() == 1
    require(fits and bitmap.numel() == -(-n // 8), f"a bitmap of {bitmap.numel()} bytes for the shape {packed.shape}")
    return unpack_bits(bitmap, n)


SIMPLE: dict[str, Packing] = {
    "dense": Packing(_plan_dense, _decode_dense, {"values": "values"}),
    "bitmap": Packing(_plan_bitmap, _decode_bitmap, {"bitmap": "indices", "values": "values"}),
    "signed_bitmap": Packing(
        _plan_signed, _decode_signed, {"bitmap": "indices", "signs": "values", "values": "values"}
    ),
    "bits": Packing(_plan_bits, _decode_bits, {"bitmap": "values"}),
}
"""What the first version of the format has."""
