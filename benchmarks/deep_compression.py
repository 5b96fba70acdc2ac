"""Deep Compression on the full MNIST: prune, share, code; the file on disk against the dense float32 weights.

Runs the recipes ``deep_compression_lenet300`` and ``deep_compression_lenet5`` with several seeds. The error is that of
the compressed network on the 10,000 test images. Until all seeds are done, a run that was cut off goes on where it
stopped: the recipes' folders are kept beside the results.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import _common as common
from benchmarks._common import Row
from lightning_compress.cli import main as command
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.data import MNISTDataModule

QUICK = ("trainer.limit_train_batches=20", *(f"++stages.{s}.trainer.max_epochs=1" for s in ("train", "prune", "share")))


@dataclass(frozen=True)
class Goal:
    """What a recipe should reach.

    Args:
        error: Test error not to exceed, in per cent: the paper's dense network.
        times: How many times smaller the file should be than the dense weights.
        published: What the paper reached.
    """

    error: float
    times: float
    published: float


GOALS = {"deep_compression_lenet300": Goal(1.64, 45, 40), "deep_compression_lenet5": Goal(0.80, 60, 39)}


def run_recipe(name: str, seed: int, folder: Path, words: Sequence[str] = ()) -> dict[str, float]:
    """Return what the report of a recipe says: errors in per cent, bytes, and minutes; run it unless it is there."""
    place = folder / f"{name}-{seed}"
    if not (place / "report.json").exists():
        fresh = [f"recipes={name}", f"seed={seed}", f'hydra.run.dir="{place}"', "report.latency=false", "trainer=quiet"]
        begun = (place / "state.json").exists()
        if command([f"resume={place}"] if begun else [*fresh, *words]) != 0:
            raise RuntimeError(f"the recipe {name} failed with seed {seed}")
    report = json.loads((place / "report.json").read_text(encoding="utf-8"))
    before, after = report["baseline"], report["compressed"]
    return {
        "dense": 100 * (1 - before["metrics"]["accuracy"]),
        "error": 100 * (1 - after["metrics"]["accuracy"]),
        "full": 4 * before["parameters"],
        "bytes": after["artifact_bytes"],
        "kept": 100 * after["nonzero_parameters"] / after["parameters"],
    }


def rows_of(name: str, found: Sequence[dict[str, float]]) -> list[Row]:
    """Return the figures of one recipe over its seeds."""
    goal = GOALS[name]
    mean = {key: statistics.mean(one[key] for one in found) for key in found[0]}
    most, share = int(mean["full"] / goal.times), mean["bytes"] / mean["full"]
    relation = mean["error"] / mean["dense"] if mean["dense"] else None
    rows = [
        Row(f"{name}: test error", round(mean["error"], 4), "%", "dense, the same seeds", relation, goal.error),
        Row(f"{name}: dense test error", round(mean["dense"], 4), "%"),
        Row(f"{name}: file", round(mean["bytes"]), "bytes", "dense float32 weights", share, most),
        Row(f"{name}: times smaller", round(mean["full"] / mean["bytes"], 2), "x", f"published: {goal.published}x"),
        Row(f"{name}: parameters left", round(mean["kept"], 2), "%"),
    ]
    for seed, one in enumerate(found):
        rows.append(Row(f"{name}, seed {seed}: error", round(one["error"], 2), "%", None, None, goal.error))
        rows.append(Row(f"{name}, seed {seed}: file", one["bytes"], "bytes", None, None, most))
    return rows


def main() -> None:
    """Train, print and write the table, anew after each recipe and seed."""
    given = common.arguments(__doc__)
    torch.set_num_threads(1)
    try:
        MNISTDataModule().setup("fit")
    except ConfigurationError as error:
        print(f"skipped, there is no MNIST: {error}")
        return
    about: dict[str, Any] = common.environment(quick=given.quick, recipes=list(GOALS))
    found: dict[str, list[dict[str, float]]] = {name: [] for name in GOALS}
    folder = given.out / "deep_compression"
    for seed in range(1 if given.quick else 5):
        for name in GOALS:
            found[name].append(run_recipe(name, seed, folder, QUICK if given.quick else ()))
            rows = [row for key, seen in found.items() if seen for row in rows_of(key, seen)]
            seeds = {key: len(seen) for key, seen in found.items()}
            common.publish("deep_compression", rows, {**about, "seeds": seeds}, given.out)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
