"""Binary weights, and binary inputs too, on MNIST, against the figures of the papers, after far fewer epochs.

Perceptrons with batch norm and Adam: three hidden layers of 1,024 units as in BinaryConnect (Courbariaux et al. 2015),
whose weights are signs in every layer, and for XNOR-Net (Rastegari et al. 2016) of 4,096 as well, the size for which
BinaryNet (Hubara et al. 2016) reports an error; its first and last layers stay float, and a fifth of the pixels is
dropped while it trains, as BinaryNet does (without that, 1.57 % instead of 1.34 %). A net trained with stochastic signs
is tested twice: with the signs of its weights, and as the paper does it, with the float weights behind them. Images are
neither shifted nor turned. Every figure is the error on the 10,000 test images, a mean over seeds.
"""

from __future__ import annotations

import copy
import shutil
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch.nn.utils import parametrize
from torch.optim.lr_scheduler import ExponentialLR

from benchmarks import _common as common
from benchmarks._common import Row
from benchmarks._mnist import continued, error_on_test, find_mnist, train
from lightning_compress import Binarization, Select
from lightning_compress.data import ImageDataModule
from lightning_compress.models import ImageClassifier, Perceptron
from lightning_compress.quantization.binary.functions import glorot_bound

RATE, LAST_RATE = 3e-3, 2e-5
WITHIN = 0.5
"""Points by which a shorter training may miss the papers."""


@dataclass(frozen=True)
class Arm:
    """What is trained.

    Args:
        units: Of each of three hidden layers.
        relu: Whether a ReLU follows each batch norm.
        callbacks: Made anew for each training.
        against: The case that it is compared with.
        published: Error of the paper in per cent, after hundreds of epochs.
        dropout: Share of pixels dropped in training.
    """

    units: int
    relu: bool
    callbacks: Callable[[], list[Callback]]
    against: str | None = None
    published: float | None = None
    dropout: float = 0.0


def signs(stochastic: bool) -> list[Callback]:
    """Return BinaryConnect in all layers."""
    return [Binarization(stochastic=stochastic, select=Select())]


def xnor() -> list[Callback]:
    """Return XNOR-Net: signs of weights and of inputs, with a scale for each unit."""
    return [Binarization("xnor")]


FLOAT, STOCHASTIC, BEHIND = "float, 1,024 units", "BinaryConnect, stochastic", ", tested with float weights"
ARMS = {
    FLOAT: Arm(1024, True, list),
    "BinaryConnect": Arm(1024, True, partial(signs, False), FLOAT, 1.29),
    STOCHASTIC: Arm(1024, True, partial(signs, True), FLOAT, 1.18),
    "XNOR-Net, 4,096 units": Arm(4096, False, xnor, FLOAT, 0.96, dropout=0.2),
}


def errors_of(data: ImageDataModule, seed: int, case: str, epochs: int, batches: int) -> dict[str, float]:
    """Return test errors in per cent after Adam with a rate that falls every epoch, of the binary copy if any."""
    torch.manual_seed(seed)
    arm = ARMS[case]
    falling = partial(ExponentialLR, gamma=(LAST_RATE / RATE) ** (1 / epochs))
    net = Perceptron(hidden=[arm.units] * 3, relu=arm.relu, dropout=arm.dropout)
    module, callbacks = ImageClassifier(net, partial(torch.optim.Adam, lr=RATE), falling), arm.callbacks()
    train(module, data, epochs, callbacks, batches, accelerator="auto")
    binary = next((callback.compressed for callback in callbacks if isinstance(callback, Binarization)), None)
    found = {case: error_on_test((module if binary is None else binary).cpu(), data)}
    if case == STOCHASTIC:
        found[case + BEHIND] = error_on_test(behind(module).cpu(), data)
    return found


def behind(module: ImageClassifier) -> ImageClassifier:
    """Return a copy with the float weights whose signs it trained with, on the scale of the signs: from -1 to 1."""
    module = copy.deepcopy(module)
    for layer in module.modules():
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
            with torch.no_grad():
                layer.weight /= glorot_bound(layer.weight)
    return module


def rows(errors: dict[str, list[float]]) -> list[Row]:
    """Return a row for each case, and one for its spread; goals are the papers' figures and a margin."""
    means = {case: statistics.mean(found) for case, found in errors.items()}
    table = []
    for case, mean in means.items():
        arm = ARMS[case.removesuffix(BEHIND)]
        published = None if case == STOCHASTIC else arm.published
        against = f"{arm.against}, the same seeds and epochs" if arm.against else None
        ratio = mean / means[arm.against] if arm.against else None
        goal = None if published is None else round(published + WITHIN, 2)
        table.append(Row(f"test error, {case}", round(mean, 4), "%", against, ratio, goal))
        if len(errors[case]) > 1:
            spread = round(statistics.stdev(errors[case]), 4)
            table.append(Row(f"test error, {case}: spread of seeds", spread, "points"))
    return table


def measure(images: ImageDataModule, seed: int, epochs: int, batches: int, notes: Path) -> dict[str, dict[str, Any]]:
    """Return test error and device of each case; those that ``notes`` has already are not trained again."""
    return continued(notes, {case: partial(_noted, images, seed, case, epochs, batches) for case in ARMS})


def _noted(images: ImageDataModule, seed: int, case: str, epochs: int, batches: int) -> dict[str, dict[str, Any]]:
    errors = errors_of(images, seed, case, epochs, batches)
    return {name: {"error": error, "on": device()} for name, error in errors.items()}


def device() -> str:
    """Return what trains here, and with which torch: notes may come from several machines."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "processor"
    return f"{name}, torch {torch.__version__.partition('+')[0]}"


def counted(errors: dict[str, list[float]]) -> dict[str, dict[str, int]]:
    """Return how many seeds each case has: a run that is cut off leaves some with fewer."""
    return {"seeds": {case: len(found) for case, found in errors.items()}}


def main() -> None:
    """Train, print and write the table, anew after each seed; a run that was cut off goes on where it stopped."""
    given = common.arguments(__doc__)
    torch.set_num_threads(1)
    seeds, epochs, batches = (1, 1, 10) if given.quick else (3, 40, 0)
    about = common.environment(
        quick=given.quick,
        training=f"{epochs} epochs of Adam, learning rate {RATE:g} to {LAST_RATE:g}, batches of 128, 55,000 images",
        published="BinaryConnect 1.29, stochastic 1.18; BinaryNet, whose inputs are as binary as XNOR-Net's, 0.96",
    )
    folder, errors, places = given.out / "binary_mnist", dict[str, list[float]](), dict[str, list[str]]()
    for seed in range(seeds):
        images = find_mnist(seed)
        if images is None:
            return
        for case, found in measure(images, seed, epochs, batches, folder / f"{seed}.json").items():
            errors.setdefault(case, []).append(found["error"])
            places[case] = sorted({*places.get(case, []), found["on"]})
        common.publish("binary_mnist", rows(errors), {**about, **counted(errors), "trained_on": places}, given.out)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
