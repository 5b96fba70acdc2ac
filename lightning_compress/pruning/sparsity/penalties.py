r"""Penalties that make weights sparse, and their proximal operators: L1 and the group lasso.

The group lasso over groups g of weights (Yuan & Lin 2006; Structured Sparsity Learning, Wen et al., arXiv 1608.03665)
is

.. math:: R(w) = \sum_g \sqrt{|g|} \, \lVert w_g \rVert_2

with :math:`|g|` weights in group g. The root makes one strength mean the same for groups of every size, so that groups
of one weight give the L1 norm; the plain sum of the paper is had with a strength divided by :math:`\sqrt{|g|}`. Its
proximal operator shrinks every group towards zero, and onto zero exactly where its norm is small enough:

.. math:: \mathrm{prox}_{\tau R}(w)_g = \max\!\left(0,\; 1 - \frac{\tau \sqrt{|g|}}{\lVert w_g \rVert_2}\right) w_g
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.pruning.granularity import Granularity, Layout, from_units, group_scores, to_units

LAYER = "layer"
"""The kind of groups that hold a whole layer (depth-wise in Structured Sparsity Learning)."""

_TINY = 1e-36


def soft_threshold(values: Tensor, amount: float) -> Tensor:
    r"""Return :math:`\mathrm{sign}(v) \max(|v| - \tau, 0)`, the proximal operator of the L1 norm.

    Args:
        values: Any shape.
        amount: :math:`\tau`, at least 0.

    Returns:
        A tensor like ``values``, with exact zeros.

    >>> soft_threshold(torch.tensor([3.0, -0.5, -2.0]), 1.0).tolist()
    [2.0, 0.0, -1.0]
    """
    return values - values.clamp(-amount, amount)


def group_norms(weight: Tensor, granularity: Granularity, layout: Layout, bias: Tensor | None = None) -> Tensor:
    r"""Return :math:`\lVert w_g \rVert_2` of every group, in float32 at least.

    Args:
        weight: Of a layer.
        granularity: Which weights are one group; of kind ``"layer"`` all are.
        layout: How the weight maps inputs to outputs.
        bias: (outputs,), where each is a part of the group of its output (or of the layer).

    Returns:
        The weight's shape for single weights, otherwise four dimensions, see
        :func:`~lightning_compress.pruning.granularity.group_scores`.

    >>> group_norms(torch.tensor([[3.0, 0.0], [0.0, 0.0]]), Granularity("filter"), Layout(), torch.tensor([4.0, 0.0]))
    tensor([[[[5.]],
    <BLANKLINE>
             [[0.]]]])
    """
    values = weight if weight.dtype == torch.float64 else weight.float()
    if granularity.single:
        return values.abs()
    squares = values.square()
    if granularity.kind == LAYER:
        sums = squares.sum().reshape(1, 1, 1, 1)
    else:
        sums = group_scores(squares, granularity, layout, "sum")
    if bias is not None:
        own = bias.to(sums.dtype).square()
        sums = sums + (own.sum() if granularity.kind == LAYER else own).reshape(sums.shape)
    return torch.where(sums > _TINY, sums.clamp(min=_TINY).sqrt(), sums.detach())


def group_size(weight: Tensor, groups: int, bias: Tensor | None = None) -> float:
    """Return how many weights a group holds, its share of the biases included.

    >>> group_size(torch.empty(4, 3), 4, torch.empty(4))
    4.0
    """
    return (weight.numel() + (0 if bias is None else bias.numel())) / max(1, groups)


def group_lasso(weight: Tensor, granularity: Granularity, layout: Layout, bias: Tensor | None = None) -> Tensor:
    r"""Return :math:`\sum_g \sqrt{|g|} \lVert w_g \rVert_2`, which can be differentiated (0 where a group is zero).

    Args:
        weight: Of a layer.
        granularity: Which weights are one group.
        layout: How the weight maps inputs to outputs.
        bias: (outputs,), where each is a part of the group of its output.

    >>> weight = torch.tensor([[3.0, 4.0], [0.0, -1.0]])
    >>> group_lasso(weight, Granularity("filter"), Layout()), group_lasso(weight, Granularity(), Layout())
    (tensor(8.4853), tensor(8.))
    """
    norms = group_norms(weight, granularity, layout, bias)
    return norms.sum() * group_size(weight, norms.numel(), bias) ** 0.5


def group_lasso_gradient(
    weight: Tensor, granularity: Granularity, layout: Layout, bias: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    r"""Return the (sub)gradient of :func:`group_lasso`: :math:`\sqrt{|g|}\, w_g / \lVert w_g \rVert_2`, 0 at 0.

    Args:
        weight: Of a layer.
        granularity: Which weights are one group.
        layout: How the weight maps inputs to outputs.
        bias: (outputs,), where each is a part of the group of its output.

    Returns:
        That by the weight and that by the bias, if there is one.

    >>> group_lasso_gradient(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), Granularity("filter"), Layout())[0]
    tensor([[0.8485, 1.1314],
            [0.0000, 0.0000]])
    """
    if granularity.single:
        return weight.sign(), None
    norms = group_norms(weight, granularity, layout, bias)
    scale = group_size(weight, norms.numel(), bias) ** 0.5
    return _scaled(weight, torch.where(norms == 0, 0.0, scale / norms), granularity, layout, bias)


def group_soft_threshold(
    weight: Tensor, amount: float, granularity: Granularity, layout: Layout, bias: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    r"""Return the proximal operator of :math:`\tau R`: every group shrunk, small ones to exact zeros.

    Args:
        weight: Of a layer.
        amount: :math:`\tau`, at least 0: learning rate times strength, after an optimizer step.
        granularity: Which weights are one group.
        layout: How the weight maps inputs to outputs.
        bias: (outputs,), where each is a part of the group of its output.

    Returns:
        The new weight, and the new bias if there is one.

    Raises:
        ConfigurationError: If ``amount`` is negative.

    >>> weight = torch.tensor([[3.0, 4.0], [0.6, 0.8]])
    >>> group_soft_threshold(weight, 2**0.5 / 2, Granularity("filter"), Layout())[0]
    tensor([[2.4000, 3.2000],
            [0.0000, 0.0000]])
    """
    if amount < 0:
        raise ConfigurationError(f"`amount` must be at least 0, got {amount!r}")
    if amount == 0:
        return weight.clone(), None if bias is None else bias.clone()
    if granularity.single:
        return soft_threshold(weight, amount), None
    norms = group_norms(weight, granularity, layout, bias)
    step = amount * group_size(weight, norms.numel(), bias) ** 0.5
    factor = torch.where(norms == 0, 0.0, 1 - step / norms).clamp(min=0)
    return _scaled(weight, factor, granularity, layout, bias)


def spread_groups(values: Tensor, granularity: Granularity, layout: Layout, like: Tensor) -> Tensor:
    """Return one number a weight from one a group.

    Args:
        values: One number a group, as :func:`group_norms` returns them.
        granularity: Which weights are one group.
        layout: How the weight maps inputs to outputs.
        like: The weight.

    >>> spread_groups(torch.tensor([1.0, 2.0]).reshape(1, 2, 1, 1), Granularity("filter"), Layout(), torch.ones(2, 2))
    tensor([[1., 1.],
            [2., 2.]])
    """
    if granularity.single:
        return values
    if granularity.kind == LAYER:
        return values.reshape((1,) * like.dim()).expand(like.shape)
    if granularity.kind == "block":
        values = values.repeat_interleave(granularity.a, 1).repeat_interleave(granularity.b, 2)
    return from_units(values.expand(to_units(like, layout).shape), layout, like.shape)


def _scaled(
    weight: Tensor, factor: Tensor, granularity: Granularity, layout: Layout, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias times the factor of their group, without negative zeros."""
    scaled = weight * spread_groups(factor, granularity, layout, weight).to(weight.dtype) + 0.0
    if bias is None:
        return scaled, None
    return scaled, bias * factor.flatten().expand(bias.shape).to(bias.dtype) + 0.0
