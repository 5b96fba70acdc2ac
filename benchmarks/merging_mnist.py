"""Four fifths of the hidden units of LeNet-300-100 merged into others without data, then fine-tuned.

Beside removing the weakest units, and a network of the small size trained from scratch for as many epochs in all. Every
figure is a mean over networks trained on MNIST from different seeds, errors those on the 10,000 test images.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import _common as common
from benchmarks._common import Row
from benchmarks.second_order_mnist import Images, test_error
from lightning_compress import ConfigurationError, NeuronMerging, ZeroChannelRemoval, compress, save_compressed
from lightning_compress.core.cost import count_macs, count_parameters
from lightning_compress.data import MNISTDataModule
from lightning_compress.data.mnist import MNIST_NORMALIZE
from lightning_compress.evaluation.latency import measure_latency
from lightning_compress.models import LeNet300100

REMOVED = 0.8
SEEDS = (3, 4, 5)
EPOCHS, TUNING = 4, 2
DECAY = 0.1
Figures = dict[str, list[float]]


def train(net: nn.Module, images: Images, epochs: int, seed: int, decay: float = 0.0) -> nn.Module:
    """Train a copy of a network with Adam, and a linearly falling rate."""
    net = copy.deepcopy(net).train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=decay)
    batches = epochs * -(-len(images[1]) // 128)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=batches)
    for _ in range(epochs):
        for index in torch.randperm(len(images[1]), generator=generator).split(128):
            optimizer.zero_grad()
            F.cross_entropy(net(images[0][index]), images[1][index]).backward()
            optimizer.step()
            falling.step()
    return net.eval()


def without_weakest(net: nn.Module, amount: float) -> nn.Module:
    """Cut the units with the least incoming weights out of both hidden layers."""
    net = copy.deepcopy(net)
    for name in ("fc1", "fc2"):
        layer = net.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        strength = torch.cat([layer.weight, layer.bias[:, None]], 1).detach().norm(dim=1)
        weakest = strength.argsort()[: round(amount * len(strength))]
        with torch.no_grad():
            layer.weight[weakest] = 0
            layer.bias[weakest] = 0
    return compress(net, ZeroChannelRemoval(), example_inputs=torch.zeros(1, 1, 28, 28))


def fresh(net: nn.Module, seed: int) -> nn.Module:
    """Return a network with the sizes of a cut one and initial weights of its own."""
    torch.manual_seed(seed)
    sizes = [784, *(net.get_parameter(f"{name}.weight").shape[0] for name in ("fc1", "fc2"))]
    hidden = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], 10))


def one_seed(train_set: Images, test_set: Images, seed: int, quick: bool, figures: Figures) -> None:
    """Add the figures of one seed."""
    epochs, tuning = (1, 1) if quick else (EPOCHS, TUNING)

    def add(case: str, value: float) -> None:
        figures.setdefault(case, []).append(value)

    for trained, decay in (("", 0.0), (f", weight decay {DECAY:g}", DECAY)):
        torch.manual_seed(seed)
        dense = train(LeNet300100(), train_set, epochs, seed, decay)
        add(f"dense{trained}", test_error(dense, test_set))
        cut = {"merged": compress(dense, NeuronMerging(REMOVED)), "weakest units cut": without_weakest(dense, REMOVED)}
        for name, small in cut.items():
            add(f"{name}{trained}", test_error(small, test_set))
            tuned = train(small, train_set, tuning, seed + 1000)
            add(f"{name}{trained}, fine-tuned", test_error(tuned, test_set))
            if name == "merged" and not decay:
                costs(dense, tuned, add)
    scratch = train(fresh(cut["merged"], seed), train_set, epochs + tuning, seed)
    add("small network from scratch", test_error(scratch, test_set))


def costs(dense: nn.Module, small: nn.Module, add: Callable[[str, float], None]) -> None:
    """Add what both networks cost."""
    images = torch.zeros(1, 1, 28, 28)
    times = measure_latency({"dense": dense, "small": small}, (images,))
    with tempfile.TemporaryDirectory() as folder:
        for name, net in (("dense", dense), ("small", small)):
            add(f"hidden units, {name}", sum(net.get_parameter(f"{layer}.weight").shape[0] for layer in ("fc1", "fc2")))
            add(f"parameters, {name}", count_parameters(net).total)
            add(f"operations, {name}", count_macs(net, images).total or 0)
            add(f"file, {name}", save_compressed(net, Path(folder) / name).bytes)
            add(f"latency of one image, {name}", times[name].median)


UNITS = {"hidden units": "units", "parameters": "weights", "operations": "MACs", "file": "bytes", "latency": "ms"}
AGAINST = {
    "merged": "weakest units cut",
    "merged, fine-tuned": "small network from scratch",
    f"merged, weight decay {DECAY:g}": f"weakest units cut, weight decay {DECAY:g}",
    f"merged, weight decay {DECAY:g}, fine-tuned": "small network from scratch",
}


def rows_of(figures: Figures) -> list[Row]:
    """Return a row of means for each case; a goal is the error of what merging must beat, or a fifth of the units."""
    middle = {True: statistics.median, False: statistics.mean}  # one disturbed latency would spoil a mean
    means = {case: middle[case.startswith("latency")](values) for case, values in figures.items()}
    rows = []
    for case, mean in means.items():
        unit = next((unit for word, unit in UNITS.items() if case.startswith(word)), None)
        if unit is not None:
            dense = means[case.rsplit(", ", 1)[0] + ", dense"]
            ratio = None if case.endswith("dense") else mean / dense
            goal = round((1 - REMOVED) * dense, 6) if case == "hidden units, small" else None
            rows.append(Row(case, round(mean, 4), unit, None if ratio is None else "dense", ratio, goal))
            continue
        other = AGAINST.get(case)
        against = None if other is None else f"{other}, the same seeds"
        goal = None if other is None else round(means[other], 3)
        ratio = mean / means[other] if other is not None and means[other] else None
        rows.append(Row(f"test error, {case}", round(mean, 3), "%", against, ratio, goal))
        if len(figures[case]) > 1:
            rows.append(
                Row(f"test error, {case}: spread of seeds", round(statistics.stdev(figures[case]), 3), "points")
            )
    return rows


def main() -> None:
    """Train, merge, fine-tune, print and write the table."""
    given = common.arguments(__doc__)
    torch.set_num_threads(1)
    try:
        splits = MNISTDataModule().splits
    except ConfigurationError as error:
        print(f"skipped, there is no MNIST: {error}")
        return
    train_set, test_set = ((MNIST_NORMALIZE(x.float() / 255), labels) for x, labels in (splits.train, splits.test))
    seeds = SEEDS[:1] if given.quick else SEEDS
    facts = common.environment(quick=given.quick, seeds=len(seeds), epochs=EPOCHS, fine_tuning=TUNING, removed=REMOVED)
    figures: Figures = {}
    for seed in seeds:
        one_seed(train_set, test_set, seed, given.quick, figures)
    common.publish("merging_mnist", rows_of(figures), facts, given.out)


if __name__ == "__main__":
    main()
