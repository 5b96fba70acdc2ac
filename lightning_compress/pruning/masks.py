"""Masks as signed integers (-1 keep, 0 prune): choosing them, and putting exact zeros where they say so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_compress.coding.bits import pack_bits, unpack_bits
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.pruning.threshold import Threshold, as_array, chunks, kth_smallest, storage_order

_CHUNK = 1 << 18
_WIDE = 1 << 25  # weights whose masks may take as many bytes as they do: 128 MB for float32
_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def lowest_masks(values: Sequence[Tensor], count: int, absolute: bool = True) -> list[Tensor]:
    """Return masks that prune exactly the ``count`` lowest of all elements of all tensors.

    Ties are broken by tensor and then by memory order, so that every process decides the same.

    Args:
        values: Real tensors of any shape: weights, or scores of weights.
        count: How many to prune in total, 0 to the number of elements.
        absolute: Rank by magnitude instead of by value.

    Returns:
        One ``int8`` mask a tensor, in its shape, strides and device: -1 keep, 0 prune.

    Raises:
        CompressionError: If values are NaN, or ``count`` exceeds the number of elements.

    >>> [mask.tolist() for mask in lowest_masks([torch.tensor([3.0, -1.0]), torch.tensor([1.0, 1.0])], 2)]
    [[-1, 0], [0, -1]]
    """
    if count == 0:
        return [_empty_mask(value).fill_(-1) for value in values]
    cut = kth_smallest(values, count, absolute)
    masks, quota = [], cut.ties
    for value in values:
        mask, used = _mask_above(value, cut, quota, absolute)
        masks.append(mask)
        quota -= used
    return masks


def apply_mask(weight: Tensor, mask: Tensor, scratch: dict[torch.dtype, Tensor] | None = None) -> None:
    """Set ``weight`` to +0.0 in place where ``mask`` is 0, and leave every other bit as it is.

    The bits are and-ed with the sign-extended mask, so NaN and infinity are cleared too and no -0.0 appears (a
    product would keep both). A mask as wide as the weight is fastest on a CPU; one of bytes is widened in pieces that
    fit the cache, which needs a quarter of the memory and, where the processor widens slowly, nearly twice the time.

    Args:
        weight: Real tensor of any shape.
        mask: Tensor of signed integers of the same shape and device, -1 where the weight is kept and 0 where it is
            pruned: of bytes, or of the width of the weight.
        scratch: Buffers to reuse between calls.

    >>> weight = torch.tensor([-2.0, float("nan"), 3.0])
    >>> apply_mask(weight, torch.tensor([0, 0, -1], dtype=torch.int8))
    >>> weight
    tensor([0., 0., 3.])
    """
    kind = _INTEGER[weight.element_size()]
    if mask.dtype not in (kind, torch.int8):  # the weight was converted since
        mask = mask.to(torch.int8)
    wide = mask.dtype == kind
    if wide or weight.device.type != "cpu" or weight.stride() != mask.stride() or not is_dense(weight):
        weight.detach().view(kind).bitwise_and_(mask)
        return
    bits, flags = storage_order(weight.detach()).view(kind), storage_order(mask)
    if torch.get_num_threads() == 1:  # numpy widens the mask in small pieces within one pass, but on one thread only
        np.bitwise_and(bits.numpy(), flags.numpy(), out=bits.numpy())
        return
    buffers = {} if scratch is None else scratch
    if kind not in buffers:
        buffers[kind] = torch.empty(_CHUNK, dtype=kind)
    for piece, flag in zip(bits.split(_CHUNK), flags.split(_CHUNK), strict=True):
        piece.bitwise_and_(buffers[kind][: piece.numel()].copy_(flag))


def zero_weights(
    pairs: Sequence[tuple[str, Tensor]], masks: dict[str, Tensor], scratch: dict[torch.dtype, Tensor] | None = None
) -> None:
    """Apply masks by name, the last one first: what an optimizer stepped last is still in the cache.

    Masks go to the device of their weight, and are made as wide as it on a CPU while all of them together are few
    enough; both stay so for the next call.

    Args:
        pairs: Names and weights; a weight without a mask is left alone.
        masks: By name; changed in place.
        scratch: Buffers to reuse between calls.

    >>> weight, masks = torch.tensor([1.0, 2.0]), {"fc.weight": torch.tensor([0, -1], dtype=torch.int8)}
    >>> zero_weights([("fc.weight", weight)], masks)
    >>> weight, masks["fc.weight"].dtype
    (tensor([0., 2.]), torch.int32)
    """
    few = sum(mask.numel() for mask in masks.values()) <= _WIDE
    for key, weight in reversed(pairs):
        mask = masks.get(key)
        if mask is None:
            continue
        if mask.device != weight.device:
            mask = masks[key] = mask.to(weight.device)
        if few and mask.dtype == torch.int8 and weight.device.type == "cpu":
            mask = masks[key] = mask.to(_INTEGER[weight.element_size()])
        apply_mask(weight, mask, scratch)


def pack_mask(mask: Tensor) -> Tensor:
    """Return a mask as bits (1 keep) in row-major order, for a checkpoint."""
    return pack_bits(mask != 0)


def unpack_mask(packed: Tensor, like: Tensor, name: str) -> Tensor:
    """Undo :func:`pack_mask` for a weight.

    Raises:
        ConfigurationError: If the number of bits is not that of ``like``; names the layer.
    """
    if packed.numel() != -(-like.numel() // 8):
        raise ConfigurationError(
            f"the saved mask of {name!r} has {packed.numel()} bytes, but the weight is {tuple(like.shape)}; "
            "resume with the model the checkpoint was written with"
        )
    mask = _empty_mask(like)
    return mask.copy_(unpack_bits(packed.cpu(), like.numel()).reshape(like.shape)).neg_()


def kept(masks: Mapping[str, Tensor]) -> int:
    """Return the number of weights that all masks keep."""
    return sum(int(torch.count_nonzero(mask)) for mask in masks.values())


def is_dense(tensor: Tensor) -> bool:
    """Return whether the elements fill a block of memory without gaps, in any order of the dimensions."""
    return storage_order(tensor).data_ptr() == tensor.data_ptr() and tensor.numel() > 0


def _empty_mask(value: Tensor) -> Tensor:
    return torch.empty_like(value, dtype=torch.int8, requires_grad=False)


def _mask_above(value: Tensor, cut: Threshold, quota: int, absolute: bool) -> tuple[Tensor, int]:
    """Return the mask of one tensor, and how many ties it pruned (only counted where the cut splits ties)."""
    mask = _empty_mask(value)
    if value.device.type != "cpu" or not is_dense(value):
        compared = (value.detach().abs() if absolute else value.detach()).float()
        keep = compared > cut.value
        used = 0
        if cut.split:
            tied = storage_order(compared == cut.value).nonzero().flatten()
            storage_order(keep)[tied[quota:]] = True
            used = min(quota, tied.numel())
        return mask.copy_(keep).neg_(), used
    flags, start, used = storage_order(mask).numpy(), 0, 0
    for piece in chunks(as_array(value), absolute):
        part = flags[start : start + piece.size]
        np.greater(piece, cut.value, out=part.view(np.bool_))
        if cut.split:
            equal = np.flatnonzero(piece == cut.value)
            spared = equal[max(0, quota - used) :]
            part[spared] = 1
            used += equal.size - spared.size
        start += piece.size
    np.negative(flags, out=flags)
    return mask, used
