"""A weight as integers, scales and zero points."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_compress.quantization.affine import along, integer_bounds
from lightning_compress.quantization.nibbles import pack_integers, packed_length, unpack_integers
from lightning_compress.quantization.operators import dequantize_decomposed, dequantize_in_onnx, written_as

PACKED_BITS = 4
"""Integers of up to so many bits share bytes."""


class IntegerTensor(nn.Module):
    """Holds integers; calling it gives the real numbers they stand for, or the operators for it during an export.

    Args:
        shape: Of the tensor.
        bits: Of each integer, 2 to 8.
        symmetric: Signed integers with a zero point of 0; else unsigned ones.
        axis: Dimension with a scale for each index; ``None`` for one scale.

    Attributes:
        values: int8 or uint8 in that shape; of up to four bits, packed into bytes of uint8.
        scale: float32, or the type that the module was moved to, of shape (channels,) or ().
        zero_point: int8 or uint8, of the same shape.

    >>> integers = IntegerTensor((2, 2), bits=4, axis=0)
    >>> q = torch.tensor([[7, -7], [1, 0]], dtype=torch.int8)
    >>> integers.put(q, torch.tensor([0.5, 0.1]), torch.zeros(2))
    >>> integers(), integers.values.numel()
    (tensor([[ 3.5000, -3.5000],
            [ 0.1000,  0.0000]]), 2)
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, shape: tuple[int, ...], bits: int, symmetric: bool = True, axis: int | None = None) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.bits = bits
        self.axis = axis
        self.packed = bits <= PACKED_BITS
        self.dtype = torch.int8 if symmetric else torch.uint8
        channels = () if axis is None else (self.shape[axis],)
        if self.packed:
            values = torch.zeros(packed_length(math.prod(self.shape), bits), dtype=torch.uint8)
        else:
            values = torch.zeros(self.shape, dtype=self.dtype)
        self.register_buffer("values", values)
        self.register_buffer("scale", torch.ones(channels))
        self.register_buffer("zero_point", torch.zeros(channels, dtype=self.dtype))

    def forward(self) -> Tensor:
        """Return the real numbers, in the type of the scale."""
        q, form = self.integers(), written_as()
        if form == "onnx":
            return dequantize_in_onnx(q, self.scale, self.zero_point, self.axis)
        if form == "decomposed":
            bounds = integer_bounds(8, self.dtype == torch.int8, narrow=False)
            return dequantize_decomposed(q, self.scale, self.zero_point, self.axis, bounds)
        scale, zero_point = along(self.scale, q, self.axis), along(self.zero_point, q, self.axis)
        return (q.to(scale.dtype) - zero_point) * scale

    def integers(self) -> Tensor:
        """Return the integers in the tensor's shape."""
        if not self.packed:
            return self.values
        flat = unpack_integers(self.values, self.bits, math.prod(self.shape), self.dtype == torch.int8)
        return flat.reshape(self.shape)

    def count_nonzero(self) -> int | None:
        """Return how many of them stand for a number that is not zero; ``None`` without values (``meta``)."""
        if self.values.is_meta:
            return None
        q = self.integers()
        return int((q != along(self.zero_point, q, self.axis)).sum())

    @torch.no_grad()
    def put(self, q: Tensor, scale: Tensor, zero_point: Tensor) -> None:
        """Store integers in the tensor's shape, with scales and zero points."""
        self.values.copy_(pack_integers(q, self.bits) if self.packed else q)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    def unpack(self) -> None:
        """Give each integer a byte of its own, as exporters need it."""
        self.values, self.packed = self.integers(), False

    def extra_repr(self) -> str:
        """Return what the module shows of itself."""
        return f"{'x'.join(map(str, self.shape))}, {self.bits} bits"
