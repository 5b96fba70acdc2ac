"""Tensors as unsigned integers of the same width: -0.0, infinities and the payloads of NaN keep their bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_compress.coding.blob import require

Words = NDArray[Any]

_SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
_NO_SIGN = (torch.float8_e8m0fnu,)


def word_bytes(dtype: torch.dtype) -> int:
    """Return the bytes of one word: those of an element, or of its real part."""
    return dtype.itemsize // (2 if dtype.is_complex else 1)


def to_words(tensor: Tensor) -> Words:
    """Return the elements of a contiguous CPU tensor in row-major order, complex ones as two words, without a copy.

    >>> [hex(word) for word in to_words(torch.tensor([1.0, -0.0]))]
    ['0x3f800000', '0x80000000']
    """
    flat: Words = tensor.reshape(-1).view(torch.uint8).numpy()
    return flat.view(f"u{word_bytes(tensor.dtype)}")


def from_words(words: Words, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Undo :func:`to_words`, without a copy."""
    if dtype == torch.bool:
        require(int(words.max(initial=0)) <= 1, "booleans that are neither 0 nor 1")
    return torch.from_numpy(words.view(np.uint8)).view(dtype).reshape(shape)


def negative_zero(dtype: torch.dtype) -> int | None:
    """Return the word of -0.0, or ``None`` for types that have none."""
    if not (dtype.is_floating_point or dtype.is_complex) or dtype in _NO_SIGN or str(dtype).endswith("fnuz"):
        return None
    return 1 << 8 * word_bytes(dtype) - 1


def fold(words: Words, dtype: torch.dtype) -> Words:
    """Return words whose high bytes are alike for numbers that are alike.

    Floats are rotated by one bit, so that the exponent begins in the highest byte and the sign ends in the lowest;
    signed integers become 0, 1, 2, 3, ... for 0, -1, 1, -2, ...

    >>> fold(np.array([0, 255, 1, 254], np.uint8), torch.int8).tolist()
    [0, 1, 2, 3]
    """
    bits = 8 * words.itemsize
    one = words.dtype.type(1)
    sign = words >> words.dtype.type(bits - 1)
    if dtype in _SIGNED:
        return (words << one) ^ (-sign)
    return words << one | sign if _rotated(dtype) else words


def unfold(words: Words, dtype: torch.dtype) -> Words:
    """Undo :func:`fold`."""
    bits = 8 * words.itemsize
    one = words.dtype.type(1)
    lowest = words & one
    if dtype in _SIGNED:
        return (words >> one) ^ (-lowest)
    return words >> one | lowest << words.dtype.type(bits - 1) if _rotated(dtype) else words


def _rotated(dtype: torch.dtype) -> bool:
    return (dtype.is_floating_point or dtype.is_complex) and dtype not in _NO_SIGN
