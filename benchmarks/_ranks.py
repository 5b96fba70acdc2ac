"""The networks of the survey's Table II, the ranks of their layers at several rates, and what those ranks cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torchvision
from torch import nn

from lightning_compress import Select
from lightning_compress.low_rank.allocation import Line, equal_share
from lightning_compress.low_rank.factors import FAVORS, Factors
from lightning_compress.low_rank.goals import Goal
from lightning_compress.low_rank.planner import Layers, choose_for_goal, decision_of
from lightning_compress.low_rank.selection import find_layers
from lightning_compress.low_rank.tables import Decision
from lightning_compress.low_rank.timing import trial

Found = dict[str, Any]
"""What was chosen for a network: ranks by path, and what they lose."""


@dataclass(frozen=True)
class Entry:
    """One network of the table.

    Args:
        build: Returns it.
        rates: Compression rates of the survey's two rows.
        survey: Their speed-ups.
        goals: Speed-ups to reach at batch 1 and 16, channels last, at the larger rate.
    """

    build: Callable[[], nn.Module]
    rates: tuple[float, float]
    survey: tuple[float, float]
    goals: Mapping[int, float]


ENTRIES = {
    "AlexNet": Entry(torchvision.models.alexnet, (4.94, 5.00), (1.09, 1.82), {1: 4.0, 16: 4.0}),
    "VGG-16": Entry(
        partial(torchvision.models.vgg16, init_weights=False), (2.72, 2.75), (1.53, 2.05), {1: 3.6, 16: 2.5}
    ),
    "GoogLeNet": Entry(
        partial(torchvision.models.googlenet, aux_logits=False, init_weights=False),
        (2.79, 2.84),
        (1.08, 1.20),
        {1: 2.1, 16: 1.6},
    ),
}
FRONTIER = (4.0, 6.0, 8.0)
DEFAULT = Factors().favor
WAYS = (DEFAULT, *(favor for favor in FAVORS if favor != DEFAULT), "equal")
"""How a rate is divided: as by default, as the callback can also do it, and the same share for every layer."""


def network(name: str) -> nn.Module:
    """Return a network as it is built, the same each time."""
    torch.manual_seed(0)
    return ENTRIES[name].build().eval()


def choose_ranks(name: str, image: int = 224, batch: int = 8) -> dict[str, Found]:
    """Return the ranks of one network for each rate and way, with the errors that they cost.

    What ``compress(model, LowRank(compression_rate=rate, batches=[images]))`` does, but the singular values of a layer
    are found once for all rates.

    Args:
        name: A key of :data:`ENTRIES`.
        image: Height and width of the input.
        batch: Images in the calibration batch.
    """
    model = network(name)
    images = torch.randn(batch, 3, image, image, generator=torch.Generator().manual_seed(1))
    how = Factors()
    selection, methods = find_layers(model, Select(), how)
    layers = Layers(model, selection.layers, methods, how.of(model, list(methods)))
    layers.look(None, [images], how.samples)
    layers.fill()
    rates = sorted({*ENTRIES[name].rates, *FRONTIER})
    return {f"{rate:g} {way}": _chosen(layers, rate, way) for rate in rates for way in WAYS}


def _chosen(layers: Layers, rate: float, way: str) -> Found:
    if way == "equal":
        decisions = _equal(layers, rate)
    else:
        decisions = choose_for_goal(layers, list(layers.tables), {}, Goal("compression_rate", rate), way)
    errors = [one.error for one in decisions.values()]
    return {
        "ranks": {path: [one.method, *one.ranks] for path, one in decisions.items() if one.ranks},
        "summed_error": sum(errors),
        "summed_squared_error": sum(error**2 for error in errors),
        "largest_error": max(errors),
        "layers": len(errors),
    }


def _equal(layers: Layers, rate: float) -> dict[str, Decision]:
    tables = list(layers.tables.values())
    whole = sum(parameter.numel() for parameter in layers.model.parameters())
    rest = whole - sum(float(table.parameters[-1]) for table in tables)
    picks = equal_share([Line(table.parameters, table.error, table.time) for table in tables], whole / rate - rest)
    if picks is None:
        raise ValueError(f"{rate} times fewer parameters are out of reach")
    return {table.path: decision_of(table, pick, "rate") for table, pick in zip(tables, picks, strict=True)}


def factorized(model: nn.Module, ranks: Mapping[str, Sequence[Any]]) -> nn.Module:
    """Return a copy of a network with factors of the chosen ranks; their values do not matter for the time."""
    decisions = {path: Decision(method, tuple(numbers)) for path, (method, *numbers) in ranks.items()}
    return trial(model, decisions, dict.fromkeys(decisions, False))
