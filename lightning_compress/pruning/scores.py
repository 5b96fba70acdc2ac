"""How much each weight is worth keeping: one small function a criterion, and a table of them by name."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_compress.core.errors import ConfigurationError, did_you_mean
from lightning_compress.pruning.granularity import Granularity, Layout, from_units, to_units


def magnitude(weight: Tensor) -> Tensor:
    r"""Return :math:`|w|` (Han et al. 2015, arXiv 1506.02626).

    >>> magnitude(torch.tensor([1.0, -3.0, 2.0, -0.5]))
    tensor([1.0000, 3.0000, 2.0000, 0.5000])
    """
    return weight.detach().float().abs()


def gradient(weight: Tensor, grad: Tensor) -> Tensor:
    r"""Return :math:`|w g|`, how much the loss would change to first order (Molchanov et al. 2016, arXiv 1611.06440).

    Args:
        weight: Any shape.
        grad: Gradient of the loss, same shape.

    >>> gradient(torch.tensor([1.0, -3.0, 2.0, -0.5]), torch.tensor([2.0, 0.5, 0.0, 4.0]))
    tensor([2.0000, 1.5000, 0.0000, 2.0000])
    """
    return (weight.detach().float() * grad.float()).abs()


def movement(weight: Tensor, grad: Tensor) -> Tensor:
    r"""Return :math:`-w g`, positive while a step takes the weight away from zero (Sanh et al. 2020, arXiv 2005.07683).

    The score of a weight is the sum of these over the steps of training.

    >>> movement(torch.tensor([1.0, -3.0, 2.0, -0.5]), torch.tensor([2.0, 0.5, 0.0, 4.0]))
    tensor([-2.0000,  1.5000, -0.0000,  2.0000])
    """
    return -(weight.detach().float() * grad.float())


def snip(sensitivity: Tensor, total: Tensor | float) -> Tensor:
    r"""Return :math:`|w g| / \sum |w g|` at the start of training (Lee et al. 2018, arXiv 1810.02340).

    Args:
        sensitivity: :func:`gradient` of a tensor at the first step.
        total: Its sum over all tensors that are ranked together.

    >>> snip(torch.tensor([2.0, 1.5, 0.0, 2.0]), 8.0)
    tensor([0.2500, 0.1875, 0.0000, 0.2500])
    """
    return sensitivity / torch.clamp(torch.as_tensor(total), min=torch.finfo(torch.float32).tiny)


def wanda(weight: Tensor, norms: Tensor, layout: Layout) -> Tensor:
    r"""Return :math:`|w_{ij}| \cdot \lVert x_j \rVert` (Sun et al. 2023, arXiv 2306.11695).

    Args:
        weight: Of a linear layer or convolution.
        norms: Norm of each input feature or channel over samples and positions; here the root mean square, so that
            layers with more positions are not worth more.
        layout: Of the layer.

    >>> wanda(torch.tensor([[1.0, -3.0], [2.0, -0.5]]), torch.tensor([1.0, 0.5]), Layout()).tolist()
    [[1.0, 1.5], [2.0, 0.25]]
    """
    units = to_units(weight.detach().float().abs(), layout)
    return from_units(units * norms.reshape(units.shape[0], 1, units.shape[2], 1), layout, weight.shape)


def random(weight: Tensor, seed: int, step: int, key: str) -> Tensor:
    """Return uniform numbers that depend on seed, step and name only: the same in every process, and after a resume.

    >>> one, other = (random(torch.ones(4), seed, 3, "fc.weight") for seed in (0, 1))
    >>> torch.equal(one, random(torch.zeros(4), 0, 3, "fc.weight")), torch.equal(one, other)
    (True, False)
    """
    digest = hashlib.sha256(f"{seed},{step},{key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(weight.shape, generator=generator).to(weight.device)


def bn_scale(scale: Tensor, layout: Layout) -> Tensor:
    r"""Return :math:`|\gamma|` of the batch norm behind each filter (Liu et al. 2017, arXiv 1708.06519).

    Args:
        scale: Weight of the batch norm, one number a filter.
        layout: Of the layer before it.

    Returns:
        One score a filter, ``(groups, filters, 1, 1)``.

    >>> bn_scale(torch.tensor([1.0, -3.0, 2.0, -0.5]), Layout()).flatten()
    tensor([1.0000, 3.0000, 2.0000, 0.5000])
    """
    return scale.detach().float().abs().reshape(layout.groups, -1, 1, 1)


def geometric_median(weight: Tensor, granularity: Granularity, layout: Layout) -> Tensor:
    r"""Return :math:`\sum_j \lVert w_i - w_j \rVert_2`: what is nearest to all others goes (FPGM, arXiv 1811.00250).

    Args:
        weight: Of a layer.
        granularity: ``row`` or ``filter`` compare filters; ``channel`` compares what reads an input.
        layout: Of the layer.

    Returns:
        One score a filter ``(groups, filters, 1, 1)`` or a channel ``(groups, 1, channels, 1)``.

    >>> weight = torch.tensor([[0.0], [1.0], [2.0], [5.0]])
    >>> geometric_median(weight, Granularity("filter"), Layout()).flatten()
    tensor([ 8.,  6.,  6., 12.])
    """
    units = to_units(weight.detach().float(), layout)
    groups, outputs, inputs, _ = units.shape
    by_input = granularity.kind == "channel"
    ordered = units.transpose(1, 2) if by_input else units
    points = ordered.reshape(groups * (inputs if by_input else outputs), -1)
    far = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").sum(1)
    return far.reshape((groups, 1, inputs, 1) if by_input else (groups, outputs, 1, 1))


@dataclass(frozen=True)
class Score:
    """A criterion as the callback uses it.

    Args:
        name: Its word in configs.
        needs: What it looks at beside the weights: ``"weights"``, ``"gradients"``, ``"inputs"`` or ``"norms"``.
        how: How the scores of weights make the score of their group.
        kinds: The kinds of granularity it can be used with; empty for all.
        span: What gradients are collected over: since the last ``"update"``, the whole ``"run"``, the ``"first"`` step.
        signed: Whether scores can be negative.
    """

    name: str
    needs: str = "weights"
    how: str = "mean"
    kinds: tuple[str, ...] = ()
    span: str = "update"
    signed: bool = False


_FILTERS = ("row", "filter")

SCORES = {
    score.name: score
    for score in (
        Score("magnitude"),
        Score("l1_norm", how="sum"),
        Score("l2_norm", how="l2"),
        Score("random", how="first"),
        Score("geometric_median", kinds=(*_FILTERS, "channel")),
        Score("bn_scale", "norms", kinds=_FILTERS),
        Score("gradient", "gradients", "sum"),
        Score("movement", "gradients", "sum", span="run", signed=True),
        Score("snip", "gradients", "sum", span="first"),
        Score("obd", "gradients", "sum"),
        Score("wanda", "inputs"),
    )
}
"""Every criterion by name."""


def find_score(name: Any) -> Score:
    """Return the criterion of that name.

    Raises:
        ConfigurationError: If there is none; names the nearest.

    >>> find_score("obd").needs
    'gradients'
    """
    if name not in SCORES:
        raise ConfigurationError(f"`score` is {name!r}: {did_you_mean(str(name), SCORES, limit=6)}")
    return SCORES[name]


def check_score(score: Score, granularity: Granularity, scope: str) -> None:
    """Refuse combinations that mean nothing.

    Raises:
        ConfigurationError: If the score is not defined for that granularity, or not for that scope; says why.
    """
    if score.kinds and granularity.kind not in score.kinds:
        raise ConfigurationError(
            f"`score` {score.name!r} rates whole {'filters or channels' if 'channel' in score.kinds else 'filters'}, "
            f"but `granularity` is {str(granularity)!r}; use {', '.join(map(repr, score.kinds))}, or score 'magnitude'"
        )
    if scope == "lamp" and score.signed:
        raise ConfigurationError(
            f"`scope` 'lamp' divides squared scores, but `score` {score.name!r} has a sign that would be lost; use "
            "scope 'global_normalized' or another score"
        )
