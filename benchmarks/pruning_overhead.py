"""What pruning costs while a model trains: time per step, memory, and the time of one mask update.

Steps are timed in real fits, each in a process of its own, that take turns every few steps. Goals are judged on one
thread and on processor time, which then equals wall time on an idle machine and, unlike it, leaves out
the time in which other processes ran; wall time is given beside it, and so are steps on two threads. Ratios are taken
within each round of turns, and their median over the rounds is given; the ratio of the medians over all rounds, which
lets in what drifts from round to round, stands beside it, and both are judged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from benchmarks import _common as common
from benchmarks._common import Ratio, Row, median_of_ratios, ratio_of_medians
from benchmarks._fits import CASES, OURS, PLAIN, SPARSITY, mlp, resnet, time_steps
from benchmarks._memory import measure_fit
from lightning_compress.pruning.allocation import choose_masks
from lightning_compress.pruning.masks import apply_mask
from lightning_compress.pruning.threshold import kth_smallest

RESNET_GOAL, MLP_GOAL, MEMORY_GOAL = 1.04, 1.06, 1.3
THRESHOLD_GOAL, REFRESH_GOAL = 0.2, 0.7
GOALS_SIZE = 50_000_000
_SHARES = (0.3, 0.2, 0.15, 0.12, 0.1, 0.08, 0.04, 0.01)


def step_rows(
    name: str,
    build: Callable[[], nn.Module],
    shape: Sequence[int],
    rounds: int,
    goal: float | None = None,
    threads: int = 1,
) -> list[Row]:
    """Return milliseconds per training step of every case, and where the ratio to plain training ends."""
    times = time_steps(build, shape, rounds, threads=threads)
    rows = []
    for kind, label in ((1, "processor time"), (0, "wall time")):
        plain = times[PLAIN][kind]
        for case in CASES:
            ratio = median_of_ratios(times[case][kind], plain)
            what = f"{name}: training step, {case}, {label}"
            rows.append(Row(f"{what}, median", 1e3 * float(np.median(times[case][kind])), "ms", PLAIN, ratio.value))
            if case != PLAIN:
                judged = goal if case == OURS and kind == 1 else None
                rows.append(_upper_end(f"{what}, upper end of the ratio's 95 % interval", ratio, judged))
                ratio = ratio_of_medians(times[case][kind], plain)
                rows.append(_upper_end(f"{what}, upper end for the ratio of medians", ratio, judged))
    return rows


def _upper_end(what: str, ratio: Ratio, goal: float | None) -> Row:
    return Row(what, ratio.high, "x", PLAIN, ratio.value, goal)


def memory_rows(width: int, steps: int, repeats: int, goal: float | None) -> list[Row]:
    """Return by how many bytes a fit of ten square layers grows its process: medians over processes of their own."""
    taken = {case: [measure_fit(case, width, steps) for _ in range(repeats)] for case in CASES}
    rows = []
    for key, label in (("training", "while training"), ("after", "after the fit"), ("peak", "at its peak")):
        grown = {case: float(np.median([one[key] for one in fits])) for case, fits in taken.items()}
        for case in CASES:
            what = f"{40 * width * width / 1e6:.0f} MB of weights: resident growth {label}, {case}"
            rows.append(Row(what, grown[case] / 1e6, "MB", PLAIN, grown[case] / grown[PLAIN]))
        ratio = grown[OURS] / grown[PLAIN]
        rows.append(Row(f"{what.rpartition(',')[0]}, ratio of {OURS}", ratio, "x", PLAIN, ratio, goal))
    return rows


def update_rows(size: int, repeats: int) -> list[Row]:
    """Return the seconds of one mask update over ``size`` weights in eight layers of unequal size."""
    weights = make_weights(size)
    total = sum(weight.numel() for weight in weights.values())
    tensors, count = list(weights.values()), round(SPARSITY * total)
    magnitudes = torch.cat([weight.flatten() for weight in tensors]).abs_()
    fresh = [_modules(weights) for _ in range(repeats + 1)]
    calls: dict[str, Callable[[], Any]] = {
        "threshold": lambda: kth_smallest(tensors, count, absolute=True),
        "torch.kthvalue": lambda: magnitudes.kthvalue(count),
        "refresh": partial(_refresh, weights),
        "prune.global_unstructured": lambda: prune.global_unstructured(
            fresh.pop(), pruning_method=prune.L1Unstructured, amount=SPARSITY
        ),
    }
    times = common.time_calls(calls, repeats)
    wall, cpu = ({name: float(np.median(taken[kind])) for name, taken in times.items()} for kind in (0, 1))
    rows = []
    pairs = (
        ("threshold", "exact global threshold", "torch.kthvalue", THRESHOLD_GOAL),
        ("refresh", "complete mask refresh (threshold, masks, zeros)", "prune.global_unstructured", REFRESH_GOAL),
    )
    for name, label, other, goal in pairs:
        judged = goal if size == GOALS_SIZE else None
        what = f"{size / 1e6:g} M weights: "
        rows.append(Row(f"{what}{label}, processor time", cpu[name], "s", other, cpu[name] / cpu[other], judged))
        rows.append(Row(f"{what}{label}, wall time", wall[name], "s", other, wall[name] / wall[other]))
        rows.append(Row(f"{what}{other}, processor time", cpu[other], "s"))
    return rows


def make_weights(size: int) -> dict[str, Tensor]:
    """Return normally distributed matrices of unequal size and spread, about ``size`` weights in all."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for index, share in enumerate(_SHARES):
        rows = max(2, round((share * size) ** 0.5))
        shape = (rows, max(2, round(share * size / rows)))
        weights[f"layer{index}"] = torch.randn(shape, generator=generator).mul_(0.5 + 0.1 * index)
    return weights


def _modules(weights: dict[str, Tensor]) -> list[tuple[nn.Module, str]]:
    modules: list[tuple[nn.Module, str]] = []
    for weight in weights.values():
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight)
        modules.append((layer, "weight"))
    return modules


def _refresh(weights: dict[str, Tensor]) -> None:
    masks = choose_masks(weights, SPARSITY, "global", floor=0.005)
    scratch: dict[torch.dtype, Tensor] = {}
    for key, mask in masks.items():
        apply_mask(weights[key], mask, scratch)


def measure(quick: bool) -> list[Row]:
    """Return all rows."""
    sizes = [(1_000_000, 9), (10_000_000, 1 if quick else 7), (GOALS_SIZE, 1 if quick else 5)]
    images, vectors = (32, 3, 32, 32), (128, 2048)
    rows = step_rows("ResNet-18, 32x3x32x32", resnet, images, 1 if quick else 150, RESNET_GOAL)
    rows += step_rows("MLP of 4.2 M weights, batch 128", mlp, vectors, 4 if quick else 150, MLP_GOAL)
    if not quick:
        rows += step_rows("two threads, ResNet-18, 32x3x32x32", resnet, images, 20, threads=2)
        rows += step_rows("two threads, MLP of 4.2 M weights, batch 128", mlp, vectors, 60, threads=2)
    rows += memory_rows(2048, 2 if quick else 8, 1 if quick else 3, MEMORY_GOAL)
    for size, repeats in sizes:
        rows += update_rows(size, repeats)
    return rows


def main(quick: bool, out: Path) -> Path:
    """Measure, print and write."""
    torch.set_num_threads(1)
    facts = common.environment(quick=quick, judged="processor time; one thread")
    return common.publish("pruning_overhead", measure(quick), facts, out)


if __name__ == "__main__":
    options = common.arguments(__doc__)
    main(options.quick, options.out)
