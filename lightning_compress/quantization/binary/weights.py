"""Where real weights, their few values and the curvature of the loss are found."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.nn.utils import parametrize

from lightning_compress.core.targets import why_no_numbers
from lightning_compress.quantization.binary.layers import FewLevels


def few_levels_of(layer: nn.Module) -> FewLevels | None:
    """Return the parametrization of these callbacks, if a layer's weight has one."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    parts = layer.get_submodule("parametrizations.weight").children()
    return next((part for part in parts if isinstance(part, FewLevels)), None)


def real_weight(layer: nn.Module) -> nn.Parameter:
    """Return the real weight that the optimizer updates."""
    few = few_levels_of(layer)
    return layer.get_parameter("weight" if few is None else "parametrizations.weight.original")


def owners_of(root: nn.Module) -> dict[int, int]:
    """Return how many modules hold each parameter."""
    count: dict[int, int] = {}
    for module in root.modules():
        for parameter in module.parameters(recurse=False):
            count[id(parameter)] = count.get(id(parameter), 0) + 1
    return count


def why_held(layer: nn.Module, owners: Mapping[int, int]) -> str:
    """Return why a layer's weight cannot be given few values; empty if it can."""
    if few_levels_of(layer) is None and parametrize.is_parametrized(layer, "weight"):
        return "kept: its weight is parametrized by something else"
    if few_levels_of(layer) is None and "weight" not in dict(layer.named_parameters(recurse=False)):
        return "kept: its weight is no parameter, a hook computes it (the old weight norm, or torch's pruning)"
    if owners.get(id(real_weight(layer)), 0) > 1:
        return "kept: its weight is shared with another module"
    return why_no_numbers(real_weight(layer))
