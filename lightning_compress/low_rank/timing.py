"""How long layers take at several ranks on this machine, and what that means for a whole model."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_compress.core.copies import full_copy
from lightning_compress.core.isolation import call, device_of, evaluating, map_tensors
from lightning_compress.core.journal import Edit
from lightning_compress.core.latency import relative
from lightning_compress.core.paths import get_layer
from lightning_compress.core.progress import slow
from lightning_compress.core.verbs import apply
from lightning_compress.low_rank.kinds import KIND, structure
from lightning_compress.low_rank.tables import Decision, Table

Measure = Callable[[Sequence[nn.Module], Any, float], list[list[float]]]
"""Called with modules, their inputs and seconds; returns milliseconds of each in every round."""

_POINTS = 4
_FASTER = 0.98


def inputs_of(model: nn.Module, paths: Sequence[str], inputs: Any) -> dict[str, list[Tensor]]:
    """Return what each layer is called with, as tensors without memory: of that shape, type, layout and device.

    >>> net = nn.Sequential(nn.Linear(3, 2))
    >>> inputs_of(net, ["0"], torch.zeros(4, 3))["0"][0].shape
    torch.Size([4, 3])
    """
    found: dict[str, list[Tensor]] = {}

    def hook(path: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[0] if args else kwargs.get("input")
        if isinstance(given, Tensor):
            found.setdefault(path, []).append(torch.empty_like(given, device="meta"))

    device = device_of(model)
    with ExitStack() as stack, torch.inference_mode():
        stack.enter_context(evaluating(model))
        for path in paths:
            handle = get_layer(model, path).register_forward_pre_hook(partial(hook, path), with_kwargs=True)
            stack.callback(handle.remove)
        call(model, map_tensors(lambda tensor: tensor.to(device), inputs))
    return found


def measured(
    tables: Mapping[str, Table],
    layers: Mapping[str, nn.Module],
    seen: Mapping[str, Sequence[Tensor]],
    norms: Mapping[str, bool],
    measure: Measure,
    seconds: float,
) -> dict[str, Table]:
    """Return tables whose ``time`` is milliseconds: measured at a few ranks, on straight lines between.

    Candidates that are no faster than the layer are left out.

    Args:
        tables: The candidates of each layer.
        layers: The layers.
        seen: What each is called with, from :func:`inputs_of`.
        norms: Whether there is to be a batch norm between the factors of each.
        measure: The clock.
        seconds: About how long all of it may take.
    """
    found = {}
    for path, table in slow(tables.items(), "Measuring layers"):
        points = _points(len(table.ranks) - 1)
        layer = layers[path]
        models = [layer, *(structure(layer, table.method, table.ranks[point], norms[path]) for point in points)]
        times = np.zeros(len(models))
        for like in seen.get(path, ()):
            given = _filled(like, layer)
            rounds = measure(models, given, seconds / max(1, len(tables)))
            dense = statistics.median(rounds[0])
            times += dense * np.array([relative(one, rounds[0]) for one in rounds])
        shares = np.append(np.interp(table.macs[:-1], table.macs[points], times[1:]) if points else [], times[0])
        timed = replace(table, time=shares)
        found[path] = timed.only(shares < _FASTER * shares[-1], "it would be no faster at any rank, as measured")
    return found


def _points(count: int) -> list[int]:
    """Return a few of the numbers below ``count``, denser where they are small."""
    return sorted({round((count - 1) * (part / (_POINTS - 1)) ** 2) for part in range(_POINTS)}) if count else []


def _filled(like: Tensor, layer: nn.Module) -> Tensor:
    device = device_of(layer)
    if like.is_floating_point():
        return torch.ones_like(like, device=device).uniform_()
    return torch.zeros_like(like, device=device)


def trial(model: nn.Module, decisions: Mapping[str, Decision], norms: Mapping[str, bool]) -> nn.Module:
    """Return a copy of a model with factors of the chosen ranks, whose values mean nothing."""
    copied = full_copy(model)
    for path, decision in decisions.items():
        if decision.ranks:
            config = {"method": decision.method, "ranks": list(decision.ranks), "batch_norm": norms[path]}
            apply(copied, Edit("replace", path, KIND, config))
    return copied
