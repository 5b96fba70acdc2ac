"""What the benchmarks that train LeNet-300-100 on the full MNIST share."""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from benchmarks import _common as common
from benchmarks._common import Row
from lightning_compress import ConfigurationError
from lightning_compress.data import ImageDataModule, MNISTDataModule
from lightning_compress.models import ImageClassifier, LeNet300100

LEARNING_RATE = 1.2e-3
BATCH = 128


def find_mnist(seed: int) -> MNISTDataModule | None:
    """Return MNIST, ready, in an order that depends on the seed; ``None``, and a line on paper, where there is none."""
    data = MNISTDataModule(seed=seed, batch_size=BATCH)
    try:
        data.setup("fit")
    except ConfigurationError as error:
        print(f"skipped, there is no MNIST: {error}")
        return None
    return data


def new_classifier(seed: int) -> ImageClassifier:
    """Return an untrained LeNet-300-100 with Adam."""
    torch.manual_seed(seed)
    return ImageClassifier(LeNet300100(), partial(torch.optim.Adam, lr=LEARNING_RATE))


def train(
    module: ImageClassifier,
    data: ImageDataModule,
    epochs: int,
    callbacks: Sequence[Callback] = (),
    batches: int = 0,
    accelerator: str = "cpu",
) -> None:
    """Train on the 55,000 images, or on so many batches of them an epoch, and look at nothing meanwhile."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        limit_train_batches=batches or None,
        limit_val_batches=0,
        accelerator=accelerator,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)


def error_on_test(module: ImageClassifier, data: ImageDataModule) -> float:
    """Return the share of the 10,000 test images, in per cent, that the module gets wrong."""
    data.setup("test")
    wrong = total = 0
    with torch.no_grad():
        module.eval()
        for images, labels in data.test_dataloader():
            wrong += int((module(images).argmax(1) != labels).sum())
            total += len(labels)
    module.train()
    return 100 * wrong / total


def continued(notes: Path, trainings: Mapping[str, Callable[[], Mapping[str, Any]]]) -> dict[str, Any]:
    """Return what trainings found, by case, and note it; what ``notes`` has already is not trained again."""
    found: dict[str, Any] = json.loads(notes.read_text(encoding="utf-8")) if notes.exists() else {}
    for case, training in trainings.items():
        if case not in found:
            found |= training()
            notes.parent.mkdir(parents=True, exist_ok=True)
            notes.write_text(json.dumps(found), encoding="utf-8")
            print(f"{case}, seed {notes.stem}: {found[case]}", flush=True)
    return found


def mean_rows(errors: Mapping[str, Sequence[float]], against: Mapping[str, str], judged: Sequence[str]) -> list[Row]:
    """Return a row of the mean test error of each case, and one of its spread over seeds.

    Args:
        errors: By case, one a seed.
        against: The case that a case is compared with.
        judged: Cases that should do at least as well as what they are compared with.
    """
    rows = []
    for case, found in errors.items():
        mean, other = statistics.mean(found), errors.get(against.get(case, ""))
        base = None if other is None else statistics.mean(other)
        compared = None if base is None else f"{against[case]}, the same seeds and steps"
        goal = round(base, 4) if case in judged and base is not None else None
        rows.append(Row(f"test error, {case}", round(mean, 4), "%", compared, mean / base if base else None, goal))
        if len(found) > 1:
            rows.append(Row(f"test error, {case}: spread of seeds", round(statistics.stdev(found), 4), "points"))
    return rows


def facts(quick: bool, seeds: int, epochs: int) -> dict[str, object]:
    """Return what the figures depend on."""
    training = {"epochs": epochs, "batch_size": BATCH, "optimizer": f"Adam, learning rate {LEARNING_RATE}"}
    return common.environment(quick=quick, seeds=seeds, **training)
