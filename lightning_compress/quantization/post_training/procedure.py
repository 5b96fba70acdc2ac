"""Post-training quantization of a whole model, step by step, in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.hessians import collect_hessians
from lightning_compress.core.inputs import inputs_of as arguments_of
from lightning_compress.core.paths import named_layers
from lightning_compress.core.verbs import apply
from lightning_compress.quantization.choice import Choice
from lightning_compress.quantization.graph import CONVOLUTIONS as ALL_CONVOLUTIONS
from lightning_compress.quantization.layers import weight_of, weight_quantizers_of
from lightning_compress.quantization.placement import place_quantizers
from lightning_compress.quantization.post_training.adaround import ada_round
from lightning_compress.quantization.post_training.bias import bias_shifts, output_means, shift_output
from lightning_compress.quantization.post_training.calibrate import calibrate_activations, calibrated_sites
from lightning_compress.quantization.post_training.chains import find_pairs
from lightning_compress.quantization.post_training.equalization import equalize
from lightning_compress.quantization.post_training.layerwise import (
    MOST_INPUTS,
    grid_of,
    inputs_of,
    plain_layers,
    portions,
    rows_of,
)
from lightning_compress.quantization.post_training.rounding import gptq_fit, without_bias
from lightning_compress.quantization.post_training.steps import PostTrainingSteps
from lightning_compress.quantization.preparation import prepare_edits

_FEW = 16
"""Values of a grid up to which scales are fitted to what was rounded; beyond, nothing is gained."""
_SWEEPS = 3


@torch.no_grad()
def quantize_trained(
    model: nn.Module, choice: Choice, steps: PostTrainingSteps, batches: Sequence[Any]
) -> dict[str, str]:
    """Quantize a trained model in place: equalize, calibrate, round, correct biases.

    Args:
        model: Not quantized yet.
        choice: What is quantized, from :func:`~lightning_compress.quantization.choice.choose_quantized`.
        steps: Which steps are taken.
        batches: Calibration data, read several times.

    Returns:
        What stays float or was left out, by path, and why.
    """
    known = named_layers(model)
    left = dict(choice.sites.left)
    if steps.equalize:
        left |= equalize_layers(model, choice, batches)
    plain = plain_layers(model, known, _quantized_paths(choice))
    folds = {layer: norm for norm, layer in place_quantizers(model, (), example_of(model, batches)).folds.items()}
    summed = summed_layers(model, choice)
    wanted = output_means(model, summed, batches)
    sites, specs = calibrated_sites(choice.sites)
    for edit in list(prepare_edits(known, choice.assigned, sites, choice.encoders)):
        apply(model, edit)
    left |= dict.fromkeys(calibrate_activations(model, batches, specs), "it has seen no data")
    for path in choice.assigned:
        for name, quantizer in weight_quantizers_of(known[path]).items():
            quantizer.take_range(weight_of(known[path], name))
    called = {path: layer for path, layer in plain.items() if path in wanted}
    left |= _round(model, called, steps, batches)
    for path in choice.assigned:
        _settle(known[path])
    if steps.correct_bias:
        shifts = bias_shifts(model, summed, wanted, batches)
        for path, shift in shifts.items():
            if not shift_output(summed[path], known.get(folds.get(path, "")), shift):
                left[path] = "its mean output is not corrected, as neither it nor a batch norm behind it has a bias"
    return left


def equalize_layers(model: nn.Module, choice: Choice, batches: Sequence[Any]) -> dict[str, str]:
    """Move scales between consecutive layers of which one has a single scale for its weight, in place.

    Returns:
        Why a pair was left as it was, by the path of its second layer.
    """
    known = named_layers(model)
    plain = plain_layers(model, known, _quantized_paths(choice))
    pairs = find_pairs(model, list(plain), example_of(model, batches))
    return equalize(model, known, [pair for pair in pairs if _worth(pair.first, pair.second, choice)], batches[0])


def summed_layers(model: nn.Module, choice: Choice) -> dict[str, nn.Module]:
    """Return the layers of a choice that compute sums of products, by path."""
    known = named_layers(model)
    return {p: known[p] for p in choice.assigned if isinstance(known[p], (nn.Linear, *ALL_CONVOLUTIONS))}


def example_of(model: nn.Module, batches: Sequence[Any]) -> Any:
    """Return the inputs of the first batch: positional ones, or a mapping of keywords."""
    return arguments_of(model, batches[0])


def _quantized_paths(choice: Choice) -> list[str]:
    return [path for path, given in choice.assigned.items() if given.weights is not None]


def _worth(first: str, second: str, choice: Choice) -> bool:
    """Return whether one of two layers has a single scale for its weight."""
    specs = [choice.assigned[path].weights for path in (first, second)]
    return any(spec is not None and not spec.per_channel for spec in specs)


def _settle(layer: nn.Module) -> None:
    """Let a layer's quantizers quantize, and put weights that are not on their grids yet there: files get small."""
    for name, quantizer in weight_quantizers_of(layer).items():
        quantizer.enabled = True
        weight = weight_of(layer, name)
        if isinstance(weight, nn.Parameter) and not parametrize.is_parametrized(layer):
            weight.data.copy_(quantizer(weight))


def _round(
    model: nn.Module, layers: Mapping[str, nn.Module], steps: PostTrainingSteps, batches: Sequence[Any]
) -> dict[str, str]:
    """Put the weights of plain layers onto their grids, in the order they were registered."""
    left: dict[str, str] = {}
    for part in portions(layers) if steps.rounding != "nearest" else [dict(layers)]:
        small = {path: layer for path, layer in part.items() if inputs_of(layer) <= MOST_INPUTS}
        hessians = collect_hessians(model, small, batches) if steps.rounding != "nearest" else {}
        for path, layer in part.items():
            if path not in hessians:
                _put(layer, grid_of(layer, 1).nearest(rows_of(layer, 1)[0])[None])
                if steps.rounding != "nearest":
                    left[path] = f"rounded to nearest: {inputs_of(layer)} inputs are too many for a Hessian"
                continue
            try:
                _round_layer(layer, hessians.pop(path), steps)
            except ConfigurationError:
                _put(layer, grid_of(layer, 1).nearest(rows_of(layer, 1)[0])[None])
                left[path] = "rounded to nearest: its inputs on the calibration batches are all zero or not finite"
            cast(Any, layer).weight_quantizer.enabled = True
    return left


def _round_layer(layer: nn.Module, hessian: Tensor, steps: PostTrainingSteps) -> None:
    bias, rows = getattr(layer, "bias", None), rows_of(layer, len(hessian))
    means = None
    if bias is not None:
        hessian, means = without_bias(hessian)
    quantizer = cast(Any, layer).weight_quantizer
    fits = quantizer.scale.dim() > 0 and quantizer.bounds[1] - quantizer.bounds[0] < _FEW
    rounded = []
    for group, (old, curvature) in enumerate(zip(rows, hessian, strict=True)):
        grid = grid_of(layer, len(rows), group)
        if steps.rounding == "gptq":
            rounded.append(gptq_fit(old, curvature, grid, steps.damping, _SWEEPS if fits else 0))
        else:
            rounded.append((ada_round(old, curvature, grid, steps.damping, steps.iterations), grid))
    new = torch.stack([values for values, _ in rounded])
    if fits:
        quantizer.scale.copy_(torch.cat([grid.scale for _, grid in rounded]).flatten())
    if bias is not None and means is not None:
        bias.data.add_(((rows - new) @ means[:, :, None]).flatten().to(bias.dtype))
    _put(layer, new)


def _put(layer: nn.Module, rows: Tensor) -> None:
    weight = cast(Tensor, layer.weight)
    weight.data.copy_(rows.reshape(weight.shape))
