"""Post-training quantization of a whole model, step by step, in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.hessians import collect_hessians
from lightning_compress.core.patches import CONVOLUTIONS
from lightning_compress.core.paths import named_layers
from lightning_compress.core.targets import find_targets
from lightning_compress.core.verbs import apply
from lightning_compress.quantization.choice import Choice
from lightning_compress.quantization.graph import CONVOLUTIONS as ALL_CONVOLUTIONS
from lightning_compress.quantization.layers import weight_of, weight_quantizers_of
from lightning_compress.quantization.placement import place_quantizers
from lightning_compress.quantization.post_training.adaround import ada_round
from lightning_compress.quantization.post_training.bias import bias_shifts, output_means, shift_output
from lightning_compress.quantization.post_training.calibrate import calibrate_activations
from lightning_compress.quantization.post_training.chains import find_pairs
from lightning_compress.quantization.post_training.equalization import equalize
from lightning_compress.quantization.post_training.rounding import Grid, gptq_round, without_bias
from lightning_compress.quantization.post_training.steps import PostTrainingSteps
from lightning_compress.quantization.preparation import prepare_edits

_MOST_INPUTS = 8192
"""Inputs of a layer beyond which its Hessian takes too much memory."""
_MEMORY = 2**30
"""Bytes of Hessians that are held at a time."""


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
    plain = _plain_layers(model, known, choice)
    left = dict(choice.sites.left)
    if steps.equalize:
        paths = [path for path in plain if choice.assigned[path].weights is not None]
        pairs = [
            pair for pair in find_pairs(model, paths, _example(batches)) if _worth(pair.first, pair.second, choice)
        ]
        left |= equalize(model, known, pairs, batches[0])
    folds = {layer: norm for norm, layer in place_quantizers(model, (), _example(batches)).folds.items()}
    summed = {p: known[p] for p in choice.assigned if isinstance(known[p], (nn.Linear, *ALL_CONVOLUTIONS))}
    wanted = output_means(model, summed, batches)
    for edit in list(prepare_edits(known, choice.assigned, choice.sites, choice.encoders)):
        apply(model, edit)
    left |= dict.fromkeys(calibrate_activations(model, batches), "it has seen no data")
    for path in choice.assigned:
        for name, quantizer in weight_quantizers_of(known[path]).items():
            quantizer.take_range(weight_of(known[path], name))
    called = {path: layer for path, layer in plain.items() if path in wanted}
    left |= _round(model, called, steps, batches)
    for path in choice.assigned:
        for quantizer in weight_quantizers_of(known[path]).values():
            quantizer.enabled = True
    if steps.correct_bias:
        shifts = bias_shifts(model, summed, wanted, batches)
        for path, shift in shifts.items():
            if not shift_output(summed[path], known.get(folds.get(path, "")), shift):
                left[path] = "its mean output is not corrected, as neither it nor a batch norm behind it has a bias"
    return left


def _plain_layers(model: nn.Module, known: Mapping[str, nn.Module], choice: Choice) -> dict[str, nn.Module]:
    """Return the layers whose weight is theirs alone, and which a Hessian describes."""
    chosen = {
        path: known[path]
        for path, given in choice.assigned.items()
        if given.weights is not None
        and isinstance(known[path], (nn.Linear, *CONVOLUTIONS))
        and not parametrize.is_parametrized(known[path])
    }
    targets, _ = find_targets(model, chosen)
    return {target.layer: chosen[target.layer] for target in targets if not target.tied}


def _worth(first: str, second: str, choice: Choice) -> bool:
    """Return whether one of two layers has a single scale for its weight."""
    specs = [choice.assigned[path].weights for path in (first, second)]
    return any(spec is not None and not spec.per_channel for spec in specs)


def _example(batches: Sequence[Any]) -> Any:
    return batches[0][0] if isinstance(batches[0], list | tuple) else batches[0]


def _round(
    model: nn.Module, layers: Mapping[str, nn.Module], steps: PostTrainingSteps, batches: Sequence[Any]
) -> dict[str, str]:
    """Put the weights of plain layers onto their grids, in the order they were registered."""
    left: dict[str, str] = {}
    for part in _portions(layers) if steps.rounding != "nearest" else [dict(layers)]:
        small = {path: layer for path, layer in part.items() if _inputs(layer) <= _MOST_INPUTS}
        hessians = collect_hessians(model, small, batches) if steps.rounding != "nearest" else {}
        for path, layer in part.items():
            if path not in hessians:
                _put(layer, _grid(layer, 1).nearest(_rows(layer, 1)[0])[None])
                if steps.rounding != "nearest":
                    left[path] = f"rounded to nearest: {_inputs(layer)} inputs are too many for a Hessian"
                continue
            try:
                _round_layer(layer, hessians.pop(path), steps)
            except ConfigurationError:
                _put(layer, _grid(layer, 1).nearest(_rows(layer, 1)[0])[None])
                left[path] = "rounded to nearest: its inputs on the calibration batches are all zero or not finite"
            cast(Any, layer).weight_quantizer.enabled = True
    return left


def _portions(layers: Mapping[str, nn.Module]) -> list[dict[str, nn.Module]]:
    """Divide layers so that the Hessians of each part fit into memory."""
    parts: list[dict[str, nn.Module]] = [{}]
    used = 0
    for path, layer in layers.items():
        size = 8 * getattr(layer, "groups", 1) * (_inputs(layer) + 1) ** 2
        if parts[-1] and used + size > _MEMORY:
            parts.append({})
            used = 0
        parts[-1][path] = layer
        used += size
    return parts


def _inputs(layer: nn.Module) -> int:
    return cast(Tensor, layer.weight)[0].numel()


def _rows(layer: nn.Module, groups: int) -> Tensor:
    """Return a weight as (groups, rows, inputs)."""
    weight = cast(Tensor, layer.weight).detach()
    return weight.reshape(groups, len(weight) // groups, -1)


def _grid(layer: nn.Module, groups: int, group: int = 0) -> Grid:
    """Return the grid of the rows of one group."""
    quantizer = cast(Any, layer).weight_quantizer
    count = len(cast(Tensor, layer.weight)) // groups
    scale, zero_point = quantizer.affine()
    mine = slice(group * count, (group + 1) * count)
    scale, zero_point = (
        value.reshape(-1, 1)[mine] if value.dim() else value.reshape(1, 1) for value in (scale, zero_point)
    )
    return Grid(scale, zero_point, quantizer.bounds)


def _round_layer(layer: nn.Module, hessian: Tensor, steps: PostTrainingSteps) -> None:
    bias, rows = getattr(layer, "bias", None), _rows(layer, len(hessian))
    means = None
    if bias is not None:
        hessian, means = without_bias(hessian)
    rounded = []
    for group, (old, curvature) in enumerate(zip(rows, hessian, strict=True)):
        grid = _grid(layer, len(rows), group)
        if steps.rounding == "gptq":
            rounded.append(gptq_round(old, curvature, grid, steps.damping))
        else:
            rounded.append(ada_round(old, curvature, grid, steps.damping, steps.iterations))
    new = torch.stack(rounded)
    if bias is not None and means is not None:
        bias.data.add_(((rows - new) @ means[:, :, None]).flatten().to(bias.dtype))
    _put(layer, new)


def _put(layer: nn.Module, rows: Tensor) -> None:
    weight = cast(Tensor, layer.weight)
    weight.data.copy_(rows.reshape(weight.shape))
