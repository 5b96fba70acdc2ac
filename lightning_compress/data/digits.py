"""scikit-learn's handwritten digits: 1,797 real 8x8 images that come with the library."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from lightning_compress.data.augment import CropFlip
from lightning_compress.data.module import ImageDataModule, Splits
from lightning_compress.data.tensors import Normalize

#: Mean and standard deviation of the 1,197 training images, scaled to [0, 1].
DIGITS_NORMALIZE = Normalize(mean=(0.3055,), std=(0.3761,))


class DigitsDataModule(ImageDataModule):
    """The digits of scikit-learn, split once and for all into 1,197 / 300 / 300 images with equal shares of classes.

    Nothing is downloaded. Pixels go from 0 to 16; batches are float images (batch, 1, 8, 8) and labels (batch,).

    Args:
        batch_size: Samples per batch and process.
        seed: Seed of the training order and of the augmentation; the split does not depend on it.
        num_workers: Worker processes per loader.
        normalize: Applied after scaling pixels to [0, 1].
        augment: Applied to training images.

    >>> data = DigitsDataModule(batch_size=100)
    >>> [len(images) for images, _ in (data.splits.train, data.splits.val, data.splits.test)]
    [1197, 300, 300]
    """

    def __init__(
        self,
        batch_size: int = 64,
        seed: int = 0,
        num_workers: int = 0,
        normalize: Normalize | None = DIGITS_NORMALIZE,
        augment: CropFlip | None = None,
    ) -> None:
        super().__init__(batch_size, seed, num_workers, normalize, augment)

    def load(self) -> Splits:
        """Return the fixed, stratified split."""
        digits = load_digits()
        rest, test = train_test_split(
            np.arange(len(digits.target)), test_size=300, stratify=digits.target, random_state=0
        )
        train, val = train_test_split(rest, test_size=300, stratify=digits.target[rest], random_state=0)
        images = torch.from_numpy(digits.images.astype(np.uint8)).unsqueeze(1)
        labels = torch.from_numpy(digits.target.astype(np.int64))
        train_part, val_part, test_part = (
            (images[np.sort(part)], labels[np.sort(part)]) for part in (train, val, test)
        )
        return Splits(train_part, val_part, test_part, tuple(str(name) for name in digits.target_names), 16.0)
