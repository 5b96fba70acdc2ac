"""Layers with integer weights: what a fake-quantized layer becomes after training.

A layer becomes one by a change of its class: it keeps its settings, its hooks and its place; its float weights go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_weight_norm

from lightning_compress.core.copies import own_class
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.verbs import register_kind
from lightning_compress.quantization.attention import QuantizedMultiheadAttention
from lightning_compress.quantization.integer_tensor import IntegerTensor
from lightning_compress.quantization.layers import (
    ManyWeights,
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConv3d,
    QuantizedConvTranspose1d,
    QuantizedConvTranspose2d,
    QuantizedConvTranspose3d,
    QuantizedEmbedding,
    QuantizedEmbeddingBag,
    QuantizedLayer,
    QuantizedLinear,
    weight_of,
    weight_quantizers_of,
)
from lightning_compress.quantization.recurrent import QuantizedGRU, QuantizedLSTM, QuantizedRNN

LayerT = TypeVar("LayerT", bound=nn.Module)

NOT_CUT = "its weights are integers, which are not cut; prune before they become integers"
"""Why structured pruning leaves such layers."""


class IntegerLayer(QuantizedLayer):
    """Mixed into a quantized layer class: ``integer_weight`` stands in the place of its float weight.

    ``weight`` is computed from it whenever it is read.
    """

    not_cut: ClassVar[str] = NOT_CUT
    integer_weight: IntegerTensor

    def quantized_weight(self) -> Tensor:
        """Return the weight as real numbers."""
        return self.integer_weight()


# outside the class: its base annotates `weight` as a Tensor, which a property in the class would not be for mypy
IntegerLayer.weight = property(lambda self: self.integer_weight())  # type: ignore[assignment]


class ManyIntegers(ManyWeights):
    """Mixed into a quantized layer class with several weights: ``integer_weights`` by name."""

    not_cut: ClassVar[str] = NOT_CUT
    integer_weights: nn.ModuleDict

    def quantized(self, name: str) -> Any:
        """Return a parameter by name; an integer weight as real numbers."""
        return self.integer_weights[name]() if name in self.integer_weights else super().quantized(name)


class IntegerLinear(IntegerLayer, QuantizedLinear):
    """:class:`torch.nn.Linear` with integer weights."""


class IntegerConv1d(IntegerLayer, QuantizedConv1d):
    """:class:`torch.nn.Conv1d` with integer weights."""


class IntegerConv2d(IntegerLayer, QuantizedConv2d):
    """:class:`torch.nn.Conv2d` with integer weights."""


class IntegerConv3d(IntegerLayer, QuantizedConv3d):
    """:class:`torch.nn.Conv3d` with integer weights."""


class IntegerConvTranspose1d(IntegerLayer, QuantizedConvTranspose1d):
    """:class:`torch.nn.ConvTranspose1d` with integer weights."""


class IntegerConvTranspose2d(IntegerLayer, QuantizedConvTranspose2d):
    """:class:`torch.nn.ConvTranspose2d` with integer weights."""


class IntegerConvTranspose3d(IntegerLayer, QuantizedConvTranspose3d):
    """:class:`torch.nn.ConvTranspose3d` with integer weights."""


class IntegerEmbedding(IntegerLayer, QuantizedEmbedding):
    """:class:`torch.nn.Embedding` with integer weights."""


class IntegerEmbeddingBag(IntegerLayer, QuantizedEmbeddingBag):
    """:class:`torch.nn.EmbeddingBag` with integer weights."""


class IntegerLSTM(ManyIntegers, QuantizedLSTM):
    """:class:`torch.nn.LSTM` with integer weights."""


class IntegerGRU(ManyIntegers, QuantizedGRU):
    """:class:`torch.nn.GRU` with integer weights."""


class IntegerRNN(ManyIntegers, QuantizedRNN):
    """:class:`torch.nn.RNN` with integer weights."""


class IntegerMultiheadAttention(ManyIntegers, QuantizedMultiheadAttention):
    """:class:`torch.nn.MultiheadAttention` with integer projections."""

    @property
    def in_proj_weight(self) -> Tensor | None:  # type: ignore[override]  # torch has a Parameter or nothing here
        """The weight of the joint projection as real numbers, if there is one."""
        return self.integer_weights["in_proj_weight"]() if "in_proj_weight" in self.integer_weights else None


CLASSES: dict[type[QuantizedLayer], type[QuantizedLayer]] = {
    QuantizedLinear: IntegerLinear,
    QuantizedConv1d: IntegerConv1d,
    QuantizedConv2d: IntegerConv2d,
    QuantizedConv3d: IntegerConv3d,
    QuantizedConvTranspose1d: IntegerConvTranspose1d,
    QuantizedConvTranspose2d: IntegerConvTranspose2d,
    QuantizedConvTranspose3d: IntegerConvTranspose3d,
    QuantizedEmbedding: IntegerEmbedding,
    QuantizedEmbeddingBag: IntegerEmbeddingBag,
    QuantizedLSTM: IntegerLSTM,
    QuantizedGRU: IntegerGRU,
    QuantizedRNN: IntegerRNN,
    QuantizedMultiheadAttention: IntegerMultiheadAttention,
}
"""The integer class of each quantized class."""


def integers_of(layer: nn.Module) -> dict[str, IntegerTensor]:
    """Return the integer weights of one layer by name; none for a layer without any."""
    if isinstance(layer, IntegerLayer):
        return {"weight": layer.integer_weight}
    if isinstance(layer, ManyIntegers):
        return {name: cast(IntegerTensor, module) for name, module in layer.integer_weights.items()}
    return {}


@register_kind("replace", "integer")
def integer_layer(layer: LayerT, weights: Mapping[str, Mapping[str, Any]], bias: bool = False) -> LayerT:
    """Make integers of a quantized layer's weights, in place; values come from its quantizers.

    Args:
        layer: A quantized layer; parametrizations of these weights are merged, torch's hooks on them too.
        weights: Arguments of :class:`IntegerTensor` but its shape, for each weight by name.
        bias: Whether it gets a bias of zeros if it has none, for a batch norm to fold into.

    Returns:
        The same object.

    Raises:
        ConfigurationError: If it is no quantized layer, or has no such weight.
    """
    quantizers: dict[str, Any] = dict(weight_quantizers_of(layer))
    quantized = next((cls for cls in CLASSES if isinstance(layer, cls)), None)
    if quantized is None or not set(weights) <= set(quantizers):
        raise ConfigurationError(
            f"{type(layer).__name__} has quantizers for {sorted(quantizers) or 'no weight'}, not for {sorted(weights)}"
        )
    made = {name: _integers(layer, name, quantizers[name], config) for name, config in weights.items()}
    like = weight_of(layer, next(iter(weights)))
    for name in weights:
        holder, attribute = _holder(layer, name)
        delattr(holder, attribute)
        if isinstance(layer, ManyWeights):
            del layer.weight_quantizers[name]
    layer.__class__ = CLASSES[quantized]  # type: ignore[assignment]  # the object stays, and with it ties and hooks
    if isinstance(layer, ManyWeights):
        layer.add_module("integer_weights", nn.ModuleDict(made))
        layer.to(like.device)  # recurrent layers look up what weights they still have
    else:
        layer.add_module("weight_quantizer", None)
        layer.add_module("integer_weight", made["weight"])
    if bias and layer.bias is None:
        outputs = getattr(layer, "out_channels", getattr(layer, "out_features", 0))
        layer.bias = nn.Parameter(like.new_zeros(outputs), requires_grad=False)
    return layer


def _integers(layer: nn.Module, name: str, quantizer: Any, config: Mapping[str, Any]) -> IntegerTensor:
    holder, attribute = _holder(layer, name)
    if parametrize.is_parametrized(holder, attribute):
        own_class(holder)
        parametrize.remove_parametrizations(holder, attribute, leave_parametrized=True)
    _merge_hooks(holder, attribute)
    weight = weight_of(layer, name).detach()
    with torch.device(weight.device):
        made = IntegerTensor(tuple(weight.shape), **config).to(weight.dtype)
    scale, zero_point = quantizer.affine(weight)
    made.put(quantizer.quantize(weight), scale.expand(made.scale.shape), zero_point.expand(made.scale.shape))
    return made


_HOOKS: tuple[tuple[tuple[str, ...], Callable[[Any, str], Any]], ...] = (
    (("_orig", "_mask"), prune.remove),
    (("_g", "_v"), remove_weight_norm),
)
"""Endings of what torch's own hooks compute a weight from before each pass, and what makes it a parameter again."""


def _merge_hooks(holder: nn.Module, attribute: str) -> None:
    """Take off hooks that would set the weight before each pass."""
    for endings, remove in _HOOKS:
        if all(hasattr(holder, attribute + ending) for ending in endings):
            remove(holder, attribute)


def _holder(layer: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that holds a weight, and under which attribute."""
    held = getattr(layer, name)
    return (held, "weight") if isinstance(held, nn.Module) else (layer, name)


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
    norm.__class__ = FoldedBatchNorm  # type: ignore[assignment]  # the object stays, and with it ties and hooks
    return norm


def integer_tensors(model: nn.Module) -> Iterator[IntegerTensor]:
    """Yield all integer weights inside a model."""
    for module in model.modules():
        if isinstance(module, IntegerTensor):
            yield module
