"""How long decompositions take, beside plain calls of tensorly in the same run: CP, Tucker, and a whole VGG-16.

The parts can be measured one at a time, in processes of their own that fill one file. ``--part whole`` takes the whole
network, which is a minute; ``--part whole --part beside`` puts the plain calls beside it, which take several.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import tensorly as tl
import torch
from tensorly.decomposition import parafac
from torch import Tensor, nn

from benchmarks import _common as common
from benchmarks._common import Row
from benchmarks._decompose import network, ours, peak, theirs
from lightning_compress.low_rank.cp import Sweeper, cp_start, least_squares, slices_of

NAME, PARTS = "decomposition_time", ("cp", "kernels", "whole", "beside", "memory")
LABELS = {"tucker": "Tucker and SVD", "spatial_svd": "spatial SVD and SVD"}
SWEEPS = 3
CP_GOAL, TUCKER_GOAL, MODEL_GOAL, MEMORY_GOAL = 1 / 20, 1 / 4, 60.0, 3.0
Result = TypeVar("Result")


def timed(call: Callable[[], Result]) -> tuple[float, Result]:
    """Return the processor seconds of a call and what it returned; one thread, so that other work does not count."""
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def trained_kernel(channels: int) -> Tensor:
    """Return a kernel as trained ones are: terms with falling weights, and a fifth of noise."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.arange(1, channels + 1).float() ** -0.7
    parts = [torch.randn(size, channels, generator=generator) for size in (channels, channels, 3, 3)]
    kernel = torch.einsum("nr,cr,ir,jr->ncij", parts[0] * sizes, *parts[1:])
    noise = torch.randn(kernel.shape, generator=generator)
    return kernel / kernel.norm() + 0.2 * noise / noise.norm()


def cp_rows(channels: int, rank: int) -> list[Row]:
    """Return time per iteration and error after a few."""
    kernel = trained_kernel(channels)
    slices, sizes = slices_of(kernel)
    start, terms = timed(lambda: cp_start(slices, sizes, rank))
    sweeper = Sweeper(slices, sizes, terms)
    times, error = zip(*(timed(lambda: sweeper.sweep(least_squares)) for _ in range(SWEEPS)), strict=True)
    with tl.backend_context("pytorch"):
        more = {"rank": rank, "init": "random", "random_state": 0, "tol": 0, "return_errors": True}
        whole, (_, history) = timed(lambda: parafac(kernel, n_iter_max=SWEEPS, **more))
    each, each_theirs = float(np.median(times)), whole / SWEEPS
    case = f"CP of {channels}x{channels}x3x3 at rank {rank}"
    against = "parafac"
    return [
        Row(f"{case}: an iteration", each / each_theirs, "of the time", against, each / each_theirs, CP_GOAL),
        Row(f"{case}: an iteration, seconds", each, "s", f"{against}: {each_theirs:.3g} s", each / each_theirs),
        Row(f"{case}: the start, seconds", start, "s", "an iteration of parafac", start / each_theirs),
        _error_row(f"{case}: error after {SWEEPS} iterations", error[-1], float(history[-1]), against),
    ]


def _error_row(case: str, error: float, other: float, against: str) -> Row:
    return Row(case, error, "relative error", f"{against}: {other:.4f}", error / other, other * (1 + 1e-4))


def kernel_rows(quick: bool) -> list[Row]:
    """Return the time and error of Tucker decompositions of a network's convolutions."""
    torch.manual_seed(0)
    net = nn.Sequential(*(layer for layer in network(quick) if isinstance(layer, nn.Conv2d)))
    other, errors = timed(lambda: theirs(net, "tucker"))
    own, found = timed(lambda: ours(net, "tucker"))
    case, against = f"Tucker of {_name(quick)}'s convolutions", f"partial_tucker: {other:.3g} s"
    return [
        Row(case, own / other, "of the time", against, own / other, TUCKER_GOAL),
        Row(f"{case}, seconds", own, "s", against, own / other),
        _error_row(f"{case}: mean error", _mean(found), _mean(errors), "partial_tucker"),
    ]


@cache
def plain(quick: bool) -> tuple[float, dict[str, float]]:
    """Return time and errors of plain calls for all layers: Tucker of kernels, truncated SVD of the rest."""
    torch.manual_seed(0)
    net = network(quick)
    return timed(lambda: theirs(net, "tucker"))


@cache
def own(kernels: str, quick: bool) -> tuple[float, dict[str, float]]:
    """Return time and errors of our factors of all layers."""
    torch.manual_seed(0)
    net = network(quick)
    return timed(lambda: ours(net, kernels))


def whole_rows(kernels: str, quick: bool, beside: bool) -> list[Row]:
    """Return the time and error of all layers of a network, alone or beside plain calls in the same process."""
    (taken, found), case = own(kernels, quick), f"all of {_name(quick)}, {LABELS[kernels]}"
    if not beside:
        error = Row(f"{case}: mean error", _mean(found), "relative error")
        return [Row(case, taken, "s", goal=MODEL_GOAL), error]
    other, errors = plain(quick)
    rows = [Row(case, taken, "s", f"plain calls of tensorly: {other:.3g} s", taken / other, MODEL_GOAL)]
    if kernels == "tucker":
        rows.append(_error_row(f"{case}: mean error", _mean(found), _mean(errors), "plain calls of tensorly"))
    return rows


def _name(quick: bool) -> str:
    return "three layers of VGG-16" if quick else "VGG-16"


def _mean(errors: dict[str, float]) -> float:
    return float(np.mean(list(errors.values())))


def memory_row(kernels: str, quick: bool) -> Row:
    """Return the peak memory of a whole network's decomposition, the network included."""
    figures = peak(kernels, quick)
    share = figures["peak"] / figures["model"]
    goal = None if quick else MEMORY_GOAL
    return Row(f"peak memory, {kernels} and SVD", share, "times the model", "the model itself", share, goal)


def measure(part: str, quick: bool) -> list[Row]:
    """Return the rows of one part, see :data:`PARTS`."""
    if part == "cp":
        rows = cp_rows(96, 128) if quick else cp_rows(512, 832)
    elif part == "kernels":
        rows = kernel_rows(quick)
    elif part in ("whole", "beside"):
        rows = [row for kernels in LABELS for row in whole_rows(kernels, quick, part == "beside")]
    else:
        rows = [memory_row("tucker", quick)]
    return [replace(row, goal=None) for row in rows] if quick else rows


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the same code on less, in under two minutes")
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part; may be given several times")
    given = parser.parse_args()
    torch.set_num_threads(1)
    out = given.out or (common.QUICK if given.quick else common.RESULTS)
    for part in given.part or PARTS:
        facts = common.environment(quick=given.quick, threads=1)
        rows = measure(part, given.quick)
        common.publish(NAME, [*common.earlier(out / f"{NAME}.json", rows), *rows], facts, out)


if __name__ == "__main__":
    main()
