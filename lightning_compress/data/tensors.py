"""Images that live decoded in memory and are handed out a whole batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.data.augment import CropFlip


@dataclass(frozen=True)
class Normalize:
    """Subtract a mean and divide by a standard deviation, per channel, after scaling pixels to [0, 1].

    Args:
        mean: One number per channel, or a single one for all.
        std: Likewise, each > 0.

    Raises:
        ConfigurationError: If the lengths differ or a standard deviation is not positive.

    >>> Normalize(mean=[0.5], std=[0.25])(torch.tensor([[[[1.0]]]])).item()
    2.0
    """

    mean: Sequence[float]
    std: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean:
            raise ConfigurationError(
                f"`mean` and `std` need one number per channel each, got {len(self.mean)} and {len(self.std)}"
            )
        if min(self.std) <= 0:
            raise ConfigurationError(f"`std` must be positive in every channel, got {list(self.std)}")

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Normalize float images (n, c, h, w)."""
        if len(self.mean) not in (1, images.shape[1]):
            raise ConfigurationError(
                f"`mean` and `std` have {len(self.mean)} numbers, but the images have {images.shape[1]} channels"
            )
        mean = torch.tensor(self.mean).view(1, -1, 1, 1)
        std = torch.tensor(self.std).view(1, -1, 1, 1)
        return (images - mean) / std


class TensorImages(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """A data set over one integer tensor of images; a batch is one index operation.

    Args:
        images: ``uint8`` tensor (n, c, h, w).
        labels: Integer tensor (n,).
        maximum: The value that means white: pixels are divided by it.
        normalize: Applied to the scaled batch.
        augment: Applied to the integer batch when the indices carry a stream key, that is, when a
            ``ResumableLoader`` asks.

    >>> data = TensorImages(torch.full((3, 1, 2, 2), 255, dtype=torch.uint8), torch.tensor([0, 1, 2]))
    >>> images, labels = data.__getitems__([2, 0])
    >>> images.mean().item(), labels.tolist()
    (1.0, [2, 0])
    """

    def __init__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        maximum: float = 255.0,
        normalize: Normalize | None = None,
        augment: CropFlip | None = None,
    ) -> None:
        if len(images) != len(labels) or images.dim() != 4:
            raise ConfigurationError(
                f"`images` must be (n, c, h, w) and `labels` (n,), got {tuple(images.shape)} and {tuple(labels.shape)}"
            )
        self.images, self.labels = images, labels
        self.maximum, self.normalize, self.augment = maximum, normalize, augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one image (c, h, w) and its label."""
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the images (n, c, h, w) and labels (n,) of a whole batch."""
        chosen = torch.tensor([int(index) for index in indices])
        images = self.images[chosen]
        key = getattr(indices[0], "key", None) if len(indices) else None
        if self.augment is not None and key is not None:
            images = self.augment(images, key, chosen)
        scaled = images.float() / self.maximum
        return (scaled if self.normalize is None else self.normalize(scaled)), self.labels[chosen]


def already_batched(batch: Any) -> Any:
    """Collate function for data sets whose ``__getitems__`` returns a finished batch."""
    return batch
