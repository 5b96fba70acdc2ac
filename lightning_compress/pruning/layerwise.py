r"""Layer-wise Optimal Brain Surgeon: prune a layer so that its own outputs change least on calibration data.

For one output row the squared error is :math:`\|w X - \hat w X\|^2`, a quadratic whose Hessian
:math:`H = 2 X X^\top` is the same for all rows that see the same inputs (Optimal Brain Compression, Frantar & Alistarh
2022, arXiv:2208.11580).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_compress.core.errors import ConfigurationError, did_you_mean

ROW_SCOPES = ("layer", "row")

_COMPACT = 16
_CHUNK_BYTES = 1 << 25


def damp(hessian: Tensor, damping: float) -> Tensor:
    r"""Return :math:`H + \lambda\,\overline{\mathrm{diag} H}\, I` for each matrix of a batch.

    Args:
        hessian: (..., d, d).
        damping: The share of the mean diagonal to add, above 0; inputs that are always 0 need it.

    Raises:
        ConfigurationError: If a diagonal is all zero or not finite, so that there is nothing to go by.

    >>> damp(torch.diag(torch.tensor([1.0, 3.0])), 0.5).tolist()
    [[2.0, 0.0], [0.0, 4.0]]
    """
    mean = hessian.diagonal(dim1=-2, dim2=-1).mean(-1)
    if not bool((mean > 0).all() and mean.isfinite().all()):
        raise ConfigurationError(
            "`hessian`: the layer's inputs on the calibration batches are all zero or not finite; give other batches"
        )
    eye = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device)
    return hessian + damping * mean[..., None, None] * eye


@dataclass(frozen=True)
class Trace:
    """In which order each row would lose its weights, and at what price.

    Args:
        order: Column indices (rows, steps).
        losses: Rise of the row's squared error at each removal (rows, steps).
    """

    order: Tensor
    losses: Tensor


def obc_trace(weight: Tensor, hessian: Tensor, steps: int | None = None, prunable: int | None = None) -> Trace:
    r"""Remove the weights of each row greedily, with rank-1 downdates of the row's own inverse Hessian.

    .. math:: p = \arg\min_p \frac{w_p^2}{[H^{-1}]_{pp}}, \quad w \leftarrow w - H^{-1} e_p \frac{w_p}{[H^{-1}]_{pp}}

    Takes about ``d^3 / 3`` operations a row; removed rows and columns are dropped from time to time.

    Args:
        weight: (rows, d).
        hessian: Positive definite (d, d), shared by the rows.
        steps: How many weights to remove of each row; default all that may go.
        prunable: Only the first so many columns may go (what follows is a bias); default all.

    Returns:
        Order and losses; nothing is changed.

    Raises:
        ConfigurationError: If shapes do not fit, ``steps`` is out of range, or the Hessian is not positive definite.

    >>> H = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> obc_trace(torch.tensor([[1.0, 3.0], [3.0, 1.0]]), H).order.tolist()
    [[0, 1], [1, 0]]
    """
    size = weight.shape[1]
    limit = size if prunable is None else prunable
    steps = limit if steps is None else steps
    if hessian.shape != (size, size):
        raise ConfigurationError(f"`hessian` must be ({size}, {size}), got {tuple(hessian.shape)}")
    if not 0 <= steps <= limit <= size:
        raise ConfigurationError(f"`steps` must lie in 0..{limit}, got {steps}")
    hessian, value = hessian.double(), weight.detach().double()
    tied = (hessian - hessian.diagonal().diag() != 0).any(0)
    tied[limit:] = True
    alone, joined = (~tied).nonzero().flatten(), tied.nonzero().flatten()
    inverse = _inverse(hessian[joined[:, None], joined])
    chunk = max(1, _CHUNK_BYTES // (8 * max(1, joined.numel()) ** 2))
    most = min(steps, int((joined < limit).sum()))
    parts = [_trace_rows(part, inverse, most, limit - alone.numel()) for part in value[:, joined].split(chunk)]
    order = torch.cat([joined[part.order] for part in parts])
    losses = torch.cat([part.losses for part in parts])
    return _with_alone(Trace(order, losses), alone, value[:, alone].square() * hessian.diagonal()[alone], steps)


def _with_alone(trace: Trace, alone: Tensor, prices: Tensor, steps: int) -> Trace:
    """Add columns that have nothing in common with others (inputs that are always 0), whose price never changes."""
    cheapest = prices.argsort(1)
    order = torch.cat([alone[cheapest], trace.order], 1)
    losses = torch.cat([prices.gather(1, cheapest), trace.losses], 1)
    rank = torch.cat([prices.gather(1, cheapest), trace.losses.cummax(1).values], 1).argsort(stable=True, dim=1)[
        :, :steps
    ]
    return Trace(order.gather(1, rank), losses.gather(1, rank))


def _inverse(hessian: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(hessian)
    if bool(info.any()):
        raise ConfigurationError("`hessian` is not positive definite; raise `damping` or give more calibration data")
    return torch.cholesky_inverse(factor)


def _trace_rows(weight: Tensor, inverse: Tensor, steps: int, prunable: int) -> Trace:
    count, size = weight.shape
    value, own = weight.clone(), inverse.expand(count, size, size).clone()
    place = torch.arange(size, device=weight.device).expand(count, size)
    open_ = place < prunable
    rows = torch.arange(count, device=weight.device)
    order = torch.empty(count, steps, dtype=torch.long, device=weight.device)
    losses = torch.empty(count, steps, dtype=weight.dtype, device=weight.device)
    alive = torch.ones_like(open_)
    every = max(8, size // _COMPACT)
    for step in range(steps):
        if step and step % every == 0:
            kept = alive.nonzero()[:, 1].reshape(count, -1)
            own = own[rows[:, None, None], kept[:, :, None], kept[:, None, :]]
            value, place, open_ = value.gather(1, kept), place.gather(1, kept), open_.gather(1, kept)
            alive = torch.ones_like(open_)
        scores = torch.where(open_, value.square() / own.diagonal(dim1=1, dim2=2), torch.inf)
        best, worst = scores.min(1)
        column = own[rows, :, worst]
        scaled = column / column[rows, worst].unsqueeze(1)
        order[:, step], losses[:, step] = place[rows, worst], best
        value -= scaled * value[rows, worst].unsqueeze(1)
        own.addcmul_(scaled.unsqueeze(2), column.unsqueeze(1), value=-1)
        open_[rows, worst], alive[rows, worst] = False, False
    return Trace(order, losses)


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


def obc_prune(
    weight: Tensor,
    bias: Tensor | None,
    hessian: Tensor,
    amount: float,
    scope: str = "layer",
    damping: float = 0.01,
) -> tuple[Tensor, Tensor | None]:
    r"""Prune a whole layer to an amount with the update of Optimal Brain Compression (arXiv:2208.11580).

    Args:
        weight: (out, in / groups, \*kernel).
        bias: (out,) or ``None``; moves too, is never pruned.
        hessian: (groups, d, d) from :func:`layer_hessian`, not damped.
        amount: Share of zeros, 0 to below 1; exactly ``round(amount * size)`` weights go, but at least one stays.
        scope: ``"layer"`` or ``"row"``, see :func:`obc_masks`; all groups together.
        damping: Share of the Hessian's mean diagonal that is added to it, above 0.

    Returns:
        New weight and bias, in the dtypes of the old.

    >>> eye = torch.eye(2, dtype=torch.float64).unsqueeze(0)
    >>> obc_prune(torch.tensor([[1.0, 3.0], [2.0, 4.0]]), None, eye, 0.5)[0].tolist()
    [[0.0, 3.0], [0.0, 4.0]]
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
    damped = damp(hessian.double(), damping)
    count = min(round(amount * weight.numel()), weight.numel() - 1)
    share = -(-count // len(flat)) if scope == "row" else columns
    parts = flat.view(groups, -1, size)
    traces = [obc_trace(part, own, share, columns) for part, own in zip(parts, damped, strict=True)]
    whole = Trace(torch.cat([t.order for t in traces]), torch.cat([t.losses for t in traces]))
    keep = obc_masks(whole, (len(flat), size), count, scope).view_as(parts)
    new = torch.cat([reconstruct(*part) for part in zip(parts, damped, keep, strict=True)])
    return (
        new[:, :columns].reshape(weight.shape).to(weight.dtype),
        None if bias is None else new[:, columns].to(bias.dtype),
    )
