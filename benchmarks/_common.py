"""What all benchmarks share: interleaved timing, ratios with an interval, the environment, results on paper."""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from rich.console import Console
from rich.table import Table

from lightning_compress.evaluation.report import describe_environment

RESULTS = Path(__file__).parent / "results"
QUICK = RESULTS / "quick"
"""Not kept in version control: figures in documents come from full runs."""
Times = NDArray[np.float64]
_WIDTH = 180


@dataclass(frozen=True)
class Row:
    """One figure.

    Args:
        case: What was measured.
        value: The figure.
        unit: Its unit.
        against: What it is compared with, measured in the same run.
        ratio: The figure over that of what it is compared with.
        goal: What ``value`` should not exceed.
    """

    case: str
    value: float
    unit: str
    against: str | None = None
    ratio: float | None = None
    goal: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the goal is met, if there is one."""
        return None if self.goal is None else self.value <= self.goal


@dataclass(frozen=True)
class Ratio:
    """A ratio and its 95 % interval.

    Args:
        value: The estimate.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float


def ratio_of_medians(times: ArrayLike, against: ArrayLike, resamples: int = 4000, seed: int = 0) -> Ratio:
    """Return the ratio of two medians; the interval comes from resampling rounds, both numbers of a round together.

    >>> ratio_of_medians([2.0, 2.0, 2.0], [1.0, 1.0, 1.0])
    Ratio(value=2.0, low=2.0, high=2.0)
    """
    first, second, picks = _rounds(times, against, resamples, seed)
    ratios = np.median(first[picks], axis=1) / np.median(second[picks], axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Ratio(float(np.median(first) / np.median(second)), float(low), float(high))


def median_of_ratios(times: ArrayLike, against: ArrayLike, resamples: int = 4000, seed: int = 0) -> Ratio:
    """Return the median over the rounds of the ratio within a round; what drifts from round to round falls out.

    >>> median_of_ratios([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    Ratio(value=2.0, low=2.0, high=2.0)
    """
    first, second, picks = _rounds(times, against, resamples, seed)
    ratios = first / second
    low, high = np.percentile(np.median(ratios[picks], axis=1), [2.5, 97.5])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def _rounds(times: ArrayLike, against: ArrayLike, resamples: int, seed: int) -> tuple[Times, Times, NDArray[np.int64]]:
    first, second = np.asarray(times, float), np.asarray(against, float)
    if first.shape != second.shape or not first.size:
        raise ValueError(f"need one pair of times per round, got {first.shape} and {second.shape}")
    return first, second, np.random.default_rng(seed).integers(0, first.size, (resamples, first.size))


def time_calls(
    calls: Mapping[str, Callable[[], object]], repeats: int, seed: int = 0, before: int = 0
) -> dict[str, tuple[Times, Times]]:
    """Return wall and processor seconds of each call, interleaved in an order shuffled anew each round.

    The first round warms up and is not kept; processor seconds are those of the calling thread. A call finds the
    caches full of what others left there, unless it is made ``before`` times just before, which is not timed.
    """
    order, rng = list(calls), random.Random(seed)
    kept: dict[str, list[tuple[float, float]]] = {name: [] for name in order}
    for round_ in range(repeats + 1):
        rng.shuffle(order)
        for name in order:
            for _ in range(before):
                calls[name]()
            wall, cpu = time.perf_counter(), time.thread_time()
            calls[name]()
            cpu, wall = time.thread_time() - cpu, time.perf_counter() - wall
            if round_:
                kept[name].append((wall, cpu))
    return {name: (np.array([w for w, _ in taken]), np.array([c for _, c in taken])) for name, taken in kept.items()}


def environment(**more: Any) -> dict[str, Any]:
    """Return what the figures depend on, without names or paths of the machine."""
    facts = {
        **describe_environment(),
        "platform": f"{platform.system()} {platform.machine()}",
        "lightning": version("lightning"),
        "torchvision": version("torchvision"),
        "numpy": np.__version__,
        "cores": os.cpu_count(),
        "load_average_at_start": load_average(),
        "load_average_at_end": None,
    }
    return {**facts, **more}


def load_average() -> float | None:
    """Return how many processes wanted to run in the last minute, on average; ``None`` where nobody counts."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def arguments(description: str | None) -> argparse.Namespace:
    """Parse the command line that all benchmarks have: ``quick`` and ``out``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="the same code on less, in under two minutes")
    parser.add_argument(
        "--out", type=Path, help=f"folder for the JSON file; default {RESULTS.name}, {QUICK.name} in it if quick"
    )
    given = parser.parse_args()
    given.out = given.out or (QUICK if given.quick else RESULTS)
    return given


def publish(name: str, rows: Sequence[Row], facts: Mapping[str, Any], out: Path = RESULTS) -> Path:
    """Print the rows as a table and write them to ``out/name.json``."""
    facts = {**facts, "load_average_at_end": load_average()}
    table = Table(title=name)
    for head in ("case", "value", "unit", "against", "ratio", "goal", "met"):
        table.add_column(head, justify="left" if head in ("case", "unit", "against") else "right", overflow="fold")
    for row in rows:
        met = {None: "", True: "yes", False: "[red]no[/red]"}[row.met]
        table.add_row(
            row.case, _short(row.value), row.unit, row.against or "", _short(row.ratio), _short(row.goal), met
        )
    console = Console()
    (console if console.is_terminal else Console(width=_WIDTH)).print(table)
    out.mkdir(parents=True, exist_ok=True)
    content = {"name": name, "environment": facts, "rows": [{**asdict(row), "met": row.met} for row in rows]}
    path = out / f"{name}.json"
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def earlier(path: Path, rows: Sequence[Row]) -> list[Row]:
    """Return the rows of an earlier run that were not measured anew."""
    if not path.exists():
        return []
    known = [{key: value for key, value in row.items() if key != "met"} for row in json.loads(path.read_text())["rows"]]
    anew = {row.case for row in rows}
    return [Row(**row) for row in known if row["case"] not in anew]


def _short(number: float | None) -> str:
    return "" if number is None else f"{number:.4g}" if abs(number) < 1e5 else f"{number:,.0f}"
