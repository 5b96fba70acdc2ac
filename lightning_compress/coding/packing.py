"""Packings: how one tensor becomes parts on disk. A closed registry; the smallest is taken, tensor by tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compress.coding.coded import CODED
from lightning_compress.coding.packed import DTYPES, NATIVE_DTYPES, ROLES, Packed, Packing
from lightning_compress.coding.simple import SIMPLE
from lightning_compress.coding.stream import coders
from lightning_compress.core.errors import ArtifactError, ConfigurationError, did_you_mean

__all__ = ["NATIVE_DTYPES", "PACKINGS", "ROLES", "Packed", "bits_by_role", "is_plain", "pack", "unpack"]

PACKINGS: dict[str, Packing] = {**SIMPLE, **CODED}
"""Every packing by the name that stands in the file; the first of equally small ones is taken."""

_TRIED_BYTES = 1 << 16
"""Up to this size a tensor is packed in every way and the results are compared; beyond it, what is known of them."""


def pack(tensor: Tensor, coding: str = "auto") -> Packed:
    """Return the packing of ``tensor`` that takes the fewest bytes on disk, header entries included.

    Args:
        tensor: Plain strided tensor of any shape, on any device but ``meta``.
        coding: Which entropy coders may be used: ``"auto"`` (both), ``"huffman"``, ``"ans"`` or ``"none"``.

    Raises:
        ConfigurationError: For sparse, quantized, ``meta`` or wrapped tensors, and types without a stable byte layout;
            or if ``coding`` is none of the four.

    >>> [pack(tensor).packing for tensor in (torch.eye(64), torch.ones(64), torch.ones(8))]
    ['sparse', 'palette', 'dense']
    """
    allowed = coders(coding)
    _check_plain(tensor)
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    plans = [plan for packing in PACKINGS.values() if (plan := packing.plan(plain, allowed)) is not None]
    if plain.numel() * plain.element_size() <= _TRIED_BYTES:
        return min((plan.build() for plan in plans), key=Packed.disk_bytes)
    return min(plans, key=lambda plan: plan.bytes).build()


def bits_by_role(packed: Packed) -> dict[str, int]:
    """Return the bits of the parts by role; tables and codebooks count as ``codebooks``.

    Raises:
        ArtifactError: If a part is damaged.
    """
    total = dict.fromkeys(ROLES, 0)
    if not packed.parts:  # an alias
        return total
    packing = PACKINGS[packed.packing]
    if packing.bits is not None:
        return {**total, **packing.bits(packed)}
    for name, part in packed.parts.items():
        total[packing.roles[name]] += 8 * part.numel() * part.element_size()
    return total


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
    return ordinary and tensor.device.type != "meta" and tensor.dtype in DTYPES.values()


def _check_plain(tensor: Tensor) -> None:
    if not is_plain(tensor):
        raise ConfigurationError(
            f"only plain dense tensors can be packed, got {type(tensor).__name__} of {tensor.dtype}, "
            f"{tensor.layout}, on {tensor.device}; gather, materialize or dequantize it first"
        )
