"""A convolutional net for CIFAR-10 (JPEG copy) trained from scratch, dense and as low-rank factors (Tai et al. 2016).

Their claim: the low-rank net, with batch norm between its factors, ends more accurate than the dense one and each of
its epochs takes less time. The net is the one of the authors' logs (three 5x5 convolutions, ranks 10, 51 and 51), at
half its width and on a part of the images, so that a processor trains it in minutes. All ways see the same images in
the same order for the same number of epochs, with one optimizer, and start from the same seeds. A third way, dense with
batch norm behind its convolutions, says how much is due to batch norm: measured so far, more than all of it. Time is
that of the processor, in the same run.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from benchmarks import _common as common
from benchmarks._common import Row
from benchmarks._students import classifier, test_error
from lightning_compress import ConfigurationError, LowRank
from lightning_compress.data import ImageFolderDataModule, Normalize, ResumableLoader, TensorImages
from lightning_compress.data.few import some_of_each
from lightning_compress.data.tensors import already_batched

NORMALIZE = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CHANNELS, RANKS, MIXED, HIDDEN = (48, 64, 128), (5, 26, 26), 32, 128
PER_CLASS, EPOCHS, SEEDS, BATCH, PEAK = 1000, 8, 1, 128, 0.02
DENSE, NORMED, LOW_RANK = "dense", "dense with batch norm", "low rank with batch norm"
WAYS = (DENSE, NORMED, LOW_RANK)


def build(way: str) -> nn.Sequential:
    """Return the net, with batch norm behind each convolution if that is the way."""
    layers: list[nn.Module] = []
    for before, after in zip((3, *CHANNELS), CHANNELS, strict=False):
        norm = [nn.BatchNorm2d(after)] if way == NORMED else []
        layers += [nn.Conv2d(before, after, 5, padding=2), *norm, nn.ReLU(), nn.MaxPool2d(2)]
    head = [nn.Conv2d(CHANNELS[-1], MIXED, 1), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(MIXED * 16, HIDDEN)]
    return nn.Sequential(*layers, *head, nn.ReLU(), nn.Dropout(), nn.Linear(HIDDEN, 10))


def factors_of(net: nn.Sequential) -> list[Callback]:
    """Return the callback that factorizes the 5x5 convolutions before the first step."""
    large = [path for path, layer in net.named_children() if isinstance(layer, nn.Conv2d) and layer.kernel_size[0] > 1]
    rules = {path: {"include": f"net.{path}", "rank": rank} for path, rank in zip(large, RANKS, strict=True)}
    return [LowRank(factors={"method": "spatial_svd", "batch_norm": True, "rules": rules}, when="before")]


class Stopwatch(Callback):
    """Takes the processor seconds of every epoch's training steps."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start."""
        self._began = time.thread_time()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop."""
        self.seconds.append(time.thread_time() - self._began)


def train(way: str, data: TensorImages, seed: int, epochs: int) -> tuple[nn.Module, list[float]]:
    """Return a net trained one of the ways, and the processor seconds of its epochs."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.manual_seed(seed)
    net = build(way)
    loader = ResumableLoader(data, BATCH, seed=seed, collate_fn=already_batched)
    descent = partial(torch.optim.SGD, momentum=0.9, weight_decay=5e-4, nesterov=True)
    module, watch = classifier(net, descent, PEAK, epochs * len(loader)), Stopwatch()
    callbacks = [*(factors_of(net) if way == LOW_RANK else []), watch]
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False
    )
    Trainer(accelerator="cpu", max_epochs=epochs, callbacks=callbacks, **quiet).fit(module, loader)
    return net, watch.seconds


@dataclass
class Found:
    """What one way came to.

    Attributes:
        errors: Test errors in per cent, one for each seed.
        seconds: Processor seconds of all epochs.
        parameters: Of the net.
    """

    errors: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    parameters: int = 0


def rows_of(found: Mapping[str, Found]) -> list[Row]:
    """Return rows of test error, time of an epoch and parameters of each way, beside those of the dense net.

    The goals are the claim: low rank errs less than dense, in less time.
    """
    rows, dense = [], found[DENSE]
    for way, mine in found.items():
        figures = (
            ("test error", "%", statistics.mean(mine.errors), statistics.mean(dense.errors)),
            ("processor time of an epoch", "s", statistics.median(mine.seconds), statistics.median(dense.seconds)),
            ("parameters", "numbers", mine.parameters, dense.parameters),
        )
        for what, unit, value, other in figures:
            claimed = way == LOW_RANK and what != "parameters"
            about = (None, None) if way == DENSE else (DENSE, value / other)
            rows.append(Row(f"{what}, {way}", round(value, 3), unit, *about, round(other, 3) if claimed else None))
        each = enumerate(mine.errors, 1)
        rows += [Row(f"test error, {way}, seed {seed}", round(error, 2), "%") for seed, error in each]
    return rows


def main() -> None:
    """Train, test, print and write the table."""
    given = common.arguments(__doc__)
    torch.set_num_threads(1)
    try:
        folder = ImageFolderDataModule("cifar10_jpeg.tar.gz", 500, normalize=NORMALIZE)
        train_images, test = folder.splits.train, folder.test_dataloader()
    except ConfigurationError as error:
        print(f"skipped, the data are not there: {error}")
        return
    per_class, epochs, seeds = (50, 1, 1) if given.quick else (PER_CLASS, EPOCHS, SEEDS)
    data = TensorImages(*some_of_each(*train_images, per_class), normalize=NORMALIZE)
    found = {way: Found() for way in WAYS}
    for seed in range(1, seeds + 1):
        for way, mine in found.items():
            net, seconds = train(way, data, seed, epochs)
            mine.errors.append(test_error(net, test))
            mine.seconds += seconds
            mine.parameters = sum(parameter.numel() for parameter in net.parameters())
            print(f"seed {seed}, {way}: {mine.errors[-1]:.2f} %, {sum(seconds):.0f} s", flush=True)
    protocol = f"{10 * per_class} images, {epochs} epochs, batch {BATCH}, SGD up to {PEAK}, half of the width"
    facts = common.environment(quick=given.quick, seeds=seeds, protocol=protocol)
    common.publish("low_rank_from_scratch", rows_of(found), facts, given.out)


if __name__ == "__main__":
    main()
