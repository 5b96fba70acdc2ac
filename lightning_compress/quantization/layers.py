"""Layers that quantize their input and their weight.

A layer becomes one by a change of its class: it stays the same object with the same Parameters under the same keys, and
gains two children.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_compress.core.companions import Companion
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.verbs import register_kind
from lightning_compress.quantization.build import build_quantizer
from lightning_compress.quantization.calls import convolve, convolve_transposed, embed, embed_bag, linear
from lightning_compress.quantization.quantizer import Quantizer, WeightQuantizer
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

    def companions(self) -> Iterator[Companion]:
        """Return the ranges of the weights' quantizers, where each channel has its own."""
        for name, quantizer in weight_quantizers_of(self).items():
            if quantizer.axis is not None:
                path = f"weight_quantizers.{name}" if isinstance(self, ManyWeights) else "weight_quantizer"
                yield Companion(path, quantizer.channel_tensors(), name, quantizer.axis)


class ManyWeights(QuantizedLayer):
    """Mixed into a layer class with several weights: a quantizer for each, by name, in ``weight_quantizers``."""

    weight_quantizers: nn.ModuleDict

    def quantized(self, name: str) -> Any:
        """Return a parameter by name as the layer uses it; a child's name stands for its weight."""
        held = getattr(self, name)
        value = held.weight if isinstance(held, nn.Module) else held
        return self.weight_quantizers[name](value) if name in self.weight_quantizers else value


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
    'it renormalizes its own rows (max_norm)'
    """
    dense = dense_class(layer)
    if isinstance(layer, QuantizedLayer):
        return ""
    if dense not in CLASSES:
        return "it has a forward of its own"
    if getattr(layer, "max_norm", None) is not None:
        return "it renormalizes its own rows (max_norm)"
    if getattr(layer, "sparse", False):
        return "it has sparse gradients"
    if hasattr(layer, "weight_orig") and hasattr(layer, "weight_u"):  # torch leaves one of its hooks when it is removed
        return "torch.nn.utils.spectral_norm cannot be taken off it; use that of torch.nn.utils.parametrizations"
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
    layer: LayerT,
    weight: Mapping[str, Any] | None = None,
    input: Mapping[str, Any] | None = None,
    key: Mapping[str, Any] | None = None,
    value: Mapping[str, Any] | None = None,
) -> LayerT:
    """Give a layer its quantizers, in place, and the class that uses them.

    Args:
        layer: Of one of the :data:`CLASSES`; itself or a parametrized one.
        weight: Arguments of the weight's :class:`QuantizerSpec`, of each where there are several; ``None`` leaves it
            float.
        input: Arguments of the input's (the queries' of an attention); ``None`` leaves it float.
        key: Of the keys of an attention, where they are not its queries.
        value: Of the values of an attention, where they are neither queries nor keys.

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
        raise ConfigurationError(f"{type(layer).__name__} cannot be quantized: {reason or 'it is quantized already'}")
    quantized = CLASSES[dense_class(layer)]
    names = weight_names(layer)
    children: dict[str, nn.Module | None] = {}
    with torch.device(weight_of(layer, names[0]).device):
        built = {name: _weight(weight, weight_of(layer, name), channel_axis(layer)) for name in names}
        children["input_quantizer"] = _activation(input)
        if isinstance(layer, nn.MultiheadAttention):
            children |= {"key_quantizer": _activation(key), "value_quantizer": _activation(value)}
    if issubclass(quantized, ManyWeights):
        children["weight_quantizers"] = nn.ModuleDict({n: q for n, q in built.items() if q is not None})
    else:
        children["weight_quantizer"] = built["weight"]
    _swap_class(layer, quantized)
    for name, child in children.items():
        layer.add_module(name, child if child is None else child.train(layer.training))
    if isinstance(layer, nn.Linear | nn.MultiheadAttention):
        layer.register_forward_pre_hook(_stay)
    return layer


def weight_names(layer: nn.Module) -> list[str]:
    """Return the names of a layer's weights that are quantized; ``out_proj`` stands for ``out_proj.weight``.

    >>> weight_names(nn.Linear(2, 2)), weight_names(nn.GRU(2, 2))
    (['weight'], ['weight_ih_l0', 'weight_hh_l0'])
    """
    from lightning_compress.quantization.attention import projections_of
    from lightning_compress.quantization.recurrent import recurrent_names

    if isinstance(layer, nn.RNNBase):
        return [name for name in recurrent_names(layer) if name.startswith("weight")]
    return projections_of(layer) if isinstance(layer, nn.MultiheadAttention) else ["weight"]


def weight_of(layer: nn.Module, name: str) -> Tensor:
    """Return a weight by one of :func:`weight_names`."""
    held = getattr(layer, name)
    return cast(Tensor, held.weight if isinstance(held, nn.Module) else held)


def weight_quantizers_of(layer: nn.Module) -> dict[str, WeightQuantizer]:
    """Return the quantizers of a layer's weights, by one of :func:`weight_names`; none for a layer without any."""
    if isinstance(layer, ManyWeights):
        return {name: cast(WeightQuantizer, q) for name, q in layer.weight_quantizers.items()}
    if isinstance(layer, QuantizedLayer) and layer.weight_quantizer is not None:
        return {"weight": cast(WeightQuantizer, layer.weight_quantizer)}
    return {}


def own_quantizers(module: nn.Module) -> list[Quantizer]:
    """Return the quantizers of a module itself: of its weights, of what it takes and of what it returns."""
    children = [part for part in module.children() if isinstance(part, Quantizer)]
    many = list(weight_quantizers_of(module).values()) if isinstance(module, ManyWeights) else []
    return children + cast(list[Quantizer], many)


def _stay(module: nn.Module, args: Any) -> None:
    """Do nothing: a hook keeps ``nn.TransformerEncoderLayer`` from a fast path that takes weights as they are."""


def _weight(config: Mapping[str, Any] | None, weight: Tensor, axis: int) -> Quantizer | None:
    if config is None:
        return None
    return build_quantizer(QuantizerSpec.from_config(config), "weight", axis, weight.shape[axis])


def _activation(config: Mapping[str, Any] | None) -> Quantizer | None:
    return None if config is None else build_quantizer(QuantizerSpec.from_config(config), "input")


def _swap_class(layer: nn.Module, quantized: type[nn.Module]) -> None:
    """Change the class, below what a parametrization has put on top."""
    if not parametrize.is_parametrized(layer):
        layer.__class__ = quantized
        return
    on_top = type(layer)
    members = {name: value for name, value in vars(on_top).items() if name not in ("__dict__", "__weakref__")}
    layer.__class__ = type(f"Parametrized{quantized.__name__}", (quantized,), members)


register_kind("replace", "quantized")(quantize_layer)
