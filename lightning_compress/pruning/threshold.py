"""The exact k-th smallest of very many numbers, spread over tensors, without copying them together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_compress.core.errors import CompressionError

_CHUNK = 1 << 16
_SAMPLE = 1 << 17
_DIVERGED = (
    "the values to rank are not all numbers (NaN): training has probably diverged; lower the learning rate or clip "
    "gradients"
)


class NotNumbers(CompressionError):
    """What should be ranked holds NaN."""


@dataclass(frozen=True)
class Threshold:
    """A cut in a sorted order.

    Args:
        value: The k-th smallest value.
        ties: How many of the values equal to ``value`` are among the k smallest.
        split: Whether further values equal ``value``, so that the cut goes through a tie.
    """

    value: float
    ties: int
    split: bool


def kth_smallest(values: Sequence[Tensor], k: int, absolute: bool = False) -> Threshold:
    r"""Return the k-th smallest (counted from 1) over all elements of all tensors, exactly.

    A sample gives a bracket that holds the wanted rank almost surely; one pass counts what lies below the bracket
    and collects what lies inside, and a partition of the few collected values gives the rank. Should the bracket miss,
    it is widened. No buffer grows with the input, except the collected share (about 1 %).

    Args:
        values: Real tensors of any shape and floating dtype; compared in float32.
        k: Rank, 1 to the number of elements.
        absolute: Compare magnitudes.

    Returns:
        The value, how many of its ties are among the k smallest, and whether the cut splits a tie.

    Raises:
        CompressionError: If values are not numbers (training diverged), or ``k`` is out of range.

    >>> kth_smallest([torch.tensor([3.0, -1.0]), torch.tensor([2.0, 1.0, 1.0])], k=2, absolute=True)
    Threshold(value=1.0, ties=2, split=True)
    """
    total = sum(value.numel() for value in values)
    if not 1 <= k <= total:
        raise CompressionError(f"`k` must lie in 1..{total}, got {k}")
    if any(value.device.type != "cpu" for value in values):
        return _kth_on_device(values, k, absolute)
    arrays = [as_array(value) for value in values if value.numel()]
    sample = _sample(arrays, total, absolute)
    spread = 5.0
    while True:
        low, high = _bracket(sample, k / total, spread, least=0.0 if absolute else -math.inf)
        counted = _count(arrays, low, high, absolute)
        if counted.below < k <= counted.below + counted.at_low:
            ties = k - counted.below
            return Threshold(float(low), ties, ties < counted.at_low)
        rank = k - counted.below - counted.at_low - 1
        if 0 <= rank < counted.inside.size:
            ordered = np.partition(counted.inside, rank)
            value = ordered[rank]
            ties = rank + 1 - int(np.count_nonzero(counted.inside < value))
            return Threshold(float(value), ties, ties < int(np.count_nonzero(counted.inside == value)))
        spread *= 8


def storage_order(tensor: Tensor) -> Tensor:
    """Return a one-dimensional view of a dense tensor in the order of its memory (a copy if it is not dense)."""
    strides, sizes = tensor.stride(), tensor.size()
    order = sorted(range(tensor.dim()), key=lambda dim: (strides[dim], sizes[dim]), reverse=True)
    return tensor.permute(order).reshape(-1)


def as_array(tensor: Tensor) -> NDArray[np.float32]:
    """Return the elements of a CPU tensor as a flat float32 array in memory order, without a copy where possible."""
    array: NDArray[np.float32] = storage_order(tensor.detach()).float().numpy()
    return array


def chunks(array: NDArray[np.float32], absolute: bool) -> Iterator[NDArray[np.float32]]:
    """Yield the array in pieces that fit the processor's cache; magnitudes share one buffer."""
    buffer = np.empty(min(_CHUNK, array.size), array.dtype)
    for start in range(0, array.size, _CHUNK):
        piece = array[start : start + _CHUNK]
        yield np.abs(piece, out=buffer[: piece.size]) if absolute else piece


@dataclass
class _Counted:
    below: int
    at_low: int
    inside: NDArray[np.float32]


def _count(arrays: list[NDArray[np.float32]], low: float, high: float, absolute: bool) -> _Counted:
    """Count values < low and == low, and collect those with low < value <= high; raise at the first NaN."""
    below = at_low = 0
    collected: list[NDArray[np.float32]] = []
    for array in arrays:
        for piece in chunks(array, absolute):
            if math.isnan(np.minimum.reduce(piece)):  # NaN propagates
                raise NotNumbers(_DIVERGED)
            above = piece > low
            outside = piece.size - int(np.count_nonzero(above))
            equal = int(np.count_nonzero(piece == low))
            at_low += equal
            below += outside - equal
            above &= piece <= high
            collected.append(piece[above])
    return _Counted(below, at_low, np.concatenate(collected))


def _sample(arrays: list[NDArray[np.float32]], total: int, absolute: bool) -> NDArray[np.float32]:
    stride = max(1, total // _SAMPLE)
    picked = np.concatenate([array[:: min(stride, max(1, array.size // 16))] for array in arrays])
    return np.sort(np.abs(picked) if absolute else picked)


def _bracket(sample: NDArray[np.float32], share: float, spread: float, least: float) -> tuple[float, float]:
    """Return two order statistics of the sample around a share of it, ``spread`` standard deviations to each side."""
    size = sample.size
    margin = spread * math.sqrt(size * share * (1 - share)) + 2
    first, last = math.floor(share * size - margin), math.ceil(share * size + margin)
    low = least if first < 0 else float(sample[first])
    high = math.inf if last >= size else float(sample[last])
    return low, high


def _kth_on_device(values: Sequence[Tensor], k: int, absolute: bool) -> Threshold:
    device = next((value.device for value in values if value.device.type != "cpu"), values[0].device)
    flat = torch.cat([storage_order(value.detach()).to(device).float() for value in values])
    flat = flat.abs() if absolute else flat
    if bool(flat.isnan().any()):
        raise NotNumbers(_DIVERGED)
    value = flat.kthvalue(k).values
    ties = k - int((flat < value).sum())
    return Threshold(float(value), ties, ties < int((flat == value).sum()))
