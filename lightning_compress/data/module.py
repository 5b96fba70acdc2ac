"""What the image data modules have in common: fixed splits in memory and loaders that resume."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.data.augment import CropFlip
from lightning_compress.data.order import ResumableLoader
from lightning_compress.data.tensors import Normalize, TensorImages, already_batched

Images = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Splits:
    """Images (n, c, h, w) as ``uint8`` and labels (n,) of each split.

    Args:
        train: What is trained on.
        val: What decisions during training may look at.
        test: What the reported accuracy comes from.
        classes: Names of the classes, in the order of the labels.
        maximum: The pixel value that means white.
    """

    train: Images
    val: Images
    test: Images
    classes: tuple[str, ...]
    maximum: float = 255.0


class ImageDataModule(LightningDataModule, ABC):
    """Base of the image data modules; a subclass says how to ``load`` its splits.

    The splits never depend on ``seed``; the order of the training data depends on ``seed`` and the epoch alone.

    Args:
        batch_size: Samples per batch and process.
        seed: Seed of the training order and of the augmentation, >= 0.
        num_workers: Worker processes per loader; 0 is usually fastest, as the images are in memory.
        normalize: Applied after scaling pixels to [0, 1].
        augment: Applied to training images.
    """

    def __init__(
        self,
        batch_size: int = 64,
        seed: int = 0,
        num_workers: int = 0,
        normalize: Normalize | None = None,
        augment: CropFlip | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0), ("num_workers", num_workers, 0)):
            if not isinstance(value, int) or value < least:
                raise ConfigurationError(f"`{name}` of {type(self).__name__} must be an int >= {least}, got {value!r}")
        self.batch_size, self.seed, self.num_workers = batch_size, seed, num_workers
        self.normalize, self.augment = normalize, augment
        self._splits: Splits | None = None

    @abstractmethod
    def load(self) -> Splits:
        """Read the images; called once, on first use."""

    @property
    def splits(self) -> Splits:
        """The decoded splits, loaded on first use."""
        if self._splits is None:
            self._splits = self.load()
        return self._splits

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.splits.classes)

    def setup(self, stage: str) -> None:
        """Load the images, so that a missing folder is reported before training starts."""
        self._splits = self.splits

    def train_dataloader(self) -> ResumableLoader:
        """Return the loader of the training data."""
        data = self._dataset(self.splits.train, self.augment)
        return ResumableLoader(data, batch_size=self.batch_size, seed=self.seed, **self._options())

    def val_dataloader(self) -> DataLoader:
        """Return the loader of the validation data, in fixed order."""
        return self._evaluation_loader(self.splits.val)

    def test_dataloader(self) -> DataLoader:
        """Return the loader of the test data, in fixed order."""
        return self._evaluation_loader(self.splits.test)

    def predict_dataloader(self) -> DataLoader:
        """Return the loader of the test data, in fixed order."""
        return self._evaluation_loader(self.splits.test)

    def state_dict(self) -> dict[str, Any]:
        """Return the seed, so that a resumed run keeps the order it began with."""
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the seed of the interrupted run."""
        self.seed = int(state_dict["seed"])

    def _dataset(self, images: Images, augment: CropFlip | None = None) -> TensorImages:
        return TensorImages(*images, maximum=self.splits.maximum, normalize=self.normalize, augment=augment)

    def _evaluation_loader(self, images: Images) -> DataLoader:
        # A generator of its own: a DataLoader otherwise draws from torch's global one each time it is iterated.
        # By keyword, since Lightning rebuilds loaders with some of their arguments replaced.
        own = torch.Generator().manual_seed(0)
        return DataLoader(self._dataset(images), batch_size=self.batch_size, generator=own, **self._options())

    def _options(self) -> dict[str, Any]:
        return {"num_workers": self.num_workers, "collate_fn": already_batched}
