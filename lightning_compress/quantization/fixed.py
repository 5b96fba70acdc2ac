"""Quantizers for use: a scale and a zero point that never move, and the operators that runtimes know."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_compress.core.verbs import register_kind
from lightning_compress.quantization.affine import fake_quantize, integer_bounds
from lightning_compress.quantization.operators import quantize_decomposed, quantize_in_onnx, written_as


class FixedQuantizer(nn.Module):
    """Rounds what passes to a fixed grid; in ONNX it is a pair of QuantizeLinear and DequantizeLinear.

    Args:
        bits: 2 to 8.
        symmetric: Signed integers around 0; else unsigned ones with a zero point.
        narrow: Whether a signed grid leaves out its most negative integer.

    Attributes:
        scale: float32, of shape ().
        zero_point: int8 or uint8, of shape ().

    >>> quantizer = FixedQuantizer(2)
    >>> _ = quantizer.scale.fill_(0.5)
    >>> quantizer(torch.tensor([-1.0, 0.6, 7.0]))
    tensor([0.0000, 0.5000, 1.5000])
    """

    kind: ClassVar[str] = "fixed_quantizer"
    """Under which a journal knows it."""
    scale: Tensor
    zero_point: Tensor

    def __init__(self, bits: int = 8, symmetric: bool = False, narrow: bool = True) -> None:
        super().__init__()
        self.bits = bits
        self.bounds = integer_bounds(bits, symmetric, narrow)
        self.constants = (1.0, 0)
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int8 if symmetric else torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` on the grid, in its own type."""
        if not x.is_floating_point():
            return x
        form = written_as()
        if form == "onnx":
            return quantize_in_onnx(x, self.scale, self.zero_point, self.bounds)
        if form == "decomposed":
            scale, zero_point = self.constants
            return quantize_decomposed(x, scale, zero_point, self.bounds, self.zero_point.dtype)
        return fake_quantize(x, self.scale, self.zero_point.to(torch.int32), self.bounds)

    def freeze(self) -> None:
        """Read scale and zero point as Python numbers, as some exporters need them."""
        self.constants = float(self.scale), int(self.zero_point)

    def extra_repr(self) -> str:
        """Return what the module shows of itself."""
        return f"{self.bits} bits, {self.bounds[0]}..{self.bounds[1]}"


@register_kind("replace", FixedQuantizer.kind)
def fix_quantizer(quantizer: nn.Module, bits: int, symmetric: bool, narrow: bool = True) -> FixedQuantizer:
    """Return a quantizer with the same grid that never moves.

    Args:
        quantizer: With ``affine()``, as :class:`~lightning_compress.quantization.quantizer.Quantizer` has it.
        bits: Its bits.
        symmetric: Whether its grid is signed.
        narrow: Whether that leaves out the most negative integer.
    """
    affine: Any = quantizer.affine
    scale, zero_point = affine()
    fixed = FixedQuantizer(bits, symmetric, narrow).to(scale.device)
    fixed.scale.copy_(scale.detach())
    fixed.zero_point.copy_(zero_point.detach())
    return fixed


@register_kind("replace", "no_quantizer")
def drop_quantizer(quantizer: nn.Module) -> nn.Module:
    """Return what stands in the place of a quantizer that never quantized."""
    return nn.Identity()
