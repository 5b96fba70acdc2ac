"""Bytes of a model's dense file, plain and under gzip, without writing it."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from lightning_compress.core.errors import ConfigurationError

_CHUNK = 1 << 22
_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
_ORDER = {dtype: place for place, dtype in enumerate(_NAMES)}


def dense_bytes(model: nn.Module) -> int:
    """Return the bytes of a safetensors file with every tensor of the model's ``state_dict``, the header included.

    Args:
        model: Any module; values are not read, so a copy on the ``meta`` device will do. Tied tensors count once.

    Returns:
        The size of the file in bytes.

    Raises:
        ConfigurationError: If a tensor has a dtype that the format does not know.

    >>> dense_bytes(nn.Linear(4, 2, bias=False)) - 4 * 8
    72
    """
    tensors = stored_tensors(model)
    return len(_header(tensors)) + sum(_nbytes(tensor) for tensor in tensors.values())


def gzip_bytes(model: nn.Module, progress: Callable[[int], None] | None = None) -> int:
    """Return the bytes of the same file after ``gzip -6``, compressed in small pieces as a stream.

    Args:
        model: Any module with values (not on the ``meta`` device). About 20 MB are compressed in a second.
        progress: Called with the number of file bytes of each piece that is done.

    Returns:
        The size of the compressed file in bytes.

    Raises:
        ConfigurationError: If a tensor has a dtype that the format does not know, or has no values.

    >>> gzip_bytes(nn.Linear(64, 64)) < dense_bytes(nn.Linear(64, 64)) + 100
    True
    """
    packer = zlib.compressobj(6, zlib.DEFLATED, 31)
    size = 0
    for piece in iterate_file(model):
        size += len(packer.compress(piece))
        if progress is not None:
            progress(len(piece))
    return size + len(packer.flush())


def iterate_file(model: nn.Module) -> Iterator[bytes]:
    """Yield the dense safetensors file of a model's ``state_dict`` in pieces of at most 4 MiB after the header."""
    tensors = stored_tensors(model)
    yield _header(tensors)
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ConfigurationError(
                f"`model`: expected tensors with values, but {name!r} is on the meta device. Load the weights first."
            )
        flat = tensor.detach().cpu().contiguous().view(-1)
        raw = torch.view_as_real(flat).view(-1) if flat.is_complex() else flat
        step = max(1, _CHUNK // max(1, raw.element_size()))
        for start in range(0, raw.numel(), step):
            yield raw[start : start + step].view(torch.uint8).numpy().tobytes()


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a model's ``state_dict`` in the order of the file, each tied one under its first name."""
    tensors: dict[str, Tensor] = {}
    seen: set[object] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            continue
        if value.dtype not in _NAMES:
            raise ConfigurationError(
                f"`model`: expected tensors that a safetensors file can hold, got {value.dtype} in {name!r}. "
                "Convert it, or leave it out of the state_dict."
            )
        key = _identity(value)
        if key not in seen:
            seen.add(key)
            tensors[name] = value
    return dict(sorted(tensors.items(), key=lambda item: (-_ORDER[item[1].dtype], item[0])))


def _identity(tensor: Tensor) -> object:
    if tensor.is_meta or tensor.layout is not torch.strided or tensor.numel() == 0:
        return id(tensor)
    return (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _nbytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * tensor.element_size()


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    entries, start = {}, 0
    for name, tensor in tensors.items():
        end = start + _nbytes(tensor)
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
