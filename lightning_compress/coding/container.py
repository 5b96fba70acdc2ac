"""The container: one safetensors file whose metadata says how each tensor is packed, under one checksum.

Layout: eight bytes with the header's length, the JSON header, the parts one after another. The ``__metadata__`` of the
header holds ``format``, ``version``, ``sha256`` (of the whole file, with these 64 digits as zeros), ``tensors``
(packing and config by key) and what the caller adds. The part ``p`` of the tensor ``k`` is called ``k:p``. Where that
would take much of the file, small parts and metadata are folded, see :mod:`~lightning_compress.coding.directory`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_compress.coding.directory import MAX_HEADER_BYTES, fold, unfold
from lightning_compress.coding.packing import NATIVE_DTYPES, PACKINGS, ROLES, Packed, bits_by_role
from lightning_compress.coding.state import ALIAS, source
from lightning_compress.core.errors import ArtifactError, ConfigurationError

FORMAT = "lightning-compress"
VERSION = 3
"""Highest that can be read. A file has the lowest that will do: 1 for simple packings, 2 for codes, 3 if folded."""

_FOLDED = 3
_WORTH_BYTES, _WORTH_SHARE = 2**12, 0.1
"""A file is folded if that saves as many bytes, and such a share of it; else other readers see all of its parts."""

_OWN = ("sha256", "format", "version")
_NO_DIGEST = "0" * 64
_CHUNK = 2**20


@dataclass(frozen=True)
class Container:
    """What a compressed file holds.

    Args:
        path: Where it lies.
        file_bytes: Size on disk.
        tensors: Packed tensors in the order of the ``state_dict``.
        metadata: The caller's JSON values.
    """

    path: Path
    file_bytes: int
    tensors: Mapping[str, Packed]
    metadata: Mapping[str, Any]

    def encoded_bits(self) -> dict[str, int]:
        """Return bits by role; they add up to eight times the file's size, for the header counts as ``other``."""
        total = dict.fromkeys(ROLES, 0)
        for packed in self.tensors.values():
            for role, bits in bits_by_role(packed).items():
                total[role] += bits
        total["other"] += 8 * self.file_bytes - sum(total.values())
        return total


def write_container(path: str | Path, tensors: Mapping[str, Packed], metadata: Mapping[str, Any]) -> Container:
    """Write one file, complete or not at all: it is written beside its place, flushed to disk, and renamed.

    Args:
        path: File to write; missing folders are made.
        tensors: From :func:`~lightning_compress.coding.state.pack_state`.
        metadata: JSON-able values by name.

    Raises:
        ConfigurationError: If ``path`` is a folder or a device, or ``metadata`` is not JSON.
    """
    path = Path(path)
    if path.is_dir():
        raise ConfigurationError(f"`path` {str(path)!r} is a folder; give the name of a file in it")
    if path.exists() and not path.is_file():  # the rename would put a file in place of a device, a pipe or a socket
        raise ConfigurationError(f"`path` {str(path)!r} is not a regular file; give the name of one")
    parts = {f"{key}:{name}": part for key, packed in tensors.items() for name, part in packed.parts.items()}
    ordered = dict(sorted(parts.items(), key=lambda item: -item[1].element_size()))  # wide ones first: all aligned
    header, held = _laid_out(ordered, tensors, metadata)
    digest = _digest(header, map(_raw, held.values()))
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with aside.open("xb") as file:
            file.write(header.replace(_NO_DIGEST.encode(), digest.encode(), 1))
            for part in held.values():
                file.write(_raw(part))
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    _sync_folder(path.parent)
    return Container(path, size, dict(tensors), dict(metadata))


def read_container(path: str | Path) -> Container:
    """Read and verify one file; parts stay mapped to it until they are unpacked.

    Raises:
        ArtifactError: If the file is missing, foreign, damaged, or of a newer version; says which and what to do.
    """
    path = Path(path)
    try:
        size, header = _read_header(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            text = file.metadata() or {}
            _check_origin(path, text)
            _check_digest(path, header, text)
            names = file.keys()
            parts = {name: file.get_tensor(name) for name in names}
            if int(text["version"]) >= _FOLDED:
                parts, text = unfold(parts)
        metadata = {key: json.loads(value) for key, value in text.items() if key not in _OWN}
    except OSError as error:
        raise _refused(path, f"{type(error).__name__}: {error.strerror or error}", "check the path") from error
    except (SafetensorError, ValueError, RecursionError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise _refused(path, f"a damaged or truncated file ({str(error)[:200]})", "copy or create it again") from error
    entries = _entries(path, metadata.pop("tensors", None), parts)
    _check_entries(path, entries)
    return Container(path, size, entries, metadata)


def _laid_out(
    parts: Mapping[str, Tensor], tensors: Mapping[str, Packed], metadata: Mapping[str, Any]
) -> tuple[bytes, Mapping[str, Tensor]]:
    """Return the header and the parts as they are written: as they are, or folded where that is worth it."""
    text = _text(tensors, metadata)
    version = max((PACKINGS[packed.packing].since for packed in tensors.values() if packed.packing != ALIAS), default=1)
    plain, folded = _header(parts, text, version), fold(parts, text)
    compact = _header(folded, {}, _FOLDED)
    size = len(plain) + sum(map(_bytes, parts.values()))
    saved = size - len(compact) - sum(map(_bytes, folded.values()))
    header, held = (compact, folded) if saved >= max(_WORTH_BYTES, _WORTH_SHARE * size) else (plain, parts)
    if len(header) > MAX_HEADER_BYTES:
        raise ConfigurationError(f"the header takes {len(header)} bytes, at most {MAX_HEADER_BYTES} are allowed")
    return header, held


def _text(tensors: Mapping[str, Packed], metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return the table of packings and the caller's metadata, as JSON by name."""
    own = {"tensors": {key: [packed.packing, dict(packed.config)] for key, packed in tensors.items()}}
    if taken := sorted(metadata.keys() & {*_OWN, *own}):
        raise ConfigurationError(f"`metadata` must not have the entries {taken}, which the format itself writes")
    text: dict[str, str] = {}
    try:
        for key, value in sorted({**metadata, **own}.items()):  # equal contents give equal bytes
            text[key] = json.dumps(value, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"`metadata` entry {key!r} cannot be written as JSON: {error}") from error
    return text


def _header(parts: Mapping[str, Tensor], text: Mapping[str, str], version: int) -> bytes:
    own = {"sha256": _NO_DIGEST, "format": FORMAT, "version": str(version)}
    header: dict[str, Any] = {"__metadata__": {**own, **text}}
    start = 0
    for name, part in parts.items():
        end = start + _bytes(part)
        header[name] = {"dtype": NATIVE_DTYPES[part.dtype], "shape": list(part.shape), "data_offsets": [start, end]}
        start = end
    body = json.dumps(header, separators=(",", ":")).encode()
    body += b" " * (-len(body) % 8)
    return len(body).to_bytes(8, "little") + body


def _bytes(part: Tensor) -> int:
    return part.numel() * part.element_size()


def _raw(part: Tensor) -> memoryview:
    return part.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _digest(header: bytes, payload: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.sha256(header)
    for chunk in payload:
        digest.update(chunk)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make the rename itself last; where a folder cannot be opened (Windows) the system does so by itself."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _read_header(path: Path) -> tuple[int, bytes]:
    """Return the file's size and its first bytes up to the end of the header."""
    if path.is_dir():
        raise _refused(path, "a folder", "name the file in it")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(9)
        length = int.from_bytes(start[:8], "little")
        if len(start) < 9 or start[8:] != b"{" or length > MAX_HEADER_BYTES:
            raise _refused(path, *_foreign(start))
        if 8 + length > size:
            raise _refused(path, f"{size} bytes where the header alone needs {8 + length}", "copy the file again")
        file.seek(0)
        return size, file.read(8 + length)


def _foreign(start: bytes) -> tuple[str, str]:
    if not start:
        return "an empty file", "save the model again"
    if start.startswith(b"PK"):
        return "a zip archive, as `torch.save` writes", "use `load_from_checkpoint` or `torch.load` for a checkpoint"
    if start.startswith(b"\x80"):
        return "a pickle", "pickles are never loaded; save the model with `save_compressed`"
    return f"another kind of file, which starts with {start!r}", "give a file written by `save_compressed`"


def _check_origin(path: Path, text: Mapping[str, str]) -> None:
    if text.get("format") != FORMAT:
        raise _refused(path, "a plain safetensors file", "load it with `safetensors.torch.load_model`")
    version = text.get("version", "")
    if not version.isdecimal() or len(version) > 9:
        raise _refused(path, f"the version {version[:80]!r}", "copy or create the file again")
    if int(version) > VERSION:
        raise _refused(path, f"version {version}", "install a newer lightning-compress")


def _check_digest(path: Path, header: bytes, text: Mapping[str, str]) -> None:
    written = text.get("sha256", "").encode()
    if len(written) != len(_NO_DIGEST) or header.count(written) != 1:
        raise _refused(path, "no checksum", "copy or create the file again")
    with path.open("rb") as file:
        file.seek(len(header))
        actual = _digest(header.replace(written, _NO_DIGEST.encode()), iter(lambda: file.read(_CHUNK), b""))
    if actual.encode() != written:
        raise _refused(path, "bytes that do not match the checksum", "the file is damaged: copy or create it again")


def _entries(path: Path, table: Any, parts: Mapping[str, Tensor]) -> dict[str, Packed]:
    """Pair the table of packings with the parts; every part belongs to exactly one tensor."""
    grouped: dict[str, dict[str, Tensor]] = {}
    for name, part in parts.items():
        key, _, role = name.rpartition(":")
        grouped.setdefault(key, {})[role] = part
    entries: dict[str, Packed] = {}
    for key, entry in table.items() if isinstance(table, dict) else ():
        if not isinstance(entry, list) or [type(item) for item in entry] != [str, dict]:
            raise _refused(path, f"no packing and config for the tensor {key!r}", "create the file again")
        packing, config = entry
        roles = set() if packing == ALIAS else set(PACKINGS[packing].roles) if packing in PACKINGS else None
        if roles is None:
            raise _refused(path, f"the unknown packing {str(packing)[:80]!r}", "install a newer lightning-compress")
        entries[key] = Packed(packing, grouped.pop(key, {}), config)
        if set(entries[key].parts) != roles:
            got = sorted(entries[key].parts)
            raise _refused(path, f"the parts {got} for the {packing} tensor {key!r}", "create the file again")
    if grouped or not isinstance(table, dict):
        raise _refused(path, f"parts without a packing: {sorted(grouped)[:5]}", "create the file again")
    return entries


def _check_entries(path: Path, entries: Mapping[str, Packed]) -> None:
    """Refuse aliases of nothing, shapes and types that are none, and parts that contradict what they declare."""
    try:
        for key, entry in entries.items():
            held = entries[source(entries, key)]
            math.prod(held.shape) * held.dtype.itemsize
            if entry is held:
                _ = bits_by_role(entry)
    except ArtifactError as error:
        raise _refused(path, str(error), "create the file again") from error


def _refused(path: Path, came: str, step: str) -> ArtifactError:
    return ArtifactError(
        f"{str(path)!r}: expected a compressed file as `save_compressed` writes it "
        f"(safetensors, format {FORMAT!r}, version up to {VERSION}), got {came}; {step}"
    )
