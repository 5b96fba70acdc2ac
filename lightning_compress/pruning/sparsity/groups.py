"""Which tensors of a model form the groups of a penalty, and what falls silent with a group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_compress.core.errors import ConfigurationError, did_you_mean
from lightning_compress.core.targets import PRUNABLE, Target, find_targets
from lightning_compress.pruning.fitting import following_norms
from lightning_compress.pruning.granularity import Granularity, Layout, layout_of, misfit, parse_granularity
from lightning_compress.pruning.sparsity.penalties import LAYER, group_norms, group_size, spread_groups
from lightning_compress.pruning.sparsity.shortcuts import without_shortcut

BN_SCALE = "bn_scale"
"""Network slimming: the scales of batch norms, each by itself."""

NORMS: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

_PAPERS = {"l1": "element", "shape": "column", "depth": LAYER, "slimming": BN_SCALE}
_WORDS = ("element", "row", "column", "kernel", "filter", "channel", "block:4x1", LAYER, BN_SCALE, *_PAPERS)
_OUTPUT_KINDS = ("row", "filter", LAYER)
_WITH_BIAS = (
    *(kind for kind in PRUNABLE if not issubclass(kind, nn.RNNBase | nn.RNNCellBase | nn.MultiheadAttention)),
)


@dataclass(frozen=True)
class GroupTarget:
    """A weight and what belongs to its groups.

    Args:
        target: The weight.
        granularity: Which of its weights are one group.
        layout: How it maps inputs to outputs.
        bias: Name of the bias whose elements are in the groups of their outputs, if there is one.
        norm: Path of the batch norm that falls silent with a group, if there is one.
    """

    target: Target
    granularity: Granularity
    layout: Layout
    bias: str | None = None
    norm: str | None = None

    @property
    def key(self) -> str:
        """Path of the weight."""
        return self.target.key

    def tensors(self, layers: Mapping[str, nn.Module]) -> tuple[nn.Parameter, nn.Parameter | None]:
        """Return the weight, and the bias if it belongs to the groups."""
        layer = layers[self.target.layer]
        return self.target.weight(layers), None if self.bias is None else layer.get_parameter(self.bias)

    def norms(self, layers: Mapping[str, nn.Module]) -> Tensor:
        """Return the norm of every group."""
        weight, bias = self.tensors(layers)
        return group_norms(weight.detach(), self.granularity, self.layout, None if bias is None else bias.detach())

    def levels(self, layers: Mapping[str, nn.Module]) -> Tensor:
        """Return the root of the mean square of every group, which groups of any size can be compared by."""
        weight, bias = self.tensors(layers)
        norms = self.norms(layers)
        return norms / group_size(weight, norms.numel(), bias) ** 0.5

    def describe(self, layers: Mapping[str, nn.Module]) -> str:
        """Return how many groups there are, of which size, how many are zero, and what falls silent with them."""
        (weight, bias), norms = self.tensors(layers), self.norms(layers)
        size, zero = group_size(weight, norms.numel(), bias), int((norms == 0).sum())
        also = f"; {self.norm} falls silent with them" if self.norm not in (None, self.target.layer) else ""
        return f"{norms.numel()} groups of {size:g}, of which {zero} are zero now{also}"

    def silence(self, zero: Tensor, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        """Return masks (``int8``, -1 keep, 0 prune) for zero groups: of the weight, its bias and the norm behind it.

        Args:
            zero: For each group whether it is zero, in the shape of :meth:`norms`.
            layers: Layers by path.

        Returns:
            A mask by the parameter's path, for parameters that are trained.
        """
        weight, bias = self.tensors(layers)
        keep = (~zero).to(torch.int8).neg()
        masks = {self.key: _like(spread_groups(keep, self.granularity, self.layout, weight), weight)}
        if bias is not None:
            masks[f"{self.target.layer}.{self.bias}"] = _like(keep.flatten().expand(bias.shape), bias)
        if self.norm is not None:
            for name, parameter in layers[self.norm].named_parameters(recurse=False):
                if parameter.requires_grad and f"{self.norm}.{name}" != self.key:
                    masks[f"{self.norm}.{name}"] = _like(keep.flatten().expand(parameter.shape), parameter)
        return masks


def _like(mask: Tensor, parameter: Tensor) -> Tensor:
    return torch.empty_like(parameter, dtype=torch.int8, requires_grad=False).copy_(mask)


def zero_groups(targets: Sequence[GroupTarget], layers: Mapping[str, nn.Module], threshold: float) -> dict[str, Tensor]:
    """Return for each tensor which of its groups are zero, or nearly so.

    Args:
        targets: The tensors.
        layers: Layers by path.
        threshold: Share of the level of the tensor's largest group (where groups are layers: of all) up to which a
            group counts as zero.

    Returns:
        Booleans in the shape of :meth:`GroupTarget.norms`, by path of the tensor.
    """
    levels = {target.key: target.levels(layers) for target in targets}
    whole = max((level.max() for t, level in zip(targets, levels.values(), strict=True) if _is_layer(t)), default=None)
    return {key: level <= threshold * (level.max() if whole is None else whole) for key, level in levels.items()}


def _is_layer(target: GroupTarget) -> bool:
    return target.granularity.kind == LAYER


@dataclass(frozen=True)
class Found:
    """What a penalty can work on in a model.

    Args:
        targets: The weights.
        left: Why other tensors are left alone, by path.
    """

    targets: list[GroupTarget]
    left: Mapping[str, str] = field(default_factory=dict)


def parse_groups(text: object) -> Granularity:
    """Return which weights are one group, from a word.

    Args:
        text: ``"element"`` (or ``"l1"``), ``"filter"``, ``"channel"``, ``"column"`` (or ``"shape"``), ``"row"``,
            ``"kernel"``, ``"block:AxB"``, ``"layer"`` (or ``"depth"``), ``"bn_scale"`` (or ``"slimming"``).

    Raises:
        ConfigurationError: For anything else, N:M patterns included.

    >>> str(parse_groups("shape")), str(parse_groups("depth"))
    ('column', 'layer')
    """
    word = _PAPERS.get(text, text) if isinstance(text, str) else text
    if word in (LAYER, BN_SCALE):
        return Granularity(str(word))
    try:
        found = parse_granularity(word)
    except ConfigurationError as error:
        if isinstance(word, str) and not word.startswith("block"):
            raise ConfigurationError(f"`granularity` is {text!r}: {did_you_mean(word, _WORDS, 6)}") from error
        raise
    if found.kind == "n:m":
        raise ConfigurationError(
            f"`granularity` {text!r} is a pattern, not groups that a penalty could shrink; IterativePruning takes it"
        )
    return found


def layer_types(granularity: Granularity) -> tuple[type[nn.Module], ...]:
    """Return the types of layers that hold such groups."""
    return NORMS if granularity.kind == BN_SCALE else PRUNABLE


def find_groups(root: nn.Module, layers: Mapping[str, nn.Module], granularity: Granularity) -> Found:
    """Return the weights of the selected layers that form groups, and why others do not.

    Args:
        root: The whole model.
        layers: The selected layers by path.
        granularity: Which weights are one group.

    Raises:
        ConfigurationError: If layers are groups and the model cannot be traced.
    """
    targets, left = find_targets(root, layers)
    alone = {} if granularity.kind != LAYER else without_shortcut(root, dict.fromkeys(t.layer for t in targets))
    behind = following_norms(root) if granularity.kind in _OUTPUT_KINDS else {}
    found = []
    for target in targets:
        layer, weight = layers[target.layer], target.weight(layers)
        reason = alone.get(target.layer) or _misfit(weight, granularity, layout_of(layer))
        if reason:
            left[target.key] = f"kept: {reason}"
            continue
        if granularity.kind == BN_SCALE:
            found.append(GroupTarget(target, Granularity(), Layout(), norm=target.layer))
            continue
        bias = _joins(root, layer, weight) if granularity.kind in _OUTPUT_KINDS else None
        found.append(GroupTarget(target, granularity, layout_of(layer), bias, behind.get(target.layer)))
    return Found(found, left)


def _misfit(weight: Tensor, granularity: Granularity, layout: Layout) -> str | None:
    if granularity.kind in (LAYER, BN_SCALE):
        return None
    reason = misfit(weight.shape, granularity, layout)
    if reason is None and not granularity.single:
        groups = group_norms(torch.empty_like(weight, device="meta"), granularity, layout).numel()
        reason = f"all of it is one {granularity.kind}" if groups == 1 else None
    return reason


def _joins(root: nn.Module, layer: nn.Module, weight: nn.Parameter) -> str | None:
    """Return the name of a bias that is trained with the weight and belongs to no other layer."""
    bias = getattr(layer, "bias", None)
    if not isinstance(layer, _WITH_BIAS) or not isinstance(bias, nn.Parameter):
        return None
    owners = sum(p is bias for module in root.modules() for p in module.parameters(recurse=False))
    return "bias" if owners == 1 and bias.requires_grad == weight.requires_grad else None
