"""The data that recipes and tests use, in an order that depends only on seed and epoch."""

from lightning_compress.data.augment import CropFlip
from lightning_compress.data.digits import DigitsDataModule
from lightning_compress.data.fake import FakeDataModule
from lightning_compress.data.few import FewImagesDataModule
from lightning_compress.data.folder import ImageFolderDataModule
from lightning_compress.data.mnist import MNISTDataModule
from lightning_compress.data.module import ImageDataModule, Splits
from lightning_compress.data.order import EpochSampler, ResumableLoader
from lightning_compress.data.paths import find_data
from lightning_compress.data.resume import ExactResume
from lightning_compress.data.tensors import Normalize, TensorImages

__all__ = [
    "CropFlip",
    "DigitsDataModule",
    "EpochSampler",
    "ExactResume",
    "FakeDataModule",
    "FewImagesDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "MNISTDataModule",
    "Normalize",
    "ResumableLoader",
    "Splits",
    "TensorImages",
    "find_data",
]
