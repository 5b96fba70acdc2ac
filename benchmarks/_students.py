"""Training students several ways under one budget, for the benchmarks on real data."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from benchmarks._common import Row
from lightning_compress.core.examples import example_from
from lightning_compress.models import ImageClassifier

Errors = dict[str, list[float]]


def classifier(net: nn.Module, optimizer: Any, peak: float, steps: int) -> ImageClassifier:
    """Return a network to train with a learning rate that rises to ``peak`` and falls to nothing over ``steps``."""
    schedule = partial(OneCycleLR, max_lr=peak, total_steps=steps, pct_start=0.2)
    return ImageClassifier(net, partial(optimizer, lr=peak), schedule, interval="step")


def fit(module: LightningModule, loader: Iterable[Any], epochs: int, batches: int) -> None:
    """Train on the CPU, in silence, for so many batches an epoch."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    module.train().example_input_array = example_from(module, loader)  # what a teacher's layers are matched with
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(accelerator="cpu", max_epochs=epochs, limit_train_batches=batches, logger=False, **quiet)
    trainer.fit(module, loader)


def test_error(net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return the share of wrong answers in percent."""
    wrong = total = 0
    net.eval()
    with torch.no_grad():
        for images, labels in batches:
            wrong += int((net(images).argmax(1) != labels).sum())
            total += len(labels)
    return 100 * wrong / total


def rows_of(errors: Errors, against: Mapping[str, str]) -> list[Row]:
    """Return a row of mean test errors for each way, its spread over seeds, and by how much it beats another.

    Args:
        errors: Test errors in percent by way, one per seed, in the same order of seeds.
        against: Ways that must have a smaller mean error than another, which is their goal.
    """
    rows = []
    for way, each in errors.items():
        other = errors.get(against.get(way, ""))
        mean, least = statistics.mean(each), None if other is None else statistics.mean(other)
        ratio, name = (None, None) if least is None else (mean / least, against[way])
        rows.append(
            Row(f"test error, {way}", round(mean, 3), "%", name, ratio, None if least is None else round(least, 3))
        )
        if len(each) > 1:
            rows.append(Row(f"test error, {way}: spread of seeds", round(statistics.stdev(each), 3), "points"))
        rows += [Row(f"test error, {way}, seed {seed}", round(error, 3), "%") for seed, error in enumerate(each, 1)]
        if other is not None:
            rows += _margin(way, against[way], each, other)
    return rows


def _margin(way: str, against: str, each: Sequence[float], other: Sequence[float]) -> list[Row]:
    gains = [theirs - ours for ours, theirs in zip(each, other, strict=True)]
    rows = [Row(f"{way}: gain over {against}", round(statistics.mean(gains), 3), "points")]
    if len(gains) > 1:
        noise = max(statistics.stdev(each), statistics.stdev(other))
        rows.append(Row(f"{way}: the larger spread of seeds, of it and {against}", round(noise, 3), "points"))
    return rows
