"""One part that holds a whole packed tensor: small numbers, tables and streams one after another, each with a role."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_compress.core.errors import ArtifactError

Bytes = NDArray[np.uint8]

_LONGEST_VARINT = 9
"""Bytes of seven bits each: numbers below 2**63."""


def require(fits: bool, what: str) -> None:
    """Raise the error of a damaged file unless ``fits``."""
    if not fits:
        raise ArtifactError(f"{what}; the file is damaged")


class Writer:
    """Collects the bytes of one part.

    >>> writer = Writer()
    >>> writer.number(300)
    >>> writer.tensor()
    tensor([172,   2], dtype=torch.uint8)
    """

    def __init__(self) -> None:
        self._pieces: list[bytes | Bytes] = []

    def number(self, value: int) -> None:
        """Append an integer from 0 to 2**63 - 1, seven bits a byte, the lowest first."""
        piece = bytearray()
        while value > 0x7F:
            piece.append(value & 0x7F | 0x80)
            value >>= 7
        piece.append(value)
        self._pieces.append(bytes(piece))

    def data(self, array: NDArray[Any]) -> None:
        """Append the elements of a flat array, the lowest byte of each first."""
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        self._pieces.append(np.ascontiguousarray(little).view(np.uint8))

    def tensor(self) -> Tensor:
        """Return everything as one ``uint8`` tensor."""
        return torch.from_numpy(np.frombuffer(bytearray(b"".join(map(bytes, self._pieces))), np.uint8))


class Reader:
    """Reads what :class:`Writer` wrote, refuses what runs past the end, and counts bytes by role.

    Args:
        part: Flat ``uint8`` tensor.
        name: Name of the part, for errors.
    """

    def __init__(self, part: Tensor, name: str = "data") -> None:
        require(part.dtype == torch.uint8 and part.dim() == 1, f"the part {name!r} is no flat uint8 tensor")
        self._data: Bytes = part.numpy()
        self._at = 0
        self.bytes_by_role: dict[str, int] = {}

    def number(self, limit: int, what: str) -> int:
        """Return the next integer, from 0 to ``limit``."""
        value = 0
        for place in range(_LONGEST_VARINT):
            require(self._at < self._data.size, f"{what} is missing")
            byte = int(self._data[self._at])
            self._at += 1
            value |= (byte & 0x7F) << 7 * place
            if byte < 0x80:
                require(value <= limit, f"{what} is {value}, at most {limit} is possible")
                return value
        raise ArtifactError(f"{what} has no end; the file is damaged")

    def data(self, count: int, dtype: str, role: str) -> NDArray[Any]:
        """Return the next ``count`` elements of ``dtype`` (such as ``"u4"``) and count them as ``role``.

        The result is a view of the file where that is possible; nothing is allocated before the size is known to fit.
        """
        little = np.dtype("<" + dtype)
        size = count * little.itemsize
        left = self._data.size - self._at
        require(0 <= size <= left, f"{size} bytes of {role} are declared where {left} are left")
        piece = self._data[self._at : self._at + size]
        self._at += size
        self.bytes_by_role[role] = self.bytes_by_role.get(role, 0) + size
        return np.frombuffer(piece, dtype=little).astype(little.newbyteorder("="), copy=False)

    def close(self) -> None:
        """Refuse bytes that nothing has read."""
        left = self._data.size - self._at
        require(left == 0, f"{left} bytes are left over")
