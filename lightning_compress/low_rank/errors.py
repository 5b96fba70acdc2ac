r"""What each rank of a layer costs in output error, for all ranks at once.

Without data the error of a truncated SVD is the tail of the singular values. With rows of what the layer sees it is
:math:`\lVert X (W - \hat W_k)^\top \rVert^2 / \lVert X W^\top \rVert^2`: ranks are weighed by what reaches the output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_compress.low_rank.decompose import spectra
from lightning_compress.low_rank.matrix import as_float
from lightning_compress.low_rank.method import Effort
from lightning_compress.low_rank.methods import Ranks, method_named
from lightning_compress.low_rank.moments import Moment
from lightning_compress.low_rank.shapes import LayerShape, blocks_of, own_tensors, shape_of

Numbers = NDArray[np.float64]
_MATRIX = ("svd", "channel_svd")
_STEPS = 64
_LEVELS = 96


class Profile(NamedTuple):
    """What each rank of a layer costs.

    Attributes:
        ranks: Over all groups, from the smallest to the largest.
        errors: Relative squared output error at each; they never rise, 1 being as bad as no output.
        directions: Of each group, from which factors of any rank follow; empty for methods that have none.
    """

    ranks: list[Ranks]
    errors: Numbers
    directions: list[Tensor]


def error_profile(layer: nn.Module, method: str, rows: Tensor | None = None, moments: Sequence[Moment] = ()) -> Profile:
    """Return ranks of a method from the smallest to the largest, and the relative squared output error at each.

    Args:
        layer: A layer that the method fits.
        method: Its name.
        rows: What the layer sees, from :func:`~lightning_compress.low_rank.looking.look`; without them, and for
            methods with several ranks, the error of the weight counts.
        moments: Of each group, if the factors are to keep the outputs for them.

    >>> layer = nn.Linear(3, 3, bias=False)
    >>> _ = layer.weight.data.copy_(torch.diag(torch.tensor([3.0, 2.0, 1.0])))
    >>> ranks, errors, _ = error_profile(layer, "svd")
    >>> ranks, [round(float(error), 4) for error in errors]
    ([(1,), (2,), (3,)], [0.3571, 0.0714, 0.0])
    >>> only_the_third = torch.tensor([[[0.0, 0.0, 1.0]]])
    >>> [round(float(error), 4) for error in error_profile(layer, "svd", only_the_third).errors]
    [1.0, 1.0, 0.0]
    """
    shape, algebra = shape_of(layer), method_named(method)
    if len(algebra.full_ranks(shape)) > 1:
        return _path(layer, method, shape)
    blocks = blocks_of(as_float(own_tensors(layer)["weight"]), shape)
    given: Sequence[Moment | None] = moments or [None] * len(blocks)
    known = [algebra.principal(block, moment) for block, moment in zip(blocks, given, strict=True)]
    found = [one for one in known if one is not None]
    directions = [one for _, one in found]
    lost = None
    if rows is not None and found and not (moments and method in _MATRIX):
        lost = _lost_with(blocks, method, shape, rows, directions)
    if lost is None and found:
        lost = _tails(torch.stack([strengths for strengths, _ in found]).double().sum(0).cpu().numpy())
    if lost is None:
        lost = _tails(spectra(layer, method)[0].double().square().sum(0).cpu().numpy())
    errors = np.minimum.accumulate(np.clip(lost, 0.0, 1.0))
    return Profile([(shape.groups * rank,) for rank in range(1, len(errors) + 1)], errors, directions)


def _tails(energies: Numbers) -> Numbers:
    """Return the share of the energy behind each place; all of it is lost of a layer that is zero."""
    whole = energies.sum()
    return (whole - np.cumsum(energies)) / whole if whole > 0 else np.zeros_like(energies)


def _path(layer: nn.Module, method: str, shape: LayerShape) -> Profile:
    """Return ranks that discard about the same energy along each side, and the bound on their error: the sum."""
    tails = []
    for values in spectra(layer, method):
        tails.append(_tails(values.double().square().sum(0).cpu().numpy()))
    levels = np.unique(np.concatenate(tails))[::-1]
    levels = levels[np.unique(np.linspace(0, len(levels) - 1, _LEVELS).round().astype(int))]
    found: dict[Ranks, float] = {}
    for level in levels:
        inner = [int((tail > level + 1e-12).sum()) + 1 for tail in tails]
        kept = [min(rank, len(tail)) for rank, tail in zip(inner, tails, strict=True)]
        lost = sum(max(0.0, float(tail[rank - 1])) for rank, tail in zip(kept, tails, strict=True))
        ranks = method_named(method).usable(shape, tuple(shape.groups * rank for rank in kept))
        found[ranks] = min(1.0, lost, found.get(ranks, 1.0))
    return Profile(list(found), np.minimum.accumulate(np.array(list(found.values()))), [])


def _lost_with(
    blocks: Tensor, method: str, shape: LayerShape, rows: Tensor, directions: Sequence[Tensor]
) -> Numbers | None:
    of_group = _lost_by_matrix if method in _MATRIX else _lost_by_pair
    whole, lost = 0.0, None
    for group, block in enumerate(blocks):
        seen = rows if shape.kind == "embedding" else as_float(rows[group]).to(block.dtype)
        energy, mine = of_group(block, method, shape.kind, seen.to(block.device), directions[group])
        whole += energy
        lost = mine if lost is None else lost + mine
    return lost / whole if lost is not None and whole > 0 and np.isfinite(lost).all() else None


def _lost_by_matrix(block: Tensor, method: str, kind: str, rows: Tensor, vectors: Tensor) -> tuple[float, Numbers]:
    r"""Return the energy of a group's outputs, and what of it each rank loses: components are orthogonal there."""
    matrix, backwards = block.flatten(1), kind == "conv_transpose"
    along_outputs = (matrix.shape[0] <= matrix.shape[1]) != backwards
    matrix = matrix.t() if backwards else matrix
    if along_outputs:
        outputs = matrix[:, rows].t() if kind == "embedding" else rows @ matrix.t()
        parts = (outputs @ vectors).double().square().sum(0)
    else:
        strength = (matrix @ vectors).double().square().sum(0)
        parts = strength * (vectors[rows] if kind == "embedding" else rows @ vectors).double().square().sum(0)
    energies = parts.cpu().numpy()
    return float(energies.sum()), np.maximum(energies.sum() - np.cumsum(energies), 0.0)


def _lost_by_pair(block: Tensor, method: str, kind: str, rows: Tensor, vectors: Tensor) -> tuple[float, Numbers]:
    """Return the same for two kernels in a row, at up to 64 ranks and between them on straight lines."""
    algebra = method_named(method)
    full = min(side for side in algebra.unfoldings(block)[0].shape)
    first, second = (factor.flatten(2) for factor in algebra.split(block, (full,), Effort(directions=vectors)))
    backwards = kind == "conv_transpose"
    if backwards:
        left = rows @ block.flatten(1)
        left = left.reshape(len(rows), first.shape[1], first.shape[2], second.shape[2])
        inner = torch.einsum("sn,nry->rsy", rows, second)
    else:
        left = rows @ block.flatten(1).t()
        patches = rows.reshape(len(rows), first.shape[1], first.shape[2], second.shape[2])
        inner = torch.einsum("scxy,rcx->rsy", patches, first)
    energy = float(left.double().square().sum())
    step = max(1, math.ceil(full / _STEPS))
    places, lost = [0], [energy]
    for start in range(0, full, step):
        stop = min(full, start + step)
        if backwards:
            left = left - torch.einsum("rsy,rcx->scxy", inner[start:stop], first[start:stop])
        else:
            left = left - torch.einsum("rsy,nry->sn", inner[start:stop], second[:, start:stop])
        places.append(stop)
        lost.append(float(left.double().square().sum()))
    return energy, np.interp(np.arange(1, full + 1), places, lost)
