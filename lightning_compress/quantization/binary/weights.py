"""Where real weights, their few values and the curvature of the loss are found."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.quantization.binary.layers import FewLevels

SECOND_MOMENTS = ("exp_avg_sq", "square_avg", "sum")
"""What torch's adaptive optimizers call the running second moment: Adam and its kin, RMSprop, Adagrad."""


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
    if owners.get(id(real_weight(layer)), 0) > 1:
        return "kept: its weight is shared with another module"
    return ""


def check_curvature(optimizer: Optimizer) -> None:
    """Refuse an optimizer that keeps no second moment, as far as its settings tell."""
    defaults = optimizer.defaults
    if not ({"betas", "rho", "lr_decay"} & defaults.keys() or {"alpha", "eps"} <= defaults.keys()):
        raise ConfigurationError(
            f"`method` 'loss_aware' needs an optimizer that keeps a second moment of the gradients (Adam, RMSprop, "
            f"Adagrad), got {type(optimizer).__name__}; change the optimizer, or use method='bwn'"
        )


def second_moment(optimizer: Optimizer, weight: nn.Parameter) -> Tensor | None:
    """Return the running second moment that an optimizer keeps of a weight; ``None`` before its first step."""
    state = optimizer.state.get(weight, {})
    return next((state[key] for key in SECOND_MOMENTS if isinstance(state.get(key), Tensor)), None)
