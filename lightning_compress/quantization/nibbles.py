"""Several small integers in one byte."""

from __future__ import annotations

import torch
from torch import Tensor


def per_byte(bits: int) -> int:
    """Return how many integers of so many bits share a byte: four of 2, two of 3 or 4, else one."""
    return 4 if bits <= 2 else 2 if bits <= 4 else 1


def packed_length(count: int, bits: int) -> int:
    """Return how many bytes ``count`` integers take.

    >>> packed_length(5, 4), packed_length(5, 2), packed_length(5, 8)
    (3, 2, 5)
    """
    return -(-count // per_byte(bits))


def pack_integers(q: Tensor, bits: int) -> Tensor:
    """Return integers of a few bits in the bytes of a flat uint8 tensor, the first one lowest.

    Args:
        q: int8 or uint8 of any shape, with values that ``bits`` bits can hold.
        bits: 2 to 8.

    >>> pack_integers(torch.tensor([1, -1, 7], dtype=torch.int8), 4)
    tensor([241,   7], dtype=torch.uint8)
    """
    count, width = per_byte(bits), 8 // per_byte(bits)
    flat = q.reshape(-1).view(torch.uint8) & (2**width - 1)
    padded = torch.zeros(packed_length(flat.numel(), bits) * count, dtype=torch.uint8, device=q.device)
    padded[: flat.numel()] = flat
    shifts = width * torch.arange(count, dtype=torch.uint8, device=q.device)
    return (padded.reshape(-1, count) << shifts).sum(dim=1, dtype=torch.uint8)


def unpack_integers(packed: Tensor, bits: int, count: int, signed: bool) -> Tensor:
    """Undo :func:`pack_integers`: return ``count`` integers, flat, as int8 if ``signed``, else uint8.

    >>> unpack_integers(torch.tensor([241, 7], dtype=torch.uint8), 4, 3, signed=True)
    tensor([ 1, -1,  7], dtype=torch.int8)
    """
    width = 8 // per_byte(bits)
    shifts = width * torch.arange(per_byte(bits), dtype=torch.uint8, device=packed.device)
    flat = ((packed.unsqueeze(1) >> shifts) & (2**width - 1)).reshape(-1)[:count]
    if not signed:
        return flat
    half = 2 ** (width - 1)
    return ((flat.to(torch.int16) ^ half) - half).to(torch.int8)
