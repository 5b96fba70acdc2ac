"""Fixed numbers of bits: eight booleans in one byte (masks in checkpoints, bitmaps in artifacts), indices of n bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_compress.core.errors import ConfigurationError

_CHUNK = 1 << 20
"""Symbols that are expanded to bits at once: a multiple of eight."""


def pack_bits(mask: Tensor) -> Tensor:
    """Return a boolean tensor as bytes, the first element in the highest bit of the first byte.

    Args:
        mask: Boolean tensor of any shape with n elements, read in row-major order.

    Returns:
        ``uint8`` tensor ``(ceil(n / 8),)`` on the device of ``mask``; the unused bits of the last byte are 0.

    Raises:
        ConfigurationError: If ``mask`` is not boolean.

    >>> pack_bits(torch.tensor([True, False, False, False, False, False, True, True, True]))
    tensor([131, 128], dtype=torch.uint8)
    """
    if mask.dtype != torch.bool:
        raise ConfigurationError(f"`mask` must be a boolean tensor, got {mask.dtype}; pass `mask != 0` instead")
    packed = np.packbits(mask.detach().reshape(-1).cpu().numpy())
    return torch.from_numpy(packed).to(mask.device)


def unpack_bits(packed: Tensor, n: int) -> Tensor:
    """Undo :func:`pack_bits`.

    Args:
        packed: ``uint8`` tensor ``(ceil(n / 8),)``.
        n: Number of booleans.

    Returns:
        Boolean tensor ``(n,)`` on the device of ``packed``.

    Raises:
        ConfigurationError: If ``packed`` is not a flat ``uint8`` tensor of that size.

    >>> unpack_bits(torch.tensor([131, 128], dtype=torch.uint8), 9).nonzero().flatten().tolist()
    [0, 6, 7, 8]
    """
    if packed.dtype != torch.uint8 or packed.dim() != 1 or n < 0 or packed.numel() != -(-n // 8):
        raise ConfigurationError(
            f"`packed` must be a flat uint8 tensor of {-(-n // 8)} bytes for {n} bits, "
            f"got {packed.dtype} of shape {tuple(packed.shape)}"
        )
    bits = np.unpackbits(packed.detach().cpu().numpy(), count=n)
    return torch.from_numpy(bits.view(np.bool_)).to(packed.device)


def pack_fixed(symbols: NDArray[Any], width: int) -> NDArray[np.uint8]:
    """Return integers as ``width`` bits each, the highest bit first.

    Args:
        symbols: Flat, each below ``2**width``.
        width: From 0 to 16.

    >>> [f"{byte:08b}" for byte in pack_fixed(np.array([5, 1, 7]), 3)]
    ['10100111', '10000000']
    """
    if width == 0:
        return np.zeros(0, np.uint8)
    if width in (8, 16):
        return symbols.astype(f">u{width // 8}").view(np.uint8)
    pieces = []
    for start in range(0, symbols.size, _CHUNK):
        wide = symbols[start : start + _CHUNK].astype(">u2").view(np.uint8).reshape(-1, 2)
        pieces.append(np.packbits(np.unpackbits(wide, axis=1)[:, 16 - width :]))
    return np.concatenate([np.zeros(0, np.uint8), *pieces])


def unpack_fixed(packed: NDArray[np.uint8], width: int, n: int) -> NDArray[Any]:
    """Undo :func:`pack_fixed`; ``packed`` must hold ``ceil(n * width / 8)`` bytes.

    >>> unpack_fixed(np.array([0b10100111, 0b10000000], np.uint8), 3, 3).tolist()
    [5, 1, 7]
    """
    symbols = np.zeros(n, np.uint8 if width <= 8 else np.uint16)
    if width in (8, 16):
        symbols[:] = packed.view(f">u{width // 8}")
        return symbols
    size = 8 if width <= 8 else 16
    for start in range(0, n if width else 0, _CHUNK):
        count = min(_CHUNK, n - start)
        bits = np.unpackbits(packed[start * width // 8 : -(-(start + count) * width // 8)], count=count * width)
        padded = np.zeros((count, size), np.uint8)
        padded[:, size - width :] = bits.reshape(count, width)
        symbols[start : start + count] = np.packbits(padded, axis=1).reshape(-1).view(f">u{size // 8}")
    return symbols
