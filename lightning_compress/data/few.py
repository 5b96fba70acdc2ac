"""A small, fixed part of another data module's training images."""

from __future__ import annotations

from dataclasses import replace

import torch

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.data.module import ImageDataModule, Images, Splits


def some_of_each(images: torch.Tensor, labels: torch.Tensor, count: int) -> Images:
    """Return ``count`` images of each class, the same ones every time, in their old order.

    Args:
        images: Tensor (n, c, h, w).
        labels: Tensor (n,).
        count: How many of each class, at least 1.

    Raises:
        ConfigurationError: If a class has fewer.

    >>> some_of_each(torch.zeros(6, 1, 1, 1), torch.tensor([0, 1, 0, 1, 0, 1]), 2)[1].bincount()
    tensor([2, 2])
    """
    generator = torch.Generator().manual_seed(0)
    places = [(labels == label).nonzero()[:, 0] for label in labels.unique()]
    least = min(map(len, places), default=0)
    if not 1 <= count <= least:
        raise ConfigurationError(f"`per_class` must be in [1, {least}], the images of the rarest class; got {count}")
    chosen = torch.cat([at[torch.randperm(len(at), generator=generator)[:count]] for at in places]).sort().values
    return images[chosen], labels[chosen]


class FewImagesDataModule(ImageDataModule):
    """A few training images of each class of another data module; its validation and test data stay whole.

    Args:
        data: Where the images come from; its other settings hold.
        per_class: Training images of each class, the same ones for every seed.

    Raises:
        ConfigurationError: On first use, if a class has fewer.

    >>> from lightning_compress.data import DigitsDataModule
    >>> few = FewImagesDataModule(DigitsDataModule(), per_class=7).splits
    >>> len(few.train[1]), len(few.test[1])
    (70, 300)
    """

    def __init__(self, data: ImageDataModule, per_class: int = 100) -> None:
        if not isinstance(data, ImageDataModule):
            raise ConfigurationError(f"`data` must be an ImageDataModule, got {type(data).__name__}")
        super().__init__(data.batch_size, data.seed, data.num_workers, data.normalize, data.augment)
        self.data, self.per_class = data, per_class

    def load(self) -> Splits:
        """Load all images and keep the few."""
        whole = self.data.splits
        return replace(whole, train=some_of_each(*whole.train, self.per_class))
