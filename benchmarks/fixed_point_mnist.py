"""Training in fixed point on MNIST, with both roundings, against floating point (Gupta et al. 2015).

LeNet-300-100 by plain SGD with <2,14> weights and gradients, at two learning rates: at the low one most updates are
smaller than half the distance of two fixed-point numbers. Every figure is the error on the 10,000 test images after
training, a mean over seeds.
"""

from __future__ import annotations

import shutil
import statistics
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback

from benchmarks import _common as common
from benchmarks._common import Row
from benchmarks._mnist import continued, error_on_test, find_mnist, train
from lightning_compress import FixedPointTraining
from lightning_compress.data import ImageDataModule
from lightning_compress.models import ImageClassifier, LeNet300100

REAL = "float"
BITS = (2, 14)
ARMS = (REAL, "stochastic", "nearest")
RATES = (0.003, 0.01)
"""Learning rates of SGD; at the first one both statements about rounding are judged."""
STOCHASTIC_WORSE, NEAREST_WORSE = 0.15, 0.5
"""Points of error by which stochastic rounding may, and nearest rounding must, be worse than float."""


def case_of(rate: float, arm: str) -> str:
    """Return the name of a training by SGD."""
    return f"fixed point <{BITS[0]},{BITS[1]}>, rate {rate:g}, {arm}"


def rounding_callbacks(arm: str) -> list[Callback]:
    """Return what rounds as an arm of :data:`ARMS` says; activations need a wider range than weights."""
    return [] if arm == REAL else [FixedPointTraining(BITS, (6, BITS[1]), BITS, arm)]


def error_of(data: ImageDataModule, seed: int, rate: float, arm: str, epochs: int, batches: int) -> float:
    """Return the test error of LeNet-300-100 after plain SGD."""
    torch.manual_seed(seed)
    module = ImageClassifier(LeNet300100(), partial(torch.optim.SGD, lr=rate))
    train(module, data, epochs, rounding_callbacks(arm), batches)
    return error_on_test(module, data)


def rows(errors: dict[str, list[float]]) -> list[Row]:
    """Return a row for each case: what it is compared with was trained in the same run."""
    means = {case: statistics.mean(found) for case, found in errors.items()}
    table = []
    for case, mean in means.items():
        float_case = f"{case.rpartition(', ')[0]}, {REAL}"
        base = means[float_case]
        goal = base + STOCHASTIC_WORSE if case == case_of(RATES[0], "stochastic") else None
        against = None if case == float_case else f"{REAL}, the same seeds and steps"
        table.append(Row(f"test error, {case}", round(mean, 4), "%", against, mean / base if against else None, goal))
        if len(errors[case]) > 1:
            table.append(
                Row(f"test error, {case}: spread of seeds", round(statistics.stdev(errors[case]), 4), "points")
            )
    low = {arm: means[case_of(RATES[0], arm)] for arm in ARMS}
    missing = NEAREST_WORSE - (low["nearest"] - low[REAL])
    said = f"points that nearest rounding must lose at rate {RATES[0]:g}, less what it loses"
    return [*table, Row(said, round(missing, 4), "points", None, None, 0)]


def measure(images: ImageDataModule, seed: int, epochs: int, batches: int, notes: Path) -> dict[str, float]:
    """Return the test error of each case; those that ``notes`` has already are not trained again."""
    trainings = {
        case_of(rate, arm): partial(_noted, images, seed, rate, arm, epochs, batches) for rate in RATES for arm in ARMS
    }
    found = continued(notes, trainings)
    return {case: found[case] for case in trainings}


def _noted(images: ImageDataModule, seed: int, rate: float, arm: str, epochs: int, batches: int) -> dict[str, float]:
    return {case_of(rate, arm): error_of(images, seed, rate, arm, epochs, batches)}


def main() -> None:
    """Train, print and write the table, anew after each seed; a run that was cut off goes on where it stopped."""
    given = common.arguments(__doc__)
    torch.set_num_threads(1)
    seeds, epochs, batches = (1, 1, 60) if given.quick else (1, 6, 0)
    about = common.environment(
        quick=given.quick,
        training=f"{epochs} epochs of SGD, learning rates {RATES}, batches of 128",
    )
    folder, found = given.out / "fixed_point_mnist", dict[str, list[float]]()
    for seed in range(seeds):
        images = find_mnist(seed)
        if images is None:
            return
        for case, error in measure(images, seed, epochs, batches, folder / f"{seed}.json").items():
            found.setdefault(case, []).append(error)
        common.publish("fixed_point_mnist", rows(found), {**about, "seeds": seed + 1}, given.out)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
