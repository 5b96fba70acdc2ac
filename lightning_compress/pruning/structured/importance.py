"""How much a channel matters, from all the slices that would go with it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.pruning.structured.groups import ChannelGroup, Layers, Touch


def channel_importance(group: ChannelGroup, layers: Layers, p: float | str = 2) -> Tensor:
    r"""Score each channel of a group by its coupled slices (group norm of DepGraph, Fang et al., arXiv 2301.12900).

    :math:`I_c = \frac{1}{T} \sum_{t=1}^{T} \lVert w_t[c] \rVert_p^p` over the T places where the channel has weights
    (what makes it, scales it, and takes it), divided by the mean over the channels of the group, so that groups of
    different sizes and layers of different scale can be ranked together.

    Args:
        group: The channels.
        layers: Modules by path; those of the group must be among them.
        p: 1 or 2 for a norm, ``"taylor"`` for :math:`|\sum w \cdot \partial L / \partial w|`, which needs gradients.

    Returns:
        Tensor (channels,) of float64 on the CPU, with mean 1 (all zeros if every slice is zero).

    Raises:
        ConfigurationError: For another ``p``, or gradients that are not there.

    >>> fc = nn.Linear(1, 3)
    >>> _ = fc.weight.data.copy_(torch.tensor([[1.0], [2.0], [-1.0]]))
    >>> touch = Touch("fc", (("weight", 0),), (0, 1, 2), (0, 1, 2), 3, (), True)
    >>> channel_importance(ChannelGroup("fc", 3, (touch,)), {"fc": fc}).tolist()
    [0.5, 2.0, 0.5]
    """
    if p not in (1, 2, "taylor"):
        raise ConfigurationError(f"`p` must be 1, 2 or 'taylor', got {p!r}")
    total, places = torch.zeros(group.channels, dtype=torch.float64), 0
    for touch in group.touches:
        weight = _weight(touch, layers)
        if weight is None:
            continue
        name, dim = touch.tensors[0]
        scores = _scores(weight, dim, p, f"{touch.path}.{name}")
        by_position = scores[torch.tensor(touch.positions)]
        summed = torch.zeros_like(total).index_add_(0, torch.tensor(touch.channels), by_position)
        total += summed.abs() if p == "taylor" else summed
        places += 1
    mean = float(total.mean()) if places else 0.0
    return total / mean if mean > 0 else total


def _weight(touch: Touch, layers: Layers) -> nn.Parameter | None:
    """Return the tensor that counts for importance: weights and scales, not biases or statistics."""
    value = getattr(layers[touch.path], touch.tensors[0][0], None) if touch.tensors else None
    return value if isinstance(value, nn.Parameter) and "bias" not in touch.tensors[0][0] else None


def _scores(weight: nn.Parameter, dim: int, p: float | str, name: str) -> Tensor:
    """Return a number for each index along ``dim``."""
    values = weight.detach()
    if p == "taylor":
        if weight.grad is None:
            raise ConfigurationError(f"`p` is 'taylor', but {name!r} has no gradient; call `loss.backward()` first")
        values = values * weight.grad.detach()
    rows = values.movedim(dim, 0).reshape(values.shape[dim], -1)
    if p == "taylor":
        return rows.sum(1, dtype=torch.float64).cpu()
    return (rows.abs() if p == 1 else rows.square()).sum(1, dtype=torch.float64).cpu()
