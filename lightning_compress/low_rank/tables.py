"""The candidates of one layer: what it costs at each rank, and what that loses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.low_rank.costs import cost, total
from lightning_compress.low_rank.errors import Profile, error_profile
from lightning_compress.low_rank.layers import Factorized, dense_of, factor_shapes, norm_reason
from lightning_compress.low_rank.methods import Ranks, method_named
from lightning_compress.low_rank.moments import Moment
from lightning_compress.low_rank.shapes import LayerShape, shape_of

Numbers = NDArray[np.float64]
Sizes = Sequence[tuple[int, ...]]
_PARAMETER, _ACTIVATION, _CALL = 11.0, 4.0, 5e5
"""Multiply-accumulate operations in the time of reading a parameter, moving an activation, and starting a factor.

Fitted to layers and factors of AlexNet, VGG-16 and GoogLeNet, batch 1, on a CPU with AVX-512: off by 22 % on average.
"""
_LANES, _WASTE = 16, 2 / 3
"""Channels that kernels of convolutions compute together, and how much of the time of unused ones is lost.

Seen: 116 channels take the time of 128, while 112 take a sixth less; below 16 there is no such step.
"""


@dataclass(frozen=True)
class Table:
    """What one layer can become, from the smallest rank to the layer as it is, which comes last.

    Attributes:
        path: Where it is.
        method: Name of the method.
        ranks: Of each candidate; ``()`` for the last.
        parameters: Numbers that are learned.
        macs: Operations for one sample; 0 where the sizes of inputs are not known.
        time: What a pass of one sample takes: operations, traffic and calls, modelled; or milliseconds, measured.
        error: Relative squared error of the outputs.
        why: Why there is no candidate beside the layer itself, or nothing.
        directions: Of each group, enough for any candidate, where factors follow from them.
    """

    path: str
    method: str
    ranks: tuple[Ranks, ...]
    parameters: Numbers
    macs: Numbers
    time: Numbers
    error: Numbers
    why: str = ""
    directions: tuple[Tensor, ...] = field(default=(), repr=False)

    def only(self, kept: NDArray[np.bool_], why: str) -> Table:
        """Return the table with some candidates left out; ``why`` counts if none is left."""
        kept = np.append(kept[:-1], True)
        columns = {name: getattr(self, name)[kept] for name in ("parameters", "macs", "time", "error")}
        ranks = tuple(ranks for ranks, keep in zip(self.ranks, kept, strict=True) if keep)
        return replace(self, ranks=ranks, why=self.why or (why if len(ranks) == 1 else ""), **columns)


@dataclass(frozen=True)
class Decision:
    """What becomes of one layer.

    Attributes:
        method: Name of the method.
        ranks: Its ranks, or ``()`` if the layer stays as it is.
        why: Why it stays, or nothing.
        noisy: Whether variational Bayes found nothing but noise.
        error: Relative error of its outputs, as estimated: 0 to 1.
    """

    method: str
    ranks: Ranks = ()
    why: str = ""
    noisy: bool = False
    error: float = 0.0


def table_of(
    path: str,
    layer: nn.Module,
    method: str,
    sizes: Sizes = (),
    rows: Tensor | None = None,
    batch_norm: bool = False,
    smallest_only: bool = False,
    moments: Sequence[Moment] = (),
) -> Table:
    """Return the candidates of a layer, without those that would be larger or do more operations than the layer.

    Of factors they are smaller factors of the layer that these make.

    Args:
        path: Where it is.
        layer: A layer that the method fits, or factors of one.
        method: Its name, not ``"auto"``.
        sizes: Spatial sizes of its inputs at each call; of Linear the rows of one sample.
        rows: What it sees, to weigh errors with.
        batch_norm: Whether there is to be a batch norm between factors.
        smallest_only: Look at no weight, and list the smallest candidate only.
        moments: Of each group, if the factors are to keep the outputs for them.

    >>> table = table_of("fc", nn.Linear(8, 8, bias=False), "svd", [(1,)])
    >>> table.ranks, table.macs.tolist()
    (((1,), (2,), (3,), ()), [16.0, 32.0, 48.0, 64.0])
    """
    dense = dense_of(layer)
    shape = shape_of(dense)
    if smallest_only:
        profile = Profile([(shape.groups,) * len(method_named(method).full_ranks(shape))], np.ones(1), [])
    else:
        profile = error_profile(dense, method, rows, moments)
    ranks, errors, directions = profile
    costs = np.vstack([_costs_at(shape, method, ranks, sizes, batch_norm), cost_now(layer, sizes)])
    found = Table(path, method, (*ranks, ()), costs[:, 0], costs[:, 1], costs[:, 2], np.append(errors, 0.0))
    smaller = found.parameters < found.parameters[-1]
    found = found.only(smaller, "it would be larger at every rank")
    works = found.macs[-1] > 0
    found = found.only((found.macs < found.macs[-1]) | (not works), "it would do more operations at every rank")
    most = max((ranks[0] for ranks in found.ranks[:-1]), default=0) // shape.groups
    return replace(found, directions=tuple(one[:, :most].clone() for one in directions if most))


def in_steps(table: Table, groups: int, round_to: int) -> Table:
    """Return the candidates whose ranks are multiples of ``round_to``, where the layer is wide enough for one."""
    step = math.lcm(groups, round_to)
    kept = np.array([all(rank % step == 0 for rank in ranks) for ranks in table.ranks])
    return table.only(kept, "") if kept[:-1].any() else table


def _costs_at(shape: LayerShape, method: str, ranks: Sequence[Ranks], sizes: Sizes, batch_norm: bool) -> Numbers:
    """Return parameters, operations and modelled time for all ranks; with a single rank they lie on a line."""

    def at(one: Ranks) -> Numbers:
        return _cost(shape, factor_shapes(shape, method, one, batch_norm), sizes, batch_norm)

    if len(ranks) < 3 or len(method_named(method).full_ranks(shape)) > 1:
        return np.array([at(one) for one in ranks])
    first, second = at(ranks[0]), at(ranks[1])
    steps = np.arange(len(ranks), dtype=float)
    found = first + steps[:, None] * (second - first)
    if shape.kernel:
        found[:, 2] = first[2] + (_occupied(steps + 1) - 1) * (second - first)[2]
    return found


def _occupied(channels: Numbers) -> Numbers:
    """Return as how many channels some number of them counts, for the time of a convolution."""
    full = np.ceil(channels / _LANES) * _LANES
    return np.where(channels > _LANES, channels + _WASTE * (full - channels), channels)


def _cost(whole: LayerShape, factors: Sequence[LayerShape], sizes: Sizes, batch_norm: bool = False) -> Numbers:
    found = [total(whole, factors, size, batch_norm) for size in sizes]
    read, macs = total(whole, factors, (), batch_norm).parameters, sum(one.macs for one in found)
    other = sum(_PARAMETER * read + _ACTIVATION * one.moved + _CALL * len(factors) for one in found)
    return np.array([read, macs, macs + other], float)


def cost_now(layer: nn.Module, sizes: Sizes = ()) -> Numbers:
    """Return parameters, operations and modelled time of a layer as it is, factorized or not.

    >>> cost_now(nn.Linear(8, 8, bias=False), [(1,)])[:2].tolist()
    [64.0, 64.0]
    """
    if isinstance(layer, Factorized):
        return _cost(layer.whole(), layer.parts(), sizes, layer.batch_norm)
    return _cost(shape_of(layer), (shape_of(layer),), sizes)


def sizes_of(layer: nn.Module, decision: Decision | None = None, batch_norm: bool = False) -> tuple[int, int]:
    """Return the parameters of a layer before and after it becomes, or became, factors.

    >>> sizes_of(nn.Linear(8, 8, bias=False), Decision("svd", (2,)))
    (64, 32)
    """
    whole = layer.shape if isinstance(layer, Factorized) else None
    if decision is None or not decision.ranks:  # it stays, and may be a layer of another method by now
        count = sum(parameter.numel() for parameter in layer.parameters(recurse=whole is not None))
        return whole.parameters if whole is not None else count, count
    shape = whole or shape_of(layer)
    norm = batch_norm and not norm_reason(shape)
    return shape.parameters, cost(shape, decision.method, decision.ranks, batch_norm=norm).parameters


def count_weights(layer: nn.Module) -> tuple[int, int]:
    """Return the numbers that a layer multiplies with, before and after it became factors; no bias, no batch norm.

    >>> count_weights(Factorized(LayerShape("linear", 8, 8, bias=True), "svd", (2,)))
    (64, 32)
    """
    if not isinstance(layer, Factorized):
        count = sum(tensor.numel() for name, tensor in layer.named_parameters(recurse=False) if name != "bias")
        return count, count
    shape = layer.shape  # factors may be quantized or pruned by now, which their own shape does not say
    before = shape.parameters - (shape.outputs if shape.bias else 0)
    return before, sum(count_weights(part)[1] for part in layer.layers())


def shape_text(shape: LayerShape) -> str:
    """Return a shape for a plan: outputs, inputs of a group, kernel.

    >>> shape_text(LayerShape("conv", 8, 16, (3, 3), groups=2))
    '16x4x3x3'
    """
    return "x".join(map(str, (shape.outputs, shape.inputs // shape.groups, *shape.kernel)))


def layer_text(layer: nn.Module) -> str:
    """Return the shape of a layer for a plan, also where another method has made something else of it.

    >>> layer_text(nn.Conv1d(4, 6, 3))
    '6x4x3'
    """
    try:
        return shape_text(shape_of(layer))
    except ConfigurationError:
        weight = dict(layer.named_parameters(recurse=False)).get("weight")
        return type(layer).__name__ if weight is None else "x".join(map(str, weight.shape))
