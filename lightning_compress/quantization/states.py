"""The state of the quantizers of a model in training: when they begin, what averaging does to them, what is saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.core.paths import clean_path
from lightning_compress.quantization.affine import affine_parameters, symmetric_scale
from lightning_compress.quantization.layers import own_quantizers, weight_names, weight_of, weight_quantizers_of
from lightning_compress.quantization.learned_quantizers import LearnedActivation, LearnedWeight
from lightning_compress.quantization.quantizer import ActivationQuantizer, Quantizer, WeightQuantizer


def begin(layer: nn.Module, frozen: bool) -> None:
    """Let a layer's quantizers quantize from now on; activations whose range is unknown begin when it is known.

    Args:
        layer: A quantized layer, or a module with an output quantizer.
        frozen: Whether observed ranges of activations stay as they are from now on.
    """
    for name, quantizer in weight_quantizers_of(layer).items():
        if not quantizer.ready:
            quantizer.take_range(weight_of(layer, name))
    for part in own_quantizers(layer):
        part.enabled = True
        if isinstance(part, ActivationQuantizer) and part.ready and (frozen or part.spec.learned):
            part.observing = False


def estimate(layer: nn.Module) -> None:
    """Let learned ranges of weights that wait for quantization to begin stand where they will begin, once."""
    for name, quantizer in weight_quantizers_of(layer).items():
        if isinstance(quantizer, LearnedWeight) and not quantizer.ready and bool((quantizer.scale == 1).all()):
            quantizer.estimate(weight_of(layer, name))


@torch.no_grad()
def follow(layer: nn.Module, costly: bool) -> None:
    """Let fixed ranges of weights follow the weights: after each step, or where that takes long from time to time."""
    for name, quantizer in weight_quantizers_of(layer).items():
        moves = quantizer.active and quantizer.observing and not quantizer.follows and not quantizer.spec.learned
        if moves and (costly or quantizer.spec.range not in ("percentile", "mse")):
            quantizer.take_range(weight_of(layer, name))


def enforce_state(state_dict: dict[str, Any], layers: Mapping[str, nn.Module]) -> None:
    """Give a ``state_dict`` that may hold averages the flags of the model, and zero points that fit its ranges.

    Args:
        state_dict: Changed in place.
        layers: Quantized layers by clean path.
    """
    keys = {clean_path(key): key for key in state_dict}
    for path, layer in layers.items():
        own = {id(quantizer) for quantizer in own_quantizers(layer)}
        for inner, part in layer.named_modules():
            if id(part) not in own or not isinstance(part, Quantizer):
                continue
            prefix = ".".join(name for name in (path, inner) if name)
            flags = keys.get(f"{prefix}._extra_state")
            if flags is not None:
                state_dict[flags] = part.get_extra_state()
            if isinstance(part, ActivationQuantizer) and part.ready and not part.observer.costly:
                named = {name: keys.get(f"{prefix}.{name}") for name in _RANGE}
                _consistent(part, {name: state_dict[key] for name, key in named.items() if key is not None})


_RANGE = ("scale", "zero_point", "observer.low", "observer.high")


@torch.no_grad()
def _consistent(part: ActivationQuantizer, tensors: Mapping[str, Tensor]) -> None:
    low, high = tensors["observer.low"], tensors["observer.high"]
    if isinstance(part, LearnedActivation):
        tensors["zero_point"].copy_(part.zero_point_in(low, high))
    elif part.spec.symmetric:
        tensors["scale"].copy_(symmetric_scale(torch.maximum(-low, high), part.bounds))
    else:
        scale, zero_point = affine_parameters(low, high, part.bounds)
        tensors["scale"].copy_(scale)
        tensors["zero_point"].copy_(zero_point)


def mean_bits(layers: Mapping[str, nn.Module]) -> float:
    """Return the mean number of bits of a weight; 32 for those that are not quantized.

    >>> from lightning_compress.quantization import quantize_layer
    >>> mean_bits({"a": quantize_layer(nn.Linear(2, 2), {"bits": 4, "symmetric": True, "range": "minmax"})})
    4.0
    """
    total = bits = 0
    for layer in layers.values():
        quantizers = weight_quantizers_of(layer)
        for name in weight_names(layer):
            count, quantizer = weight_of(layer, name).numel(), quantizers.get(name)
            total += count
            bits += count * (quantizer.spec.bits if isinstance(quantizer, WeightQuantizer) else 32)
    return bits / max(1, total)
