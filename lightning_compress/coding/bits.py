"""Eight booleans in one byte: masks in checkpoints, bitmaps in artifacts."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_compress.core.errors import ConfigurationError


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
