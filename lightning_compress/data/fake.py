"""Random images of any shape, for trying things out without data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torchvision.datasets import FakeData

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.progress import slow
from lightning_compress.data.module import ImageDataModule, Images, Splits
from lightning_compress.data.tensors import Normalize


class FakeDataModule(ImageDataModule):
    """torchvision's ``FakeData``: noise with random labels. It shows speed and size, never accuracy.

    Args:
        size: Training images; validation and test get a quarter each, at least one image.
        shape: (channels, height, width); 1 or 3 channels.
        num_classes: Number of classes, at least 2.
        batch_size: Samples per batch and process.
        seed: Seed of the training order; the images do not depend on it.
        num_workers: Worker processes per loader.
        normalize: Applied after scaling pixels to [0, 1].

    Raises:
        ConfigurationError: If a number is out of range.

    >>> images, labels = FakeDataModule(size=8, shape=(3, 4, 4)).splits.train
    >>> images.shape
    torch.Size([8, 3, 4, 4])
    """

    def __init__(
        self,
        size: int = 256,
        shape: Sequence[int] = (3, 32, 32),
        num_classes: int = 10,
        batch_size: int = 64,
        seed: int = 0,
        num_workers: int = 0,
        normalize: Normalize | None = None,
    ) -> None:
        super().__init__(batch_size, seed, num_workers, normalize)
        if size < 1 or num_classes < 2:
            raise ConfigurationError(f"`size` must be >= 1 and `num_classes` >= 2, got {size} and {num_classes}")
        if len(shape) != 3 or shape[0] not in (1, 3) or min(shape) < 1:
            raise ConfigurationError(f"`shape` must be (1 or 3 channels, height, width), got {list(shape)}")
        self.size, self.shape, self.classes = size, tuple(shape), num_classes

    def load(self) -> Splits:
        """Draw all images into memory."""
        quarter = max(1, self.size // 4)
        return Splits(
            train=self._draw(self.size, 0),
            val=self._draw(quarter, self.size),
            test=self._draw(quarter, self.size + quarter),
            classes=tuple(str(index) for index in range(self.classes)),
        )

    def _draw(self, count: int, offset: int) -> Images:
        source = FakeData(count, self.shape, self.classes, random_offset=offset)
        samples = [source[index] for index in slow(range(count), "Drawing random images")]
        arrays = [np.asarray(image).reshape(*self.shape[1:], -1)[..., : self.shape[0]] for image, _ in samples]
        images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
        return images, torch.tensor([int(label) for _, label in samples])
