"""The compact form of a container: a deflated directory in place of a header that names every part.

A safetensors header takes about 90 bytes for each part, uncompressed. Of a network of many layers with few bits that
can be half of the file: scales, zero points and biases are parts of some dozen bytes each.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_compress.coding.packed import NATIVE_DTYPES
from lightning_compress.core.errors import ConfigurationError

DIRECTORY, SMALL = ":directory", ":small"
"""Names of the two parts; no key of a ``state_dict`` is empty, so no other part is called so."""

MAX_HEADER_BYTES = 16 * 2**20
"""A header or an inflated directory beyond this is refused; a thousand tensors take about 0.3 MiB."""

_SMALL_BYTES = 2**14
"""Parts up to this size go together; for larger ones the entry in the header is less than a hundredth of them."""

_DTYPES = {name: dtype for dtype, name in NATIVE_DTYPES.items()}


def fold(parts: Mapping[str, Tensor], text: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the large parts as they are, all small ones as one part, and the directory.

    Args:
        parts: By name, types with the widest elements first.
        text: Metadata, which the directory takes in.

    Raises:
        ConfigurationError: If the directory would be refused by :func:`unfold`.

    >>> parts = {f"layer.{index}.bias:values": torch.ones(4) for index in range(100)}
    >>> folded = fold(parts, {"note": "1"})
    >>> [(name, part.numel()) for name, part in folded.items()][0], folded[":directory"].numel() < 1000
    ((':small', 1600), True)
    """
    small = {name: part for name, part in parts.items() if part.numel() * part.element_size() <= _SMALL_BYTES}
    table = [[name, NATIVE_DTYPES[part.dtype], list(part.shape)] for name, part in small.items()]
    content = json.dumps({"text": dict(text), "parts": table}, separators=(",", ":")).encode()
    if len(content) > MAX_HEADER_BYTES:
        raise ConfigurationError(f"the directory takes {len(content)} bytes, at most {MAX_HEADER_BYTES} are allowed")
    together = [part.contiguous().reshape(-1).view(torch.uint8) for part in small.values()]
    return {
        **{name: part for name, part in parts.items() if name not in small},
        SMALL: torch.cat(together) if together else torch.empty(0, dtype=torch.uint8),
        DIRECTORY: torch.frombuffer(bytearray(zlib.compress(content, 9)), dtype=torch.uint8),
    }


def unfold(parts: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Undo :func:`fold`: return all parts, and the metadata.

    Raises:
        ValueError: If there is no directory, or it does not fit the parts; says in what.
    """
    rest = dict(parts)
    small, directory = (_taken(rest, name) for name in (SMALL, DIRECTORY))
    text, table = _parsed(_inflated(bytes(directory.numpy())))
    small = small.clone()  # in memory of its own, every type is aligned
    start = 0
    for entry in table:
        name, dtype, shape = _checked(entry)
        end = start + math.prod(shape) * dtype.itemsize
        if name in rest or end > small.numel() or start % dtype.itemsize:
            raise ValueError(f"the directory's entry {str(entry)[:80]} does not fit the file")
        rest[name] = small[start:end].view(dtype).reshape(shape)
        start = end
    if start != small.numel():
        raise ValueError(f"the directory names {start} of {small.numel()} bytes of small parts")
    return rest, text


def _taken(parts: dict[str, Tensor], name: str) -> Tensor:
    """Take the bytes of one part out of ``parts``."""
    part = parts.pop(name, None)
    if part is None or part.dtype != torch.uint8 or part.dim() != 1:
        raise ValueError(f"the part {name!r} must be bytes")
    return part


def _inflated(blob: bytes) -> bytes:
    """Return the content of a directory, which never grows beyond its limit."""
    inflater = zlib.decompressobj()
    try:
        content = inflater.decompress(blob, MAX_HEADER_BYTES + 1)
    except zlib.error as error:
        raise ValueError(f"the directory cannot be inflated: {error}") from error
    if len(content) > MAX_HEADER_BYTES or not inflater.eof or inflater.unused_data:
        raise ValueError(f"the directory is cut off, has bytes behind it, or is larger than {MAX_HEADER_BYTES} bytes")
    return content


def _parsed(content: bytes) -> tuple[dict[str, str], list[Any]]:
    held = json.loads(content)
    if not isinstance(held, dict) or held.keys() != {"text", "parts"}:
        raise ValueError("the directory must have `text` and `parts`")
    text, table = held["text"], held["parts"]
    if not isinstance(text, dict) or not all(isinstance(value, str) for value in text.values()):
        raise ValueError("the directory's `text` must be strings by name")
    if not isinstance(table, list):
        raise ValueError("the directory's `parts` must be a list")
    return text, table


def _checked(entry: Any) -> tuple[str, torch.dtype, list[int]]:
    """Return name, type and shape of one small part."""
    if not isinstance(entry, list) or [type(item) for item in entry] != [str, str, list] or entry[1] not in _DTYPES:
        raise ValueError(f"the directory's entry {str(entry)[:80]} is no name, type and shape")
    name, dtype, shape = entry
    if not all(type(size) is int and size >= 0 for size in shape) or math.prod(size or 1 for size in shape) >= 2**63:
        raise ValueError(f"the directory's entry {str(entry)[:80]} has no shape")
    return name, _DTYPES[dtype], shape
