"""How many weights each tensor loses: one amount per layer, or one cut through all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from lightning_compress.core.errors import ConfigurationError, did_you_mean
from lightning_compress.pruning.masks import kept, lowest_masks

SCOPES = ("global", "layer")


def least_kept(size: int, floor: float) -> int:
    """Return how many of ``size`` weights must stay: at least the share ``floor``, and at least one.

    >>> least_kept(1000, 0.01), least_kept(3, 0.01)
    (10, 1)
    """
    return min(size, max(1, math.ceil(round(floor * size, 6))))


def choose_masks(values: Mapping[str, Tensor], amount: float, scope: str, floor: float) -> dict[str, Tensor]:
    """Return masks at a given sparsity over a group of tensors, by magnitude.

    In the ``global`` scope exactly ``round(amount * total)`` weights are pruned, wherever they are smallest, but a
    tensor that would keep less than its floor keeps exactly that and the others give more. In the ``layer``
    scope each tensor is pruned to the amount by itself.

    Args:
        values: Weights by path.
        amount: Sparsity, 0 to 1, of the whole group or of each tensor.
        scope: ``"global"`` or ``"layer"``.
        floor: Least share of a tensor's weights to keep; at least one weight stays in any case.

    Returns:
        ``int8`` masks by path, -1 keep and 0 prune.

    Raises:
        ConfigurationError: For an unknown scope.

    >>> import torch
    >>> group = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}
    >>> {key: mask.tolist() for key, mask in choose_masks(group, 0.5, "global", floor=0.01).items()}
    {'a': [0, -1], 'b': [0, -1]}
    """
    if scope not in SCOPES:
        raise ConfigurationError(f"`scope` is {scope!r}: {did_you_mean(str(scope), SCOPES)}")
    if scope == "layer":
        return {key: lowest_masks([value], _pruned(value, amount, floor))[0] for key, value in values.items()}
    return _global_masks(values, amount, floor)


def _pruned(value: Tensor, amount: float, floor: float) -> int:
    return min(round(amount * value.numel()), value.numel() - least_kept(value.numel(), floor))


def _global_masks(values: Mapping[str, Tensor], amount: float, floor: float) -> dict[str, Tensor]:
    total = sum(value.numel() for value in values.values())
    free, masks = dict(values), dict[str, Tensor]()
    count = round(amount * total)
    while free:
        room = sum(value.numel() for value in free.values())
        chosen = dict(zip(free, lowest_masks(list(free.values()), min(max(count, 0), room)), strict=True))
        short = [key for key in free if kept({key: chosen[key]}) < least_kept(free[key].numel(), floor)]
        if not short:
            return {key: {**masks, **chosen}[key] for key in values}
        for key in short:
            value = free.pop(key)
            masks[key] = lowest_masks([value], value.numel() - least_kept(value.numel(), floor))[0]
            count -= value.numel() - least_kept(value.numel(), floor)
    return {key: masks[key] for key in values}
