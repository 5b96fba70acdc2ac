"""From a fake-quantized network to integers: exact, on a copy, and as edits that the journal keeps."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from lightning_compress.core.copies import full_copy
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.journal import Edit
from lightning_compress.core.paths import get_layer, named_layers
from lightning_compress.core.verbs import apply
from lightning_compress.quantization.affine import BITS, along
from lightning_compress.quantization.fixed import FixedQuantizer
from lightning_compress.quantization.fixed_point.layers import has_fixed_point
from lightning_compress.quantization.graph import BATCH_NORMS
from lightning_compress.quantization.integer import IntegerLayer, integers_of
from lightning_compress.quantization.integer_tensor import IntegerTensor
from lightning_compress.quantization.layers import channel_axis, weight_of, weight_quantizers_of
from lightning_compress.quantization.placement import READ, place_quantizers
from lightning_compress.quantization.quantizer import Quantizer, WeightQuantizer

ModelT = TypeVar("ModelT", bound=nn.Module)


@dataclass
class Conversion:
    """What became of a network.

    Args:
        integers: Paths of the layers with integer weights -> bits.
        folded: Path of each batch norm that is gone -> path of the layer that took it in.
        left: What stays float, by path, and why.
    """

    integers: dict[str, int] = field(default_factory=dict)
    folded: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


def convert(model: ModelT, example_inputs: Any = None, inplace: bool = False) -> ModelT:
    r"""Return a fake-quantized network with integer weights in place of float ones, and batch norms folded.

    With :math:`w = q\,s` (a scale for each channel), a batch norm after the layer changes scale and bias only, and the
    sign of the integers where :math:`\gamma < 0`:

    .. math:: q' = \mathrm{sign}(\gamma)\, q,\qquad s' = s\, |\gamma| / \sqrt{v + \epsilon},\qquad
              b' = \beta + (b - \mu)\, \gamma / \sqrt{v + \epsilon}

    so the outputs are those of the fake-quantized network in evaluation mode, up to float rounding (which may move a
    value to the next integer of the quantizer behind it). Where a function of the network reads a layer's weight by
    itself (``F.linear(x, self.fc.weight.t())``), it gets what the integers say, with a warning. Integers of up to four
    bits are packed into bytes.

    Args:
        model: With quantized layers, as QuantizationAwareTraining or PostTrainingQuantization leaves it.
        example_inputs: One batch, to trace networks that ``torch.fx`` cannot trace; without them their batch norms
            stay.
        inplace: Change ``model`` itself instead of a copy.

    Returns:
        The network in integers. ``save_compressed`` stores its integers as they are; ``export`` writes it for runtimes.

    Raises:
        ConfigurationError: If ``model`` is no module, or nothing in it is quantized.
    """
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"`model` must be a torch.nn.Module with quantized layers, got {type(model).__name__}")
    converted = model if inplace else cast(ModelT, full_copy(model))
    convert_in_place(converted, example_inputs)
    return converted


def is_quantized(model: nn.Module) -> bool:
    """Return whether a network has quantizers that :func:`convert` would turn into integers."""
    return any(isinstance(part, Quantizer) for part in model.modules())


@torch.no_grad()
def convert_in_place(model: nn.Module, example_inputs: Any = None) -> Conversion:
    """Do what :func:`convert` does to ``model`` itself, and return what was done."""
    done = Conversion()
    layers = {path: layer for path, layer in named_layers(model).items() if _quantizers(layer)}
    if not is_quantized(model):
        raise ConfigurationError(
            "`model` has no quantized layer; train it with QuantizationAwareTraining, or quantize it with "
            "compress(model, PostTrainingQuantization(...)), before it can become integers"
        )
    folds = _foldable(model, layers, example_inputs, done)
    weights = {path: {name: weight_of(layer, name) for name in _quantizers(layer)} for path, layer in layers.items()}
    for path, layer in layers.items():
        done.integers[path] = max(quantizer.spec.bits for quantizer in _quantizers(layer).values())
        apply(model, Edit("replace", path, "integer", _config(layer, path in folds.values())))
    for norm, path in folds.items():
        fold_batch_norm(cast(IntegerLayer, get_layer(model, path)), get_layer(model, norm))
        apply(model, Edit("replace", norm, "folded"))
        done.folded[norm] = path
    _share_ties(model, weights)
    _fix_the_rest(model, done)
    return done


def fold_batch_norm(layer: IntegerLayer, norm: nn.Module) -> None:
    """Take a batch norm's evaluation into the scales, signs and the bias of the layer before it, in float64.

    Args:
        layer: With a bias, and a scale for each output channel.
        norm: With running statistics.

    >>> from lightning_compress.quantization.integer import integer_layer
    >>> from lightning_compress.quantization.layers import quantize_layer
    >>> layer, norm = nn.Conv1d(1, 1, 1, bias=False), nn.BatchNorm1d(1, eps=0.0).eval()
    >>> _ = layer.weight.data.fill_(2.0), norm.weight.data.fill_(-3.0), norm.bias.data.fill_(1.0)
    >>> _ = quantize_layer(layer, {"symmetric": True, "per_channel": True, "range": "minmax"})
    >>> layer.weight_quantizer.take_range(layer.weight)
    >>> integer = integer_layer(layer, {"weight": {"bits": 8, "axis": 0}}, bias=True)
    >>> fold_batch_norm(integer, norm)
    >>> integer.integer_weight.values.item(), round(integer.weight.item(), 4), integer.bias.item()
    (-127, -6.0, 1.0)
    """
    factor, shift = _affine_of(norm)
    held = layer.integer_weight
    q, zero_point = held.integers(), held.zero_point
    signs = torch.sign(factor)  # a channel that gamma silences gets integers of 0
    offsets = q.to(torch.int16) - along(zero_point, q, held.axis).to(torch.int16)
    if held.dtype == torch.uint8:
        zero_point = torch.where(factor < 0, 2**held.bits - 1 - zero_point, zero_point)
    turned = offsets * along(signs, q, held.axis).to(torch.int16) + along(zero_point, q, held.axis).to(torch.int16)
    scale = torch.where(factor == 0, 1.0, factor.abs()) * held.scale.double()
    held.put(turned.to(held.dtype), scale, zero_point)
    bias = cast(Tensor, layer.bias)
    bias.copy_(bias.double() * factor + shift)


def _affine_of(norm: Any) -> tuple[Tensor, Tensor]:
    """Return factor and shift of a batch norm in evaluation mode, in float64."""
    factor = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    shift = -norm.running_mean.double() * factor
    return factor, shift if norm.bias is None else shift + norm.bias.double()


def _quantizers(layer: nn.Module) -> dict[str, WeightQuantizer]:
    """Return the quantizers of a layer's weights that quantize to what a byte can hold, by name."""
    found = weight_quantizers_of(layer).items()
    return {name: quantizer for name, quantizer in found if quantizer.active and _bits(quantizer) <= BITS[1]}


def _bits(quantizer: WeightQuantizer) -> int:
    """Return how many bits the integers need; DoReFa's grid without a zero has odd ones of twice the size."""
    doubled = quantizer.spec.range == "dorefa" and not quantizer.spec.narrow
    return quantizer.spec.bits + doubled


def _config(layer: nn.Module, folds: bool) -> dict[str, Any]:
    """Return the configuration of the kind ``integer``: whatever is not the default."""
    weights: dict[str, dict[str, Any]] = {}
    for name, quantizer in _quantizers(layer).items():
        spec = quantizer.spec
        weights[name] = {"bits": _bits(quantizer)} | ({} if spec.symmetric else {"symmetric": False})
        if folds or spec.per_channel:
            weights[name]["axis"] = channel_axis(layer)
    return {"weights": weights} | ({"bias": True} if folds else {})


def _foldable(model: nn.Module, layers: dict[str, Any], example_inputs: Any, done: Conversion) -> dict[str, str]:
    """Return the batch norms to fold, and note why others stay."""
    known = named_layers(model)
    norms = [path for path, module in known.items() if isinstance(module, BATCH_NORMS)]
    placement = place_quantizers(model, (), example_inputs)
    folds = dict(placement.folds)
    _note_reads([path for path in placement.reads if path in layers], done)
    for path in norms:
        layer = known.get(folds.get(path, ""))
        reason = _why_not_folded(known[path], layer, folds.get(path, "") in layers)
        if reason:
            folds.pop(path, None)
            done.left[path] = reason
    return folds


def _note_reads(paths: list[str], done: Conversion) -> None:
    """Say where integers change what a function of the network computes with a weight."""
    done.left |= {f"{path}.weight": READ for path in paths}
    if paths:
        warnings.warn(
            f"the weight of {', '.join(map(repr, paths))} is also read by a function of the network, where it was real "
            "numbers in training and is what the integers say now: the outputs are not exactly those of the "
            "fake-quantized network. Use the layer itself there, or exclude it from quantization",
            stacklevel=2,
        )


def _why_not_folded(norm: Any, layer: Any, quantized: bool) -> str:
    if layer is None:
        return "no convolution or linear layer stands alone before it"
    if not quantized:
        return "the layer before it keeps float weights"
    if norm.running_mean is None:
        return "it has no running statistics"
    if getattr(layer, "output_quantizer", None) is not None:
        return "the output of the layer before it is quantized"
    if has_fixed_point(layer):
        return "the output of the layer before it is rounded to fixed point"
    if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d) and layer.groups > 1:
        return "a grouped transposed convolution has one scale for several channels"
    quantizer = layer.weight_quantizer
    if quantizer.spec.symmetric and not quantizer.spec.narrow and norm.weight is not None and (norm.weight < 0).any():
        return "a negative gamma would mirror the most negative integer; quantize with narrow=True"
    return ""


def _share_ties(model: nn.Module, weights: dict[str, dict[str, Tensor]]) -> None:
    """Let layers that shared one weight share its integers, as long as nothing was folded into one of them alone."""
    first: dict[int, IntegerTensor] = {}
    for path, by_name in weights.items():
        held = integers_of(get_layer(model, path))
        for name, weight in by_name.items():
            mine, other = held[name], first.setdefault(id(weight), held[name])
            pairs = [(getattr(other, key), getattr(mine, key)) for key in ("values", "scale", "zero_point")]
            if other is not mine and all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs):
                mine.values, mine.scale, mine.zero_point = other.values, other.scale, other.zero_point


def _fix_the_rest(model: nn.Module, done: Conversion) -> None:
    """Let quantizers of activations stand still, and drop those that do nothing."""
    rest = {path: module for path, module in named_layers(model).items() if isinstance(module, Quantizer)}
    for path, quantizer in rest.items():
        spec = quantizer.spec
        if quantizer.active and not isinstance(quantizer, WeightQuantizer):
            config = {"bits": spec.bits, "symmetric": spec.symmetric}
            config |= {} if spec.narrow or not spec.symmetric else {"narrow": False}
            apply(model, Edit("replace", path, FixedQuantizer.kind, config))
        else:
            done.left[path] = "no integers hold its grid" if quantizer.active else "it saw no data, or is switched off"
            apply(model, Edit("replace", path, "no_quantizer"))
