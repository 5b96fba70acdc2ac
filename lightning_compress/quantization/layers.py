"""Layers that quantize their input and their weight.

A layer becomes one by a change of its class: it stays the same object with the same Parameters under the same keys, and
gains two children.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.verbs import register_kind
from lightning_compress.quantization.build import build_quantizer
from lightning_compress.quantization.calls import convolve, convolve_transposed, embed, embed_bag, linear
from lightning_compress.quantization.quantizer import Quantizer
from lightning_compress.quantization.spec import QuantizerSpec

LayerT = TypeVar("LayerT", bound=nn.Module)


class QuantizedLayer(nn.Module):
    """Mixed into a layer class: ``input_quantizer`` and ``weight_quantizer``, either of which may be ``None``."""

    input_quantizer: nn.Module | None
    weight_quantizer: nn.Module | None
    weight: Tensor

    def quantized_input(self, x: Tensor) -> Tensor:
        """Return the input as the layer uses it."""
        return x if self.input_quantizer is None else self.input_quantizer(x)

    def quantized_weight(self) -> Tensor:
        """Return the weight as the layer uses it."""
        return self.weight if self.weight_quantizer is None else self.weight_quantizer(self.weight)


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """:class:`torch.nn.Linear` with fake-quantized input and weight."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output."""
        return linear(self, self.quantized_input(input), self.quantized_weight())


class _Convolution(QuantizedLayer):
    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output."""
        return convolve(self, self.quantized_input(input), self.quantized_weight())


class QuantizedConv1d(_Convolution, nn.Conv1d):
    """:class:`torch.nn.Conv1d` with fake-quantized input and weight."""


class QuantizedConv2d(_Convolution, nn.Conv2d):
    """:class:`torch.nn.Conv2d` with fake-quantized input and weight."""


class QuantizedConv3d(_Convolution, nn.Conv3d):
    """:class:`torch.nn.Conv3d` with fake-quantized input and weight."""


class _Transposed(QuantizedLayer):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Return the layer's output."""
        return convolve_transposed(self, self.quantized_input(input), self.quantized_weight(), output_size)


class QuantizedConvTranspose1d(_Transposed, nn.ConvTranspose1d):
    """:class:`torch.nn.ConvTranspose1d` with fake-quantized input and weight."""


class QuantizedConvTranspose2d(_Transposed, nn.ConvTranspose2d):
    """:class:`torch.nn.ConvTranspose2d` with fake-quantized input and weight."""


class QuantizedConvTranspose3d(_Transposed, nn.ConvTranspose3d):
    """:class:`torch.nn.ConvTranspose3d` with fake-quantized input and weight."""


class QuantizedEmbedding(QuantizedLayer, nn.Embedding):
    """:class:`torch.nn.Embedding` with a fake-quantized weight."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows that ``input`` names."""
        return embed(self, input, self.quantized_weight())


class QuantizedEmbeddingBag(QuantizedLayer, nn.EmbeddingBag):
    """:class:`torch.nn.EmbeddingBag` with a fake-quantized weight."""

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Return the bags that ``input`` and ``offsets`` name."""
        return embed_bag(self, input, self.quantized_weight(), offsets, per_sample_weights)


CLASSES: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Linear: QuantizedLinear,
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.Conv3d: QuantizedConv3d,
    nn.ConvTranspose1d: QuantizedConvTranspose1d,
    nn.ConvTranspose2d: QuantizedConvTranspose2d,
    nn.ConvTranspose3d: QuantizedConvTranspose3d,
    nn.Embedding: QuantizedEmbedding,
    nn.EmbeddingBag: QuantizedEmbeddingBag,
}
"""The quantized class of each layer class."""


def why_not(layer: nn.Module) -> str:
    """Return why a layer of a supported type cannot be quantized; empty if it can.

    >>> why_not(nn.Embedding(3, 2, max_norm=1.0))
    'renormalizes its own rows (max_norm)'
    """
    dense = dense_class(layer)
    if isinstance(layer, QuantizedLayer):
        return ""
    if dense not in CLASSES:
        return f"{type(layer).__name__} has a forward of its own"
    if getattr(layer, "max_norm", None) is not None:
        return "renormalizes its own rows (max_norm)"
    if getattr(layer, "sparse", False):
        return "has sparse gradients"
    return ""


def dense_class(layer: nn.Module) -> type[nn.Module]:
    """Return the class of a layer without what a parametrization of its tensors puts on top."""
    return type(layer).__bases__[0] if parametrize.is_parametrized(layer) else type(layer)


def channel_axis(layer: nn.Module) -> int:
    """Return the dimension of the weight that counts output channels; a grouped transposed layer has them in groups.

    >>> channel_axis(nn.Conv2d(2, 4, 3)), channel_axis(nn.ConvTranspose2d(2, 4, 3))
    (0, 1)
    """
    return 1 if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d) else 0


def quantize_layer(
    layer: LayerT, weight: Mapping[str, Any] | None = None, input: Mapping[str, Any] | None = None
) -> LayerT:
    """Give a layer its quantizers, in place, and the class that uses them.

    Args:
        layer: Of one of the :data:`CLASSES`; itself or a parametrized one.
        weight: Arguments of the weight's :class:`QuantizerSpec`; ``None`` leaves it float.
        input: Arguments of the input's; ``None`` leaves it float, as it does for embeddings.

    Returns:
        The same object.

    Raises:
        ConfigurationError: If the layer cannot be quantized.

    >>> layer = quantize_layer(nn.Linear(4, 2), {"symmetric": True, "range": "minmax"})
    >>> type(layer).__name__, sorted(layer.state_dict())[:2]
    ('QuantizedLinear', ['bias', 'weight'])
    """
    reason = why_not(layer)
    if reason or isinstance(layer, QuantizedLayer):
        raise ConfigurationError(f"{type(layer).__name__} cannot be quantized: it {reason or 'is quantized already'}")
    axis, like = channel_axis(layer), cast(Tensor, layer.weight)
    with torch.device(like.device):
        weight_quantizer = _build(weight, "weight", axis, like.shape[axis])
        input_quantizer = _build(input, "input")
    _swap_class(layer, CLASSES[dense_class(layer)])
    for name, quantizer in (("weight_quantizer", weight_quantizer), ("input_quantizer", input_quantizer)):
        layer.add_module(name, quantizer if quantizer is None else quantizer.train(layer.training))
    return layer


def _build(
    config: Mapping[str, Any] | None, role: str, axis: int | None = None, size: int | None = None
) -> Quantizer | None:
    return None if config is None else build_quantizer(QuantizerSpec.from_config(config), role, axis, size)


def _swap_class(layer: nn.Module, quantized: type[nn.Module]) -> None:
    """Change the class, below what a parametrization has put on top."""
    if not parametrize.is_parametrized(layer):
        layer.__class__ = quantized
        return
    on_top = type(layer)
    members = {name: value for name, value in vars(on_top).items() if name not in ("__dict__", "__weakref__")}
    layer.__class__ = type(f"Parametrized{quantized.__name__}", (quantized,), members)


register_kind("replace", "quantized")(quantize_layer)
