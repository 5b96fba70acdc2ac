"""Layers with integer weights: what a fake-quantized layer becomes after training.

A layer becomes one by a change of its class: it keeps its settings, its hooks and its place; its float weight is gone.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.verbs import register_kind
from lightning_compress.quantization.affine import along, integer_bounds
from lightning_compress.quantization.calls import convolve, convolve_transposed, embed, embed_bag, linear
from lightning_compress.quantization.nibbles import pack_integers, packed_length, unpack_integers
from lightning_compress.quantization.operators import dequantize_decomposed, dequantize_in_onnx, written_as

LayerT = TypeVar("LayerT", bound=nn.Module)


class IntegerLayer(nn.Module):
    """Mixed into a layer class: integers and scales stand in the place of its float weight.

    ``weight`` is computed from them whenever it is read; in ONNX it is a DequantizeLinear of the stored integers.

    Attributes:
        weight_int: int8 or uint8 in the shape of the weight; up to four bits packed into bytes of uint8.
        weight_scale: float32, one value for each output channel, or of shape ().
        weight_zero_point: Of the integers' type and the shape of ``weight_scale``.
        bias: float, as it was, or made by folding a batch norm.
    """

    input_quantizer: nn.Module | None
    weight_int: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    weight_bits: int
    weight_axis: int
    weight_shape: tuple[int, ...]
    weight_packed: bool
    weight: Tensor

    def integer_weight(self) -> Tensor:
        """Return the integers in the shape of the weight, as int8 or uint8."""
        if not self.weight_packed:
            return self.weight_int
        signed = self.weight_zero_point.dtype == torch.int8
        return unpack_integers(self.weight_int, self.weight_bits, math.prod(self.weight_shape), signed).reshape(
            self.weight_shape
        )

    def weight_like(self, x: Tensor) -> Tensor:
        """Return the weight in the type of ``x``."""
        weight = self.weight
        return weight.to(x.dtype) if x.is_floating_point() else weight

    def received(self, x: Tensor) -> Tensor:
        """Return the input as the layer uses it."""
        return x if self.input_quantizer is None else self.input_quantizer(x)

    def set_integers(self, q: Tensor, scale: Tensor, zero_point: Tensor) -> None:
        """Store integers in the weight's shape, with their scales and zero points."""
        with torch.no_grad():
            self.weight_int.copy_(pack_integers(q, self.weight_bits) if self.weight_packed else q)
            self.weight_scale.copy_(scale)
            self.weight_zero_point.copy_(zero_point)

    def unpack(self) -> None:
        """Store integers of few bits in bytes of their own, as exporters need them."""
        if self.weight_packed:
            q = self.integer_weight()
            self.weight_packed = False
            self.weight_int = q

    def extra_repr(self) -> str:
        """Return what the module shows of itself."""
        return f"{super().extra_repr()}, weight of {self.weight_bits} bits"


def real_weight(self: IntegerLayer) -> Tensor:
    """Return the weight as real numbers, or the operators for it while a network is exported."""
    q = self.integer_weight()
    form = written_as()
    if form == "onnx":
        return dequantize_in_onnx(q, self.weight_scale, self.weight_zero_point, self.weight_axis)
    if form == "decomposed":
        bounds = integer_bounds(8, q.dtype == torch.int8, narrow=False)
        return dequantize_decomposed(q, self.weight_scale, self.weight_zero_point, self.weight_axis, bounds)
    axis = self.weight_axis if self.weight_scale.dim() else None
    scale, zero_point = along(self.weight_scale, q, axis), along(self.weight_zero_point, q, axis)
    return (q.to(scale.dtype) - zero_point) * scale


IntegerLayer.weight = property(real_weight)  # type: ignore[assignment]


class IntegerLinear(IntegerLayer, nn.Linear):
    """:class:`torch.nn.Linear` with integer weights."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output."""
        x = self.received(input)
        return linear(self, x, self.weight_like(x))


class _Convolution(IntegerLayer):
    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output."""
        x = self.received(input)
        return convolve(self, x, self.weight_like(x))


class IntegerConv1d(_Convolution, nn.Conv1d):
    """:class:`torch.nn.Conv1d` with integer weights."""


class IntegerConv2d(_Convolution, nn.Conv2d):
    """:class:`torch.nn.Conv2d` with integer weights."""


class IntegerConv3d(_Convolution, nn.Conv3d):
    """:class:`torch.nn.Conv3d` with integer weights."""


class _Transposed(IntegerLayer):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Return the layer's output."""
        x = self.received(input)
        return convolve_transposed(self, x, self.weight_like(x), output_size)


class IntegerConvTranspose1d(_Transposed, nn.ConvTranspose1d):
    """:class:`torch.nn.ConvTranspose1d` with integer weights."""


class IntegerConvTranspose2d(_Transposed, nn.ConvTranspose2d):
    """:class:`torch.nn.ConvTranspose2d` with integer weights."""


class IntegerConvTranspose3d(_Transposed, nn.ConvTranspose3d):
    """:class:`torch.nn.ConvTranspose3d` with integer weights."""


class IntegerEmbedding(IntegerLayer, nn.Embedding):
    """:class:`torch.nn.Embedding` with integer weights."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows that ``input`` names."""
        return embed(self, input, self.weight)


class IntegerEmbeddingBag(IntegerLayer, nn.EmbeddingBag):
    """:class:`torch.nn.EmbeddingBag` with integer weights."""

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Return the bags that ``input`` and ``offsets`` name."""
        return embed_bag(self, input, self.weight, offsets, per_sample_weights)


CLASSES: dict[type[nn.Module], type[IntegerLayer]] = {
    nn.Linear: IntegerLinear,
    nn.Conv1d: IntegerConv1d,
    nn.Conv2d: IntegerConv2d,
    nn.Conv3d: IntegerConv3d,
    nn.ConvTranspose1d: IntegerConvTranspose1d,
    nn.ConvTranspose2d: IntegerConvTranspose2d,
    nn.ConvTranspose3d: IntegerConvTranspose3d,
    nn.Embedding: IntegerEmbedding,
    nn.EmbeddingBag: IntegerEmbeddingBag,
}
"""The integer class of each layer class."""


@register_kind("replace", "integer")
def integer_layer(
    layer: LayerT, bits: int, symmetric: bool = True, axis: int = 0, per_channel: bool = True, bias: bool = False
) -> LayerT:
    """Make integers of a quantized layer's weight, in place; values come from its ``weight_quantizer``.

    Args:
        layer: A quantized layer; parametrizations of its weight are merged.
        bits: Of the integers, 2 to 8; up to four are packed into bytes.
        symmetric: Signed integers with a zero point of 0; else unsigned ones.
        axis: Dimension of the output channels.
        per_channel: A scale for each of them; else one.
        bias: Whether it gets a bias of zeros if it has none, for a batch norm to fold into.

    Returns:
        The same object.

    Raises:
        ConfigurationError: If it is no quantized layer.
    """
    quantizer: Any = getattr(layer, "weight_quantizer", None)
    kind = next((cls for cls in CLASSES if isinstance(layer, cls)), None)
    if quantizer is None or kind is None:
        raise ConfigurationError(f"{type(layer).__name__} has no `weight_quantizer`, so it cannot become integers")
    if parametrize.is_parametrized(layer, "weight"):
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    weight = cast(Tensor, layer.weight).detach()
    scale, zero_point = quantizer.affine(weight)
    q = quantizer.quantize(weight)
    del layer.weight, layer.weight_quantizer
    layer.__class__ = CLASSES[kind]  # type: ignore[assignment]
    integer = cast(IntegerLayer, layer)
    integer.weight_bits, integer.weight_axis = bits, axis
    integer.weight_shape, integer.weight_packed = tuple(weight.shape), bits <= 4
    dtype, length = torch.int8 if symmetric else torch.uint8, packed_length(weight.numel(), bits)
    stored = q.new_zeros(length, dtype=torch.uint8) if integer.weight_packed else q.new_zeros(q.shape, dtype=dtype)
    channels = (weight.shape[axis],) if per_channel else ()
    integer.register_buffer("weight_int", stored)
    integer.register_buffer("weight_scale", scale.new_ones(channels, dtype=torch.float32))
    integer.register_buffer("weight_zero_point", torch.zeros(channels, dtype=dtype, device=weight.device))
    integer.set_integers(q, scale.expand(channels), zero_point.expand(channels))
    if bias and layer.bias is None:
        outputs = getattr(layer, "out_channels", getattr(layer, "out_features", 0))
        layer.bias = nn.Parameter(weight.new_zeros(outputs), requires_grad=False)  # type: ignore[assignment]
    return layer


class FoldedBatchNorm(nn.Module):
    """What is left of a batch norm that was folded into the layer before it: nothing but its hooks."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the input."""
        return input


@register_kind("replace", "folded")
def fold_away(norm: LayerT) -> LayerT:
    """Let a batch norm pass its input on, in place.

    >>> norm = fold_away(nn.BatchNorm2d(2))
    >>> len(norm.state_dict()), norm(torch.ones(1)).item()
    (0, 1.0)
    """
    for name, _ in [*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False)]:
        delattr(norm, name)
    norm.__class__ = FoldedBatchNorm  # type: ignore[assignment]
    return norm
