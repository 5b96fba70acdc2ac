"""Images in class folders, in a directory or an archive."""

from __future__ import annotations

from pathlib import Path

import torch

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.data.augment import CropFlip
from lightning_compress.data.decode import Parts, cached_splits, decode_splits, is_archive
from lightning_compress.data.module import ImageDataModule, Images, Splits
from lightning_compress.data.paths import find_data
from lightning_compress.data.tensors import Normalize

#: Every tenth training image is set aside for validation where there is no ``val`` folder.
VALIDATION_SHARE = 10


class ImageFolderDataModule(ImageDataModule):
    """Images as ``train/CLASS/*``, ``test/CLASS/*`` and, if there is one, ``val/CLASS/*``, decoded once into memory.

    Without a ``val`` folder a tenth of the training images, drawn the same way for every seed, is set aside.

    Args:
        root: The folder, or a tar archive of it; a bare name is looked for in ``$LIGHTNING_COMPRESS_DATA`` and the
            usual places too.
        batch_size: Samples per batch and process.
        seed: Seed of the training order and of the augmentation.
        num_workers: Worker processes per loader.
        image_size: Edge length in pixels that images are resized to; not needed if all have one size.
        normalize: Applied after scaling pixels to [0, 1].
        augment: Applied to training images.
        cache_dir: Folder that keeps the decoded tensors for the next run.

    Raises:
        ConfigurationError: On first use, if there are no images or they cannot be read.
    """

    def __init__(
        self,
        root: str | Path,
        batch_size: int = 128,
        seed: int = 0,
        num_workers: int = 0,
        image_size: int | None = None,
        normalize: Normalize | None = None,
        augment: CropFlip | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__(batch_size, seed, num_workers, normalize, augment)
        if image_size is not None and image_size < 1:
            raise ConfigurationError(f"`image_size` must be at least 1 pixel, got {image_size}")
        self.root, self.image_size, self.cache_dir = root, image_size, cache_dir

    def load(self) -> Splits:
        """Decode the images, or read them from ``cache_dir``."""
        bare = not Path(self.root).exists() and len(Path(self.root).parts) == 1
        source = find_data(str(self.root), root=None if bare else self.root)
        if not (source.is_dir() or is_archive(source)):
            raise ConfigurationError(f"`root` must be a folder or a tar archive, got {source}")
        if self.cache_dir is None:
            parts, classes = decode_splits(source, self.image_size)
        else:
            parts, classes = cached_splits(source, self.image_size, Path(self.cache_dir).expanduser())
        train, val = _train_and_val(parts)
        return Splits(train, val, parts["test"], classes)


def _train_and_val(parts: Parts) -> tuple[Images, Images]:
    images, labels = parts["train"]
    if "val" in parts:
        return parts["train"], parts["val"]
    if len(labels) < VALIDATION_SHARE:
        raise ConfigurationError(
            f"`root`: {len(labels)} training images are too few to set a tenth aside; add a val/CLASS/ folder"
        )
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    count = len(labels) // VALIDATION_SHARE
    aside, kept = order[:count].sort().values, order[count:].sort().values
    return (images[kept], labels[kept]), (images[aside], labels[aside])
