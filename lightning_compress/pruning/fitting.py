"""Which weights a score and a granularity fit, and how their groups are ranked."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.paths import get_layer, named_layers
from lightning_compress.core.targets import Target
from lightning_compress.pruning.allocation import Ranked, least_kept
from lightning_compress.pruning.granularity import (
    Granularity,
    Layout,
    group_scores,
    layout_of,
    may_go,
    misfit,
    to_units,
)
from lightning_compress.pruning.scores import Score

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def following_norms(root: nn.Module) -> dict[str, str]:
    """Return, by path of a layer, the batch norm registered right behind it, if it has as many features as outputs.

    Layers without parameters may stand between. The order of registration is what counts, which in networks written
    in the usual way is the order of the calls.

    >>> following_norms(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)))
    {'0': '1'}
    """
    leaves = [
        (path, module)
        for path, module in named_layers(root).items()
        if next(module.children(), None) is None and next(module.parameters(), None) is not None
    ]
    found = {}
    for (path, layer), (after, norm) in itertools.pairwise(leaves):
        weight = getattr(layer, "weight", None)
        if isinstance(norm, _NORMS) and isinstance(weight, Tensor) and not isinstance(layer, _NORMS):
            units = to_units(weight, layout_of(layer))
            if units.shape[0] * units.shape[1] == norm.num_features:
                found[path] = after
    return found


def fit_targets(
    root: nn.Module, targets: Sequence[Target], score: Score, granularity: Granularity
) -> tuple[list[Target], dict[str, str], dict[str, str]]:
    """Return the targets that a score and a granularity can work on.

    Args:
        root: The whole model.
        targets: What could be pruned.
        score: The criterion.
        granularity: What is pruned as one.

    Returns:
        Those that fit, a reason by path for each that does not, and the path of the batch norm behind each that fits
        where the score needs one.

    Raises:
        ConfigurationError: If every group everywhere is a single weight, so that the granularity means nothing.
    """
    layers = named_layers(root)
    norms = following_norms(root) if score.needs == "norms" else {}
    fitting, left, largest = [], dict[str, str](), 0
    for target in targets:
        layer, weight = layers[target.layer], target.weight(layers)
        groups = _groups(weight, granularity, layout_of(layer))
        reason = (
            misfit(weight.shape, granularity, layout_of(layer))
            or _without(score, root, target, layer, norms)
            or (f"all of it is one {granularity.kind}" if groups == 1 and not granularity.single else None)
        )
        if reason is not None:
            left[target.key] = f"kept: {reason}, so {granularity} pruning by {score.name} does not fit"
            continue
        fitting.append(target)
        largest = max(largest, weight.numel() // max(1, groups))
    if fitting and largest == 1 and not granularity.single:
        raise ConfigurationError(
            f"`granularity` {str(granularity)!r} means single weights in every selected layer ({fitting[0].key}, ...); "
            "use 'element', or 'row', 'column', 'block:4x1'"
        )
    return fitting, left, {target.key: norms[target.layer] for target in fitting if target.layer in norms}


def rank_groups(
    score: Tensor, weight: Tensor, granularity: Granularity, layout: Layout, mask: Tensor | None, floor: float
) -> Ranked:
    """Return what :func:`allocate` needs; what a mask has removed ranks lowest, so that it stays removed.

    Args:
        score: One number a group.
        weight: The weight.
        granularity: What is pruned as one.
        layout: Of the layer.
        mask: Its present mask, if it has one.
        floor: Least share that stays.
    """
    least = least_kept(weight.numel(), floor)
    if mask is not None:
        alive = group_scores((mask != 0).to(score.device, torch.float32), granularity, layout, "sum")
        score = score.masked_fill(alive == 0, -math.inf)
    if granularity.kind == "n:m":
        score = score.masked_fill(~may_go(score, granularity, layout), math.inf)
        least = max(least, weight.numel() * granularity.a // granularity.b)
    return Ranked(score, tuple(weight.shape), least)


def most_pruned(weight: Tensor, granularity: Granularity, layout: Layout, floor: float) -> float:
    """Return the largest share of a weight that can go in whole groups, where some have to stay; 1 for single weights.

    >>> weight = torch.zeros(8, 3, 3, 3)
    >>> most_pruned(weight, Granularity("filter"), layout_of(nn.Conv2d(3, 8, 3)), floor=0.01)
    0.875
    """
    if granularity.single:
        return 1.0
    groups = max(1, _groups(weight, granularity, layout))
    size = weight.numel() / groups
    return 1 - math.ceil(round(least_kept(weight.numel(), floor) / size, 6)) / groups


def _groups(weight: Tensor, granularity: Granularity, layout: Layout) -> int:
    if misfit(weight.shape, granularity, layout) is not None:
        return 0
    return group_scores(torch.empty_like(weight, device="meta"), granularity, layout, "first").numel()


def _without(score: Score, root: nn.Module, target: Target, layer: nn.Module, norms: Mapping[str, str]) -> str | None:
    """Return what a weight lacks that the score needs, or ``None``."""
    if score.needs == "norms":
        norm = named_layers(root).get(norms.get(target.layer, ""))
        if norm is None or norm.weight is None:
            return "no batch norm with a scale follows it"
    if score.needs == "inputs":
        parent = get_layer(root, target.layer.rpartition(".")[0]) if "." in target.layer else root
        if isinstance(parent, nn.MultiheadAttention) or not (isinstance(layer, nn.Linear) or layout_of(layer).kernel):
            return "only inputs of linear layers and convolutions can be seen"
    return None
