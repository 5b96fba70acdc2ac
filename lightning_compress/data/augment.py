"""Random crops and flips drawn per sample from a counter, so that they do not depend on what was drawn before."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from lightning_compress.core.errors import ConfigurationError

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def sample_bits(key: int, indices: np.ndarray) -> np.ndarray:
    """Return 64 random bits per sample from (key, index) with SplitMix64 (Steele et al., 2014).

    Args:
        key: Key of the random stream, such as ``stream_key(seed, epoch)``.
        indices: Sample numbers, shape (n,).

    Returns:
        ``uint64`` array of shape (n,); a sample's bits do not depend on the other samples.

    >>> both, alone = sample_bits(7, np.array([0, 5])), sample_bits(7, np.array([5]))
    >>> bool(both[1] == alone[0] and both[0] != both[1])
    True
    """
    bits = (np.asarray(indices).astype(np.uint64) + np.uint64(1)) * _GOLDEN + np.uint64(key)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    return bits ^ (bits >> np.uint64(31))


def shift_and_flip(
    images: torch.Tensor, down: torch.Tensor, right: torch.Tensor, flip: torch.Tensor, padding: int
) -> torch.Tensor:
    """Cut a window of the original size out of each zero-padded image, and mirror some of them.

    Args:
        images: Tensor (n, c, h, w).
        down: Top row of each window in the padded image, (n,), in [0, 2 * padding].
        right: Left column of each window, likewise.
        flip: Boolean (n,): mirror left to right.
        padding: Zeros added on each side, in pixels.

    Returns:
        Tensor (n, c, h, w).

    >>> image = torch.tensor([[[[1, 2], [3, 4]]]])
    >>> shift_and_flip(image, torch.tensor([1]), torch.tensor([2]), torch.tensor([True]), padding=1).tolist()
    [[[[0, 2], [0, 4]]]]
    """
    height, width = images.shape[-2:]
    padded = F.pad(images, (padding,) * 4)
    windows = [
        image[:, top : top + height, left : left + width]
        for image, top, left in zip(padded, down.tolist(), right.tolist(), strict=True)
    ]
    moved = torch.stack(windows)
    moved[flip] = moved[flip].flip(-1)
    return moved


@dataclass(frozen=True)
class CropFlip:
    """Random crop out of the zero-padded image, and random horizontal flip.

    Args:
        padding: Zeros on each side before the crop, in pixels, 0 to 127.
        flip: Mirror every second image on average.

    Raises:
        ConfigurationError: If ``padding`` is out of range.
    """

    padding: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.padding <= 127:
            raise ConfigurationError(f"`padding` must be in [0, 127] pixels, got {self.padding}")

    def __call__(self, images: torch.Tensor, key: int, indices: torch.Tensor) -> torch.Tensor:
        """Augment images (n, c, h, w) of the samples ``indices`` with the random stream ``key``."""
        bits = sample_bits(key, indices.numpy())
        places = np.uint64(2 * self.padding + 1)
        down = torch.from_numpy(((bits >> np.uint64(32)) % places).astype(np.int64))
        right = torch.from_numpy((((bits >> np.uint64(8)) & np.uint64(0xFFFFFF)) % places).astype(np.int64))
        flip = torch.from_numpy((bits & np.uint64(1)).astype(bool)) & self.flip
        return shift_and_flip(images, down, right, flip, self.padding)
