"""MNIST from the files that torchvision reads, decoded once into memory."""

from __future__ import annotations

from pathlib import Path

import torch
from torchvision.datasets import MNIST

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.data.augment import CropFlip
from lightning_compress.data.module import ImageDataModule, Splits
from lightning_compress.data.paths import find_data
from lightning_compress.data.tensors import Normalize

#: The usual mean and standard deviation of the 60,000 training images.
MNIST_NORMALIZE = Normalize(mean=(0.1307,), std=(0.3081,))


class MNISTDataModule(ImageDataModule):
    """MNIST (LeCun et al., 1998): 55,000 / 5,000 / 10,000 images of 1x28x28, split the same way for every seed.

    Args:
        root: Folder with ``MNIST/raw`` in it; when left out, ``$LIGHTNING_COMPRESS_DATA/mnist`` and the usual places.
        batch_size: Samples per batch and process.
        seed: Seed of the training order and of the augmentation; the split does not depend on it.
        num_workers: Worker processes per loader.
        normalize: Applied after scaling pixels to [0, 1].
        augment: Applied to training images.

    Raises:
        ConfigurationError: On first use, if the files are missing or incomplete.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        batch_size: int = 128,
        seed: int = 0,
        num_workers: int = 0,
        normalize: Normalize | None = MNIST_NORMALIZE,
        augment: CropFlip | None = None,
    ) -> None:
        super().__init__(batch_size, seed, num_workers, normalize, augment)
        self.root = root

    def load(self) -> Splits:
        """Decode both files and set 5,000 training images aside for validation."""
        root = find_data("mnist", "MNIST/raw", self.root)
        try:
            train, test = (MNIST(str(root), train=part, download=False) for part in (True, False))
        except (RuntimeError, OSError, AssertionError) as error:
            raise ConfigurationError(
                f"`root`: the MNIST files in {root} are incomplete or corrupt ({error})"
            ) from error
        images, labels = train.data.unsqueeze(1), train.targets
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        kept, aside = order[5000:].sort().values, order[:5000].sort().values
        return Splits(
            train=(images[kept], labels[kept]),
            val=(images[aside], labels[aside]),
            test=(test.data.unsqueeze(1), test.targets),
            classes=tuple(str(digit) for digit in range(10)),
        )
