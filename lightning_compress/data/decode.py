"""Decode folders or archives of class folders into memory, once."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.progress import slow

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"})
SPLITS = ("train", "val", "test")
Parts = dict[str, tuple[torch.Tensor, torch.Tensor]]


class Entry(NamedTuple):
    """One image file before it is decoded."""

    split: str
    label: str
    name: str
    content: bytes


def is_archive(source: Path) -> bool:
    """Tell whether ``source`` is named like a tar archive.

    >>> is_archive(Path("cifar10_jpeg.tar.gz")), is_archive(Path("images"))
    (True, False)
    """
    return source.name.endswith((".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2"))


def read_entries(source: Path) -> Iterator[Entry]:
    """Yield the images of a folder or archive laid out as ``[.../]split/class/file``; other files are passed over.

    Args:
        source: A folder, or a tar archive, which is read as a stream and never unpacked.
    """
    if not is_archive(source):
        for path in sorted(source.glob("*/*/*")):
            if place := _place(path.relative_to(source).as_posix()):
                yield Entry(*place, str(path), path.read_bytes())
        return
    try:
        with tarfile.open(source, "r|*") as archive:
            for member in archive:
                place = _place(member.name) if member.isfile() else None
                content = archive.extractfile(member) if place else None
                if place and content is not None:
                    yield Entry(*place, f"{source}:{member.name}", content.read())
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ConfigurationError(f"`root`: the archive {source} is corrupt or cut short ({error})") from error


def decode_image(entry: Entry, size: int | None) -> np.ndarray:
    """Decode one file to RGB, resized to ``size`` x ``size`` pixels if given.

    Args:
        entry: The file.
        size: Edge length in pixels, or ``None`` to keep the file's size.

    Returns:
        ``uint8`` array (h, w, 3).

    Raises:
        ConfigurationError: If the content is not an image.
    """
    try:
        image = Image.open(io.BytesIO(entry.content)).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ConfigurationError(f"`root`: {entry.name} is not a readable image ({error})") from error
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)


def decode_splits(source: Path, size: int | None) -> tuple[Parts, tuple[str, ...]]:
    """Decode all images under ``source``.

    Args:
        source: Folder or archive.
        size: Edge length that images are resized to, or ``None`` if all have one size already.

    Returns:
        ``{split: (images (n, 3, h, w) uint8, labels (n,))}`` and the class names, sorted.

    Raises:
        ConfigurationError: If there are no images, or they differ in size and ``size`` is ``None``.
    """
    arrays: dict[str, list[np.ndarray]] = {}
    labels: dict[str, list[str]] = {}
    shape: tuple[int, ...] | None = None
    for entry in slow(read_entries(source), f"Decoding {source.name}"):
        array = decode_image(entry, size)
        shape = shape or array.shape
        if array.shape != shape:
            raise ConfigurationError(
                f"`image_size` is needed, as the images differ in size: {entry.name} has {array.shape[:2]}, "
                f"earlier ones {shape[:2]}; set `image_size` to an edge length in pixels"
            )
        arrays.setdefault(entry.split, []).append(array)
        labels.setdefault(entry.split, []).append(entry.label)
    if "train" not in arrays or "test" not in arrays:
        raise ConfigurationError(
            f"`root`: {source} needs images in train/CLASS/ and test/CLASS/, found {sorted(arrays) or 'none'}"
        )
    classes = tuple(sorted({label for part in labels.values() for label in part}))
    number = {label: index for index, label in enumerate(classes)}
    parts = {}
    for split in arrays:
        images = torch.from_numpy(np.stack(arrays[split])).permute(0, 3, 1, 2).contiguous()
        parts[split] = images, torch.tensor([number[label] for label in labels[split]])
    return parts, classes


def cached_splits(source: Path, size: int | None, cache_dir: Path) -> tuple[Parts, tuple[str, ...]]:
    """Like :func:`decode_splits`, but keeps the decoded tensors in ``cache_dir`` for the next time.

    The file's name holds a digest of the source's names, sizes and times, so a changed source is decoded again.
    """
    name = source.name.split(".")[0]
    path = cache_dir / f"{name}-{_fingerprint(source, size)}.safetensors"
    if path.is_file() and (found := _read_cache(path)):
        return found
    parts, classes = decode_splits(source, size)
    cache_dir.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{split}.{kind}": tensor for split, pair in parts.items() for kind, tensor in zip("xy", pair, strict=True)
    }
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    save_file(tensors, aside, metadata={"classes": "\n".join(classes)})
    os.replace(aside, path)
    return parts, classes


def _read_cache(path: Path) -> tuple[Parts, tuple[str, ...]] | None:
    try:
        with safe_open(path, framework="pt") as file:
            keys = file.keys()
            splits = sorted({key.split(".")[0] for key in keys})
            parts = {split: (file.get_tensor(f"{split}.x"), file.get_tensor(f"{split}.y")) for split in splits}
            return parts, tuple(file.metadata()["classes"].split("\n"))
    except SafetensorError:
        return None


def _fingerprint(source: Path, size: int | None) -> str:
    files = [source] if is_archive(source) else sorted(source.glob("*/*/*"))
    lines = [f"{file.name} {(stat := file.stat()).st_size} {stat.st_mtime_ns}" for file in files]
    return hashlib.sha256("\n".join([f"size {size}", str(source.resolve()), *lines]).encode()).hexdigest()[:16]


def _place(name: str) -> tuple[str, str] | None:
    path = PurePosixPath(name)
    if len(path.parts) < 3 or path.suffix.lower() not in EXTENSIONS or path.parts[-3] not in SPLITS:
        return None
    return path.parts[-3], path.parts[-2]
