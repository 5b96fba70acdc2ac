"""Which rank each layer gets: by a rule for each, or by dividing a goal for the whole model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import nn

from lightning_compress.core.allocation import Line, least_cost, least_error
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.low_rank.allocation import fastest
from lightning_compress.low_rank.costs import cost
from lightning_compress.low_rank.decompose import best_method, spectra
from lightning_compress.low_rank.evbmf import evbmf
from lightning_compress.low_rank.factors import Factors
from lightning_compress.low_rank.layers import Factorized, dense_of, shape_now
from lightning_compress.low_rank.methods import Ranks, method_named
from lightning_compress.low_rank.shapes import blocks_of, own_tensors, shape_of
from lightning_compress.low_rank.tables import Decision, Sizes, Table, cost_now


def own_ranks(
    path: str, layer: nn.Module, method: str, factors: Factors, table: Table, named: bool = False
) -> Decision:
    """Return what a rule for single layers makes of one.

    Args:
        path: Where the layer is, for messages.
        layer: The layer.
        method: Name of the method.
        factors: With a ``rank``.
        table: Its candidates.
        named: Whether the rank was given for this very layer, so that one out of range is an error.

    Raises:
        ConfigurationError: If the rank is out of range for a layer that was named, or not as many numbers as it takes.
    """
    shape, rank = shape_now(layer), factors.rank
    full = method_named(method).full_ranks(shape)
    if isinstance(rank, Mapping):
        return _by_share(table, rank)
    if isinstance(rank, str):
        found = evbmf_ranks(layer, method)
        wanted = tuple(max(one, shape.groups) for one in found)
        return Decision(method, _in_steps(wanted, full, shape.groups, factors.round_to), noisy=0 in found)
    several = rank if isinstance(rank, tuple) else (rank or 1,)
    if len(several) != len(full):
        raise ConfigurationError(
            f"`rank` of {path!r}: {method!r} takes {method_named(method).rank_names}, got {list(several)}"
        )
    over = any(one > most for one, most in zip(several, full, strict=True))
    if named and (over or any(one % shape.groups for one in several)):
        step = f", in multiples of its {shape.groups} groups" if shape.groups > 1 else ""
        raise ConfigurationError(f"`rank` of {path!r} may be up to {list(full)}{step}, got {list(several)}")
    if over:
        return Decision(method, (), f"the rank {list(several)} is above its full rank {list(full)}")
    return Decision(method, _in_steps(several, full, shape.groups, factors.round_to))


def _in_steps(wanted: Ranks, full: Ranks, groups: int, round_to: int) -> Ranks:
    """Return ranks rounded up to the multiples that are asked for, where the layer is wide enough."""
    step = math.lcm(groups, round_to)
    step = step if all(most >= step for most in full) else groups
    return tuple(min(-(-one // step) * step, most) for one, most in zip(wanted, full, strict=True))


def _by_share(table: Table, rank: Mapping[str, float]) -> Decision:
    """Return the smallest rank that keeps so much energy, or the largest that is so many times smaller."""
    kind, value = next(iter(rank.items()))
    last = len(table.ranks) - 1
    if kind == "energy":
        picks = [pick for pick in range(last) if table.error[pick] <= 1 - value + 1e-12]
        why = table.why or f"a rank that keeps {value:g} of its energy would make it no smaller"
        return Decision(table.method, table.ranks[picks[0]]) if picks else Decision(table.method, (), why)
    picks = [pick for pick in range(last) if table.parameters[pick] * value <= table.parameters[last]]
    why = table.why or f"no rank makes it {value:g} times smaller"
    return Decision(table.method, table.ranks[picks[-1]]) if picks else Decision(table.method, (), why)


def evbmf_ranks(layer: nn.Module, method: str = "auto") -> Ranks:
    """Return the ranks that variational Bayes finds, over all groups of a layer; 0 where there is only noise.

    Args:
        layer: A layer that the method fits; its weight counts, not what it sees.
        method: Name of the method.

    >>> import torch
    >>> layer = nn.Linear(40, 30)
    >>> _ = layer.weight.data.copy_(torch.ones(30, 40) + 0.01 * torch.randn(30, 40))
    >>> evbmf_ranks(layer)
    (1,)
    """
    found: list[int] = []
    for values in spectra(layer, method):
        sides = _sides(layer, method, len(found))
        found.append(len(values) * max(evbmf(one, sides).rank for one in values))
    return tuple(found)


def _sides(layer: nn.Module, method: str, index: int) -> tuple[int, int]:
    """Return the shape of the matrix whose singular values a rank is chosen by."""
    chosen = method_named(best_method(layer) if method == "auto" else method)
    dense = dense_of(layer)
    block = blocks_of(own_tensors(dense)["weight"].detach(), shape_of(dense))[0]
    rows, columns = chosen.unfoldings(block)[index].shape
    return rows, columns


def grows(layer: nn.Module, method: str, ranks: Ranks, sizes: Sizes, batch_norm: bool) -> str:
    """Return why factors of these ranks would not be smaller than the layer, or would do more, or nothing."""
    shape = shape_now(layer)
    if isinstance(layer, Factorized) and (layer.method, layer.ranks) == (method, ranks):
        return f"its rank is {list(ranks)} already"
    now, before = (int(figure) for figure in cost_now(layer, sizes)[:2])
    parameters = cost(shape, method, ranks, batch_norm=batch_norm).parameters
    if parameters >= now:
        return f"at {list(ranks)} it would grow from {now:,} to {parameters:,} parameters"
    after = sum(cost(shape, method, ranks, size, batch_norm).macs for size in sizes)
    if before and after >= before:
        return f"at {list(ranks)} it would do {after:,} operations instead of {before:,}"
    return ""


def divide(tables: Sequence[Table], goal: str, budget: float, favor: str = "accuracy") -> tuple[int, ...] | None:
    """Return which candidate each layer takes so that the model meets a goal; ``None`` if it cannot.

    Args:
        tables: The candidates of each layer.
        goal: The column that is limited: ``"parameters"``, ``"macs"`` or ``"time"``.
        budget: What its sum may be.
        favor: ``"accuracy"`` makes the sum of losses least; ``"speed"`` makes the time least for which the errors sum
            up to no more than with an equal share of the cost for every layer.
    """
    lines = [Line(getattr(table, goal), table.error, table.time) for table in tables]
    if favor == "speed" and goal == "parameters":
        return fastest(lines, budget)
    return least_error(lines, budget)


def smallest(tables: Sequence[Table], goal: str) -> float:
    """Return the smallest sum of a column that any choice has."""
    return least_cost([Line(getattr(table, goal), table.error, table.time) for table in tables])
