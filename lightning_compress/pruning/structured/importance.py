"""How much a channel matters, from all the slices that would go with it."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_compress.core.errors import ConfigurationError, did_you_mean
from lightning_compress.pruning.structured.groups import ChannelGroup, Layers, Touch
from lightning_compress.pruning.structured.roles import PER_CHANNEL


def channel_importance(group: ChannelGroup, layers: Layers, kind: str = "l2") -> Tensor:
    r"""Score each channel of a group by its coupled slices (group norm of DepGraph, Fang et al., arXiv 2301.12900).

    :math:`I_c = \frac{1}{T} \sum_{t=1}^{T} s(w_t[c])` over the T places where the channel has weights (what makes it,
    scales it, and takes it), divided by the mean over the channels of the group, so that groups of different sizes and
    layers of different scale can be ranked together. See :func:`channel_scores` for the kinds of :math:`s`.

    Args:
        group: The channels.
        layers: Modules by path; those of the group must be among them.
        kind: A word of :data:`KINDS`.

    Returns:
        Tensor (channels,) of float64 on the CPU, with mean 1 (all zeros if every slice is zero).

    Raises:
        ConfigurationError: For another ``kind``, or gradients or norms that are not there.

    >>> fc = nn.Linear(1, 3)
    >>> _ = fc.weight.data.copy_(torch.tensor([[1.0], [2.0], [-1.0]]))
    >>> touch = Touch("fc", (("weight", 0),), (0, 1, 2), (0, 1, 2), 3, (), True)
    >>> channel_importance(ChannelGroup("fc", 3, (touch,)), {"fc": fc}).tolist()
    [0.5, 2.0, 0.5]
    """
    return by_mean(channel_scores(group, layers, kind))


def by_mean(scores: Tensor) -> Tensor:
    """Divide scores by their mean, if that is above zero.

    >>> by_mean(torch.tensor([1.0, 3.0])).tolist()
    [0.5, 1.5]
    """
    mean = float(scores.mean()) if scores.numel() else 0.0
    return scores / mean if mean > 0 else scores


def lamp(scores: Tensor) -> Tensor:
    r"""Divide each score by the sum of those that are not smaller (LAMP, Lee et al. 2021, arXiv 2010.07611).

    :math:`\tilde s_c = s_c / \sum_{c' : s_{c'} \ge s_c} s_{c'}` (equal scores in their order): the last channel of a
    group has 1, so no group is cut away before others, whatever its scale.

    >>> lamp(torch.tensor([3.0, 1.0, 4.0])).tolist()
    [0.4285714328289032, 0.125, 1.0]
    """
    values, order = torch.sort(scores, stable=True)
    rest = values.flip(0).cumsum(0).flip(0)
    return torch.empty_like(scores).index_copy_(0, order, torch.where(rest > 0, values / rest, values))


def channel_scores(group: ChannelGroup, layers: Layers, kind: str = "l2") -> Tensor:
    r"""Score each channel of a group, in the units of the score.

    With :math:`w` all weights of a channel at one place: ``l1`` :math:`\sum |w|`; ``l2`` :math:`\sum w^2`; ``taylor``
    :math:`|\sum w \cdot \partial L / \partial w|` (Molchanov et al. 2019), which needs gradients; ``fpgm`` the sum of
    the distances to the other filters of the same layer (He et al. 2019, arXiv 1811.00250), of what makes the channel
    only; ``bn_scale`` :math:`|\gamma|` of the batch norms behind it (Liu et al. 2017); ``random`` drawn numbers,
    the same for a group's name each time.

    Returns:
        Tensor (channels,) of float64 on the CPU.

    Raises:
        ConfigurationError: For another ``kind``, or gradients or norms that are not there.
    """
    if kind not in KINDS:
        raise ConfigurationError(f"`kind` of importance is {kind!r}: {did_you_mean(str(kind), KINDS)}")
    if kind == "random":
        generator = torch.Generator().manual_seed(zlib.crc32(group.name.encode()))
        return torch.rand(group.channels, generator=generator, dtype=torch.float64)
    if kind == "taylor" and not has_gradients(group, layers):
        raise ConfigurationError(
            f"'taylor' importance needs gradients, but {group.name!r} has none: give the callback to a Trainer, or "
            "call `loss.backward()` first and compress with `inplace=True`"
        )
    total, places = torch.zeros(group.channels, dtype=torch.float64), 0
    for touch in group.touches:
        weight = _weight(touch, layers, kind)
        if weight is None:
            continue
        name, dim = touch.tensors[0]
        scores = KINDS[kind](weight, dim, f"{touch.path}.{name}")
        by_position = scores[torch.tensor(touch.positions)]
        summed = torch.zeros_like(total).index_add_(0, torch.tensor(touch.channels), by_position)
        total += summed.abs() if kind == "taylor" else summed
        places += 1
    if kind == "bn_scale" and not places:
        raise ConfigurationError(f"`kind` is 'bn_scale', but no batch norm scales the channels of {group.name!r}")
    return total / max(1, places)


def has_scales(group: ChannelGroup, layers: Layers) -> bool:
    """Return whether a norm with weights scales each channel of a group."""
    return any(_weight(touch, layers, "bn_scale") is not None for touch in group.touches)


def has_gradients(group: ChannelGroup, layers: Layers) -> bool:
    """Return whether any tensor of a group has a gradient."""
    weights = (_weight(touch, layers, "taylor") for touch in group.touches)
    return any(weight is not None and weight.grad is not None for weight in weights)


def _weight(touch: Touch, layers: Layers, kind: str) -> nn.Parameter | None:
    """Return the tensor that counts: weights and scales, not biases or statistics; for some kinds, not all of them."""
    weighs = touch.tensors and not touch.beside
    value = getattr(layers[touch.path], touch.tensors[0][0], None) if weighs else None
    if not isinstance(value, nn.Parameter) or "bias" in touch.tensors[0][0]:
        return None
    if kind == "bn_scale" and not isinstance(layers[touch.path], PER_CHANNEL):
        return None
    return None if kind == "fpgm" and not touch.produces else value


def _rows(weight: Tensor, dim: int) -> Tensor:
    """Return a row for each index along a dimension, in float32 at least: squares of half precision would vanish."""
    values = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    return values.movedim(dim, 0).reshape(values.shape[dim], -1)


def _l1(weight: nn.Parameter, dim: int, name: str) -> Tensor:
    return _rows(weight, dim).abs().sum(1, dtype=torch.float64).cpu()


def _l2(weight: nn.Parameter, dim: int, name: str) -> Tensor:
    return _rows(weight, dim).square().sum(1, dtype=torch.float64).cpu()


def _taylor(weight: nn.Parameter, dim: int, name: str) -> Tensor:
    if weight.grad is None:  # what the loss does not depend on
        return torch.zeros(weight.shape[dim], dtype=torch.float64)
    return (_rows(weight, dim) * _rows(weight.grad, dim)).sum(1, dtype=torch.float64).cpu()


def _fpgm(weight: nn.Parameter, dim: int, name: str) -> Tensor:
    rows = _rows(weight, dim).double()
    return torch.cdist(rows, rows).sum(1).cpu()


def _any(weight: nn.Parameter, dim: int, name: str) -> Tensor:
    return torch.zeros(weight.shape[dim], dtype=torch.float64)


KINDS: dict[str, Callable[[nn.Parameter, int, str], Tensor]] = {
    "l1": _l1,
    "l2": _l2,
    "taylor": _taylor,
    "fpgm": _fpgm,
    "bn_scale": _l1,
    "random": _any,
}
"""What makes a channel worth keeping, by name."""
