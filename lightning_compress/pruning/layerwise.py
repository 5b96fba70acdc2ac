r"""Layer-wise Optimal Brain Surgeon: prune a layer so that its own outputs change least on calibration data.

For one output row the squared error is :math:`\|w X - \hat w X\|^2`, a quadratic whose Hessian
:math:`H = 2 X X^\top` is the same for all rows that see the same inputs (Optimal Brain Compression, Frantar & Alistarh
2022, arXiv:2208.11580).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_compress.core.errors import ConfigurationError, did_you_mean
from lightning_compress.core.hessians import damp
from lightning_compress.pruning.granularity import Granularity
from lightning_compress.pruning.obc_trace import Trace, input_pattern, obc_trace

__all__ = ["Trace", "damp", "obc_masks", "obc_prune", "obc_trace", "reconstruct"]

ROW_SCOPES = ("layer", "row")


def obc_masks(trace: Trace, shape: tuple[int, int], count: int, scope: str = "layer") -> Tensor:
    """Return which weights stay when ``count`` of all rows together go.

    Args:
        trace: From :func:`obc_trace`.
        shape: (rows, columns) of the mask.
        count: How many weights to remove in all.
        scope: ``"layer"`` takes the cheapest removals of all rows; ``"row"`` the same number of each row (the first
            rows give one more where the count does not divide).

    Returns:
        Boolean mask, true where a weight stays.

    Raises:
        ConfigurationError: For an unknown scope, or more weights than the trace holds.

    >>> trace = Trace(torch.tensor([[1, 0], [0, 1]]), torch.tensor([[0.1, 0.2], [0.5, 9.0]]))
    >>> obc_masks(trace, (2, 2), 2).tolist(), obc_masks(trace, (2, 2), 2, scope="row").tolist()
    ([[False, False], [True, True]], [[True, False], [False, True]])
    """
    rows, steps = trace.order.shape
    if scope not in ROW_SCOPES:
        raise ConfigurationError(f"`scope` is {scope!r}: {did_you_mean(str(scope), ROW_SCOPES)}")
    if not 0 <= count <= rows * steps:
        raise ConfigurationError(f"`count` must lie in 0..{rows * steps}, got {count}")
    if scope == "row":
        each = torch.full((rows,), count // rows, device=trace.order.device)
        each[: count % rows] += 1
    else:  # a cheap removal behind a dear one can only follow it: rank by the running maximum
        price = trace.losses.cummax(1).values.flatten()
        chosen = price.argsort(stable=True)[:count]
        each = torch.bincount(chosen // max(steps, 1), minlength=rows)
    goes = torch.arange(steps, device=each.device) < each[:, None]
    kept = torch.ones(shape, dtype=torch.bool, device=each.device)
    return kept.scatter(1, trace.order, ~goes)


def reconstruct(weight: Tensor, hessian: Tensor, keep: Tensor) -> Tensor:
    r"""Return the least-squares weights on given supports, :math:`\hat w_S = H_{SS}^{-1} (H w)_S` for each row.

    That is what the updates of Optimal Brain Surgeon amount to for a given set of removed weights.

    Args:
        weight: (rows, d).
        hessian: Positive definite (d, d).
        keep: Boolean (rows, d), true where a weight stays.

    Returns:
        New weights (rows, d) in float64, exactly zero off the support; rows that lose nothing are left as they are.

    >>> H = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> new = reconstruct(torch.tensor([[1.0, 3.0]]), H, torch.tensor([[False, True]]))
    >>> [round(value, 4) for value in new[0].tolist()]
    [0.0, 3.5]
    """
    old, hessian = weight.detach().double(), hessian.double()
    new, pull = old * keep, old @ hessian
    for row, mask in enumerate(keep):
        support = mask.nonzero().flatten()
        if 0 < support.numel() < mask.numel():
            factor = torch.linalg.cholesky(hessian[support[:, None], support])
            new[row, support] = torch.cholesky_solve(pull[row, support].unsqueeze(1), factor).squeeze(1)
    return new


@dataclass(frozen=True)
class TracedLayer:
    """A layer that knows what each removal would cost, and can be pruned to any number of zeros.

    Args:
        weight: As the layer has it.
        bias: Likewise, or ``None``.
        rows: Weights and bias in float64, (groups, rows, d).
        hessian: Damped, (groups, d, d).
        trace: Of all rows.
    """

    weight: Tensor
    bias: Tensor | None
    rows: Tensor
    hessian: Tensor
    trace: Trace

    @property
    def prices(self) -> Tensor:
        r"""Each removal as a share of the output, :math:`\sum_r w_r H w_r^\top`, dearest on the way: (rows, steps)."""
        energy = torch.einsum("grd,gde,gre->", self.rows, self.hessian, self.rows)
        return self.trace.losses.cummax(1).values / energy.clamp(min=torch.finfo(energy.dtype).tiny)

    def prune(self, count: int, scope: str = "layer") -> tuple[Tensor, Tensor | None]:
        """Return new weight and bias with ``count`` zeros, in the dtypes of the old; scopes as in :func:`obc_masks`."""
        groups, each, size = self.rows.shape
        keep = obc_masks(self.trace, (groups * each, size), count, scope).view_as(self.rows)
        new = torch.cat([reconstruct(*part) for part in zip(self.rows, self.hessian, keep, strict=True)])
        columns = self.weight[0].numel()
        weight = new[:, :columns].reshape(self.weight.shape).to(self.weight.dtype)
        return weight, None if self.bias is None else new[:, columns].to(self.bias.dtype)


def trace_layer(
    weight: Tensor,
    bias: Tensor | None,
    hessian: Tensor,
    damping: float = 0.01,
    granularity: Granularity | None = None,
    steps: int | None = None,
) -> TracedLayer:
    r"""Find the order in which each row of a layer would lose its weights.

    Args:
        weight: (out, in / groups, \*kernel).
        bias: (out,) or ``None``; moves too, is never pruned.
        hessian: (groups, d, d) from :func:`layer_hessian`, not damped.
        damping: Share of the Hessian's mean diagonal that is added to it, above 0.
        granularity: An N:M pattern that the rows must have in the end, or ``None`` for single weights.
        steps: How many weights each row may lose; default all.

    Raises:
        ConfigurationError: If the Hessian does not fit the weight, or is not usable.
    """
    groups, size = len(hessian), hessian.shape[-1]
    columns = weight[0].numel()
    flat = weight.detach().flatten(1).double()
    if bias is not None:
        flat = torch.cat([flat, bias.detach().double()[:, None]], 1)
    if size != flat.shape[1] or len(flat) % groups:
        raise ConfigurationError(
            f"`hessian` must be (groups, {flat.shape[1]}, {flat.shape[1]}) for a weight {tuple(weight.shape)}"
            f"{'' if bias is None else ' with a bias'}, got {tuple(hessian.shape)}"
        )
    pattern = None
    if granularity is not None and granularity.kind == "n:m":
        pattern = input_pattern(weight.shape[1], columns // weight.shape[1], granularity.a, granularity.b)
    damped, rows = _damped(hessian.double(), damping), flat.view(groups, -1, size)
    traces = [obc_trace(part, own, steps, columns, pattern) for part, own in zip(rows, damped, strict=True)]
    whole = Trace(torch.cat([t.order for t in traces]), torch.cat([t.losses for t in traces]))
    return TracedLayer(weight.detach(), None if bias is None else bias.detach(), rows, damped, whole)


def _damped(hessian: Tensor, damping: float) -> Tensor:
    """Damp each group's Hessian; one whose inputs are all zero (a dead depthwise channel) has the others' damping."""
    mean = hessian.diagonal(dim1=-2, dim2=-1).mean(-1)
    seen = mean != 0
    if seen.all() or not seen.any():
        return damp(hessian, damping)
    eye = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device)
    damped = (damping * mean[seen].mean() * eye).repeat(len(hessian), 1, 1)
    damped[seen] = damp(hessian[seen], damping)
    return damped


def counts_over_layers(layers: Mapping[str, TracedLayer], amount: float, floor: float = 0.0) -> dict[str, int]:
    """Return how many weights each layer loses when all are weighed against each other, by relative error.

    Args:
        layers: Traced to the end, by path.
        amount: Share of all their weights that goes, 0 to below 1.
        floor: Least share of each layer that stays; at least one weight does.

    >>> trace = Trace(torch.tensor([[0, 1]]), torch.tensor([[1.0, 2.0]]).double())
    >>> small, large = (torch.tensor([[1.0, 1.0]]) * size for size in (1, 10))
    >>> eye = torch.eye(2).double().unsqueeze(0)
    >>> both = {n: TracedLayer(w, None, w.double()[None], eye, trace) for n, w in (("a", small), ("b", large))}
    >>> counts_over_layers(both, 0.5)
    {'a': 1, 'b': 1}
    """
    prices, owners = [], []
    for index, layer in enumerate(layers.values()):
        size = layer.weight.numel()
        most = min(size - 1, int(size - floor * size))
        cheapest = layer.prices.flatten().sort().values[:most]
        prices.append(cheapest)
        owners.append(torch.full_like(cheapest, index, dtype=torch.long))
    wanted = round(amount * sum(layer.weight.numel() for layer in layers.values()))
    chosen = torch.cat(owners)[torch.cat(prices).argsort(stable=True)[:wanted]]
    return dict(zip(layers, torch.bincount(chosen, minlength=len(layers)).tolist(), strict=True))


def obc_prune(
    weight: Tensor,
    bias: Tensor | None,
    hessian: Tensor,
    amount: float,
    scope: str = "layer",
    damping: float = 0.01,
    granularity: Granularity | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""Prune a whole layer to an amount with the update of Optimal Brain Compression (arXiv:2208.11580).

    Args:
        weight: (out, in / groups, \*kernel).
        bias: (out,) or ``None``; moves too, is never pruned.
        hessian: (groups, d, d) from :func:`layer_hessian`, not damped.
        amount: Share of zeros, 0 to below 1; exactly ``round(amount * size)`` weights go, but at least one stays.
        scope: ``"layer"`` or ``"row"``, see :func:`obc_masks`; all groups together.
        damping: Share of the Hessian's mean diagonal that is added to it, above 0.
        granularity: An N:M pattern, which says by itself how many weights of each row go; ``None`` for single weights.

    Returns:
        New weight and bias, in the dtypes of the old.

    >>> eye = torch.eye(2, dtype=torch.float64).unsqueeze(0)
    >>> obc_prune(torch.tensor([[1.0, 3.0], [2.0, 4.0]]), None, eye, 0.5)[0].tolist()
    [[0.0, 3.0], [0.0, 4.0]]
    """
    pattern = granularity is not None and granularity.kind == "n:m"
    count = round(amount * weight.numel())
    share = -(-count // len(weight)) if scope == "row" and not pattern else None
    traced = trace_layer(weight, bias, hessian, damping, granularity, share)
    if pattern:
        return traced.prune(traced.trace.order.numel(), "row")
    return traced.prune(min(count, weight.numel() - 1), scope)
