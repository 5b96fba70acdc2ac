"""The files of a teacher cache: what it belongs to, and two arrays that are mapped into memory."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lightning_compress.core.errors import ArtifactError, ConfigurationError

DTYPES: dict[str, type[np.floating[Any]]] = {"float16": np.float16, "float32": np.float32}
VERSION = 1
_OUTPUTS, _CHECKSUMS, _FACTS = "outputs.npy", "checksums.npy", "cache.json"


@dataclass(frozen=True)
class CacheFacts:
    """What a cache belongs to.

    Args:
        samples: Length of the data set.
        teacher: SHA-256 of the teacher's tensors, or the name given for a teacher without any.
        dtype: ``"float16"`` or ``"float32"``.
        shape: Of one sample's output.
        done: Rows that are complete.
        version: Of the format.
    """

    samples: int
    teacher: str
    dtype: str
    shape: tuple[int, ...]
    done: int = 0
    version: int = VERSION


def read_facts(path: Path) -> CacheFacts | None:
    """Return what a folder's cache belongs to, or ``None`` if there is none.

    Raises:
        ArtifactError: If the description is damaged or of a newer version.
    """
    try:
        content = json.loads((path / _FACTS).read_text(encoding="utf-8"))
        version = content["version"]
        facts = CacheFacts(**{**content, "shape": tuple(content["shape"])}) if version == VERSION else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise damaged(path, f"{_FACTS} cannot be read ({type(error).__name__}: {error})") from error
    if facts is None:
        raise ArtifactError(
            f"`path` {str(path)!r} holds a teacher cache of version {version}, this release reads version {VERSION}; "
            "delete the folder"
        )
    return facts


def write_facts(path: Path, facts: CacheFacts) -> None:
    """Replace the description at once, so that a reader sees the old one or the new one."""
    aside = path / f".{_FACTS}.{os.getpid()}.tmp"
    aside.write_text(json.dumps(asdict(facts)) + "\n", encoding="utf-8")
    os.replace(aside, path / _FACTS)


def create_arrays(path: Path, facts: CacheFacts) -> None:
    """Make both files at their full size, all zeros, and the description.

    Raises:
        ConfigurationError: If ``path`` is in use for something else, or the disk has too little room.
    """
    if path.exists() and (
        not path.is_dir() or any(entry.name not in (_OUTPUTS, _CHECKSUMS) for entry in visible(path))
    ):
        raise ConfigurationError(f"`path` {str(path)!r} holds other files; name a folder of its own for the cache")
    path.mkdir(parents=True, exist_ok=True)
    shape = (facts.samples, *facts.shape)
    needed = int(np.prod(shape)) * np.dtype(DTYPES[facts.dtype]).itemsize
    if needed > (free := shutil.disk_usage(path).free):
        raise ConfigurationError(
            f"`path`: outputs of shape {shape} take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there; "
            "choose another disk, dtype='float16', or let the teacher run along without a cache"
        )
    for file, dtype, size in ((_OUTPUTS, DTYPES[facts.dtype], shape), (_CHECKSUMS, np.uint32, shape[:1])):
        np.lib.format.open_memmap(path / file, "w+", dtype, size).flush()
    write_facts(path, facts)


def open_arrays(path: Path, facts: CacheFacts, mode: Literal["r", "r+"]) -> tuple[np.memmap[Any, Any], ...]:
    """Map the outputs (samples, ...) and checksums (samples,) into memory.

    Raises:
        ArtifactError: If a file is missing, truncated or of another shape.
    """
    try:
        mapped = tuple(np.load(path / file, mmap_mode=mode, allow_pickle=False) for file in (_OUTPUTS, _CHECKSUMS))
    except (OSError, ValueError, EOFError) as error:
        raise damaged(path, str(error)) from error
    wanted = [((facts.samples, *facts.shape), DTYPES[facts.dtype]), ((facts.samples,), np.uint32)]
    for array, (shape, dtype) in zip(mapped, wanted, strict=True):
        if array.shape != shape or array.dtype != dtype:
            raise damaged(path, f"an array has shape {array.shape} and type {array.dtype}, not {shape}")
    return mapped


def visible(path: Path) -> list[Path]:
    """Return the entries of a folder that are not hidden."""
    return [entry for entry in path.iterdir() if not entry.name.startswith(".")]


def damaged(path: Path, reason: str) -> ArtifactError:
    """Return the error for a cache that cannot be used."""
    return ArtifactError(
        f"`path` {str(path)!r}: the teacher cache is damaged or truncated: {reason}; delete the folder"
    )
