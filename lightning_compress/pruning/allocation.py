"""How many weights each tensor loses: one amount per layer, one cut through all of them, or densities by shape."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_compress.core.errors import ConfigurationError, did_you_mean
from lightning_compress.pruning.masks import kept, lowest_masks

SCOPES = ("global", "layer", "global_normalized", "erk", "lamp")
"""Over what scores are ranked, and what decides how much each layer loses."""


@dataclass(frozen=True)
class Ranked:
    """The groups of weights of one tensor, with what decides about them.

    Args:
        scores: One number a group, of any shape; the lowest go first. Those at ``-inf`` are gone already, those at
            ``inf`` stay.
        shape: Shape of the weight, outputs and inputs first.
        least: How many of its weights stay at least.
    """

    scores: Tensor
    shape: tuple[int, ...]
    least: int

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Number of weights in a group."""
        return self.numel // max(1, self.scores.numel())

    @property
    def room(self) -> int:
        """Number of groups that may go."""
        return (self.numel - self.least) // max(1, self.size)


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
    scope each tensor is pruned to the amount by itself. For the others see :func:`allocate`.

    Args:
        values: Weights by path.
        amount: Sparsity, 0 to 1, of the whole group or of each tensor.
        scope: One of ``SCOPES``.
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
    least = {key: least_kept(value.numel(), floor) for key, value in values.items()}
    if scope == "layer":
        return {
            key: lowest_masks([value], min(round(amount * value.numel()), value.numel() - least[key]))[0]
            for key, value in values.items()
        }
    if scope == "global":
        return _global_masks(values, amount, least, absolute=True)
    ranked = {
        key: Ranked(value.detach().float().abs(), tuple(value.shape), least[key]) for key, value in values.items()
    }
    return allocate(ranked, amount, scope)


def allocate(ranked: Mapping[str, Ranked], amount: float, scope: str) -> dict[str, Tensor]:
    r"""Return masks of groups at a given sparsity, over several tensors.

    - ``"global"``: the lowest scores of all tensors go.
    - ``"layer"``: each tensor loses the amount.
    - ``"global_normalized"``: as global, with the scores of each tensor divided by the mean of their magnitudes.
    - ``"erk"``: densities by :func:`erk_counts`, which spare small layers.
    - ``"lamp"``: as global, with :func:`lamp_scores`.

    Single weights are pruned to the exact count. Of larger groups as many go as fit into the amount, never more: in
    the global scopes the longest run of lowest scores. Ties are broken by tensor, then by place.

    Args:
        ranked: Scores by path.
        amount: Sparsity, 0 to 1, counted in weights.
        scope: One of ``SCOPES``.

    Returns:
        ``int8`` masks by path, in the shape of the scores: -1 keep and 0 prune.

    Raises:
        ConfigurationError: For an unknown scope.

    >>> import torch
    >>> ranked = {"a": Ranked(torch.tensor([3.0, 1.0]), (2, 2), 0), "b": Ranked(torch.tensor([2.0, 4.0]), (2, 1), 0)}
    >>> {key: mask.tolist() for key, mask in allocate(ranked, 0.5, "global").items()}
    {'a': [-1, 0], 'b': [0, -1]}
    """
    if scope not in SCOPES:
        raise ConfigurationError(f"`scope` is {scope!r}: {did_you_mean(str(scope), SCOPES)}")
    if scope in ("layer", "erk"):
        counts = _per_layer(ranked, amount) if scope == "layer" else _by_shape(ranked, amount)
        return {key: lowest_masks([r.scores], counts[key], absolute=False)[0] for key, r in ranked.items()}
    rescale = {"lamp": lamp_scores, "global_normalized": normalized}.get(scope, torch.Tensor.float)
    scores = {key: rescale(item.scores) for key, item in ranked.items()}
    if all(item.size == 1 for item in ranked.values()):
        return _global_masks(scores, amount, {key: item.least for key, item in ranked.items()}, absolute=False)
    return _global_groups(ranked, scores, amount)


def normalized(scores: Tensor) -> Tensor:
    """Return scores divided by the mean of the magnitudes of those that are finite.

    >>> normalized(torch.tensor([1.0, 3.0, -torch.inf]))
    tensor([0.5000, 1.5000,   -inf])
    """
    finite = torch.isfinite(scores)
    mean = scores.abs().where(finite, 0).sum(dtype=torch.float64) / finite.sum().clamp(min=1)
    return (scores.double() / mean.clamp(min=torch.finfo(torch.float64).tiny)).float()


def lamp_scores(scores: Tensor) -> Tensor:
    r"""Return :math:`s_u^2 / \sum_{s_v \ge s_u} s_v^2`, the share of what is left (Lee et al. 2020, 2010.07611).

    The largest of a tensor has 1, so no tensor is emptied.

    Args:
        scores: Not negative; with magnitudes it is the paper's score. ``-inf`` and ``inf`` are passed on.

    >>> lamp_scores(torch.tensor([1.0, 3.0, 2.0])).tolist()
    [0.0714285746216774, 1.0, 0.3076923191547394]
    """
    flat = scores.flatten()
    order = flat.argsort(stable=True)
    squares = flat.double().square().where(torch.isfinite(flat), 0)[order]
    above = squares.flip(0).cumsum(0).flip(0)
    shares = squares / above.clamp(min=torch.finfo(torch.float64).tiny)
    result = torch.empty_like(shares).scatter_(0, order, shares).float()
    return result.where(torch.isfinite(flat), flat).reshape(scores.shape)


def erk_counts(shapes: Mapping[str, tuple[int, ...]], total: int, least: Mapping[str, int]) -> dict[str, int]:
    r"""Return how many weights each tensor keeps, Erdos-Renyi-Kernel (Evci et al. 2019, arXiv 1911.11134).

    Densities are :math:`\varepsilon (n_{in} + n_{out} + k_w + k_h) / (n_{in} n_{out} k_w k_h)`, at most 1, with the
    :math:`\varepsilon` at which all together keep ``total``.

    Args:
        shapes: Of the weights: outputs, inputs (of a group), kernel.
        total: How many weights stay in all tensors together.
        least: How many stay in each at least; where these are more than ``total``, they win.

    >>> erk_counts({"a": (10, 10), "b": (30, 30)}, total=100, least={"a": 1, "b": 1})
    {'a': 25, 'b': 75}
    """
    sizes = {key: math.prod(shape) for key, shape in shapes.items()}
    weights = {key: float(sum(shape)) for key, shape in shapes.items()}
    total = min(max(total, sum(least.values())), sum(sizes.values()))

    def keeps(scale: float) -> dict[str, float]:
        return {key: min(max(scale * weights[key], least[key]), sizes[key]) for key in shapes}

    low, high = 0.0, max((sizes[key] / weights[key] for key in shapes if weights[key]), default=0.0)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(keeps(middle).values()) < total else (low, middle)
    exact = keeps(high)
    counts = {key: math.floor(value + 1e-6) for key, value in exact.items()}
    open_ = [key for key in shapes if counts[key] < sizes[key]]
    for key in sorted(open_, key=lambda key: counts[key] - exact[key])[: max(0, total - sum(counts.values()))]:
        counts[key] += 1
    return counts


def _per_layer(ranked: Mapping[str, Ranked], amount: float) -> dict[str, int]:
    return {key: min(_groups_in(amount * item.numel, item.size), item.room) for key, item in ranked.items()}


def _by_shape(ranked: Mapping[str, Ranked], amount: float) -> dict[str, int]:
    total = sum(item.numel for item in ranked.values())
    single = all(item.size <= 1 for item in ranked.values())
    goes = round(amount * total) if single else math.floor(round(amount * total, 6))
    least = {key: item.least for key, item in ranked.items()}
    stay = erk_counts({key: item.shape for key, item in ranked.items()}, total - goes, least)
    return {key: _groups_in(item.numel - stay[key], item.size) for key, item in ranked.items()}


def _groups_in(weights: float, size: int) -> int:
    """Return how many groups hold that many weights: the nearest number of single ones, never more of larger ones."""
    return round(weights) if size <= 1 else math.floor(round(weights, 6) / size)


def _global_groups(ranked: Mapping[str, Ranked], scores: Mapping[str, Tensor], amount: float) -> dict[str, Tensor]:
    free = {key: lowest_masks([scores[key]], item.room, absolute=False)[0] == 0 for key, item in ranked.items()}
    device = next(iter(scores.values())).device
    pool = torch.cat([scores[key][free[key]].float().to(device) for key in ranked])
    sizes = torch.cat([torch.full((item.room,), item.size, device=device) for item in ranked.values()])
    order = pool.argsort(stable=True)
    limit = round(amount * sum(item.numel for item in ranked.values()), 6)
    goes = torch.zeros_like(order, dtype=torch.bool)
    goes[order] = sizes[order].cumsum(0) <= limit
    masks = {}
    for key, part in zip(ranked, goes.split([item.room for item in ranked.values()]), strict=True):
        gone = torch.zeros_like(scores[key], dtype=torch.bool)
        gone[free[key]] = part.to(gone.device)
        masks[key] = (~gone).to(torch.int8).neg_()
    return masks


def _global_masks(
    values: Mapping[str, Tensor], amount: float, least: Mapping[str, int], absolute: bool
) -> dict[str, Tensor]:
    total = sum(value.numel() for value in values.values())
    free, masks = dict(values), dict[str, Tensor]()
    count = round(amount * total)
    while free:
        room = sum(value.numel() for value in free.values())
        chosen = dict(zip(free, lowest_masks(list(free.values()), min(max(count, 0), room), absolute), strict=True))
        short = [key for key in free if kept({key: chosen[key]}) < least[key]]
        if not short:
            return {key: {**masks, **chosen}[key] for key in values}
        for key in short:
            value = free.pop(key)
            masks[key] = lowest_masks([value], value.numel() - least[key], absolute)[0]
            count -= value.numel() - least[key]
    return {key: masks[key] for key in values}
