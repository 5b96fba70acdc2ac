"""Layers one by one: which of them a Hessian describes, how many fit into memory at a time, their rows and grids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_compress.core.patches import CONVOLUTIONS
from lightning_compress.core.targets import find_targets
from lightning_compress.quantization.post_training.rounding import Grid

MOST_INPUTS = 8192
"""Inputs of a layer beyond which its Hessian takes too much memory."""
_MEMORY = 2**30
"""Bytes of Hessians that are held at a time."""


def plain_layers(model: nn.Module, known: Mapping[str, nn.Module], paths: Iterable[str]) -> dict[str, nn.Module]:
    """Return the layers whose weight is theirs alone, and which a Hessian describes.

    Args:
        model: To see what is shared.
        known: All its layers by path.
        paths: Of layers with weights to quantize.
    """
    chosen = {
        path: known[path]
        for path in paths
        if isinstance(known[path], (nn.Linear, *CONVOLUTIONS)) and not parametrize.is_parametrized(known[path])
    }
    targets, _ = find_targets(model, chosen)
    return {target.layer: chosen[target.layer] for target in targets if not target.tied}


def portions(layers: Mapping[str, nn.Module]) -> list[dict[str, nn.Module]]:
    """Divide layers so that the Hessians of each part fit into memory."""
    parts: list[dict[str, nn.Module]] = [{}]
    used = 0
    for path, layer in layers.items():
        size = 8 * getattr(layer, "groups", 1) * (inputs_of(layer) + 1) ** 2
        if parts[-1] and used + size > _MEMORY:
            parts.append({})
            used = 0
        parts[-1][path] = layer
        used += size
    return parts


def inputs_of(layer: nn.Module) -> int:
    """Return how many inputs an output of a layer sees.

    >>> inputs_of(nn.Conv2d(4, 8, 3, groups=2))
    18
    """
    return cast(Tensor, layer.weight)[0].numel()


def rows_of(layer: nn.Module, groups: int) -> Tensor:
    """Return a weight as (groups, rows, inputs)."""
    weight = cast(Tensor, layer.weight).detach()
    return weight.reshape(groups, len(weight) // groups, -1)


def grid_of(layer: nn.Module, groups: int, group: int = 0) -> Grid:
    """Return the grid of the rows of one group of a quantized layer."""
    quantizer = cast(Any, layer).weight_quantizer
    count = len(cast(Tensor, layer.weight)) // groups
    scale, zero_point = quantizer.affine()
    mine = slice(group * count, (group + 1) * count)
    scale, zero_point = (
        value.reshape(-1, 1)[mine] if value.dim() else value.reshape(1, 1) for value in (scale, zero_point)
    )
    return Grid(scale, zero_point, quantizer.bounds)
