"""A thin, deep network on the full MNIST, trained alone, by knowledge distillation, and as a FitNet.

The pattern of Romero et al. (2015), Table 4: labels alone 1.9 % test error, knowledge distillation 0.65 %, hints and
then distillation 0.51 %, under a teacher of 0.55 %. Here all three have the same number of epochs with labels or soft
targets; a FitNet has its hints before that, as in the paper. The teacher saw shifted images, the students do not, so
that its outputs are computed once and come from a cache.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

from benchmarks import _common as common
from benchmarks._students import Errors, classifier, fit, rows_of, test_error
from lightning_compress import ConfigurationError, DistillationModule
from lightning_compress.data import CropFlip, MNISTDataModule, ResumableLoader
from lightning_compress.distillation import (
    FitNetsHints,
    KnowledgeDistillation,
    TeacherCache,
    Term,
    cache_teacher,
    cached_loader,
)
from lightning_compress.models import StagedCNN

TEACHER_EPOCHS, EPOCHS, HINT_EPOCHS = 3, 3, 1
PEAK, TEMPERATURE, SHARE = 4e-3, 2.0, 0.9
QUICK_BATCHES = 60
ALONE, KD, FITNET = "labels alone", "knowledge distillation", "hints, then distillation (FitNet)"


def student() -> nn.Module:
    """Return eight layers of eight channels: 5,458 parameters, 15 times fewer than the teacher."""
    return StagedCNN((8, 8, 8), (2, 3, 3), batch_norm=False)


def loader_of(seed: int, augment: CropFlip | None = None) -> ResumableLoader:
    return MNISTDataModule(batch_size=128, seed=seed, augment=augment).train_dataloader()


def train_teacher(quick: bool) -> nn.Module:
    torch.manual_seed(0)
    net, loader = StagedCNN(), loader_of(0, CropFlip(2, flip=False))
    epochs, batches = (1, QUICK_BATCHES) if quick else (TEACHER_EPOCHS, len(loader))
    fit(classifier(net, torch.optim.Adam, PEAK, epochs * batches), loader, epochs, batches)
    return net


def train_student(way: str, teacher: nn.Module, cache: TeacherCache, seed: int, quick: bool) -> nn.Module:
    """Return a student trained one of the three ways; each seed begins with the same weights for all."""
    torch.manual_seed(seed)
    net, loader = student(), loader_of(seed)
    epochs, hints, batches = (1, 1, QUICK_BATCHES) if quick else (EPOCHS, HINT_EPOCHS, len(loader))
    if way == FITNET:
        hint = Term(FitNetsHints(), pairs={"net.stage2": "stage2"})
        module = classifier(net, torch.optim.Adam, PEAK, hints * batches)
        fit(DistillationModule(module, teacher, hint, task_weight=0.0), loader, hints, batches)
    module = classifier(net, torch.optim.Adam, PEAK, epochs * batches)
    if way == ALONE:
        fit(module, loader_of(seed), epochs, batches)
    else:
        soft = Term(KnowledgeDistillation(), weight=SHARE)
        taught = DistillationModule(module, cache, soft, temperature=TEMPERATURE, task_weight=1 - SHARE)
        fit(taught, cached_loader(loader_of(seed), cache), epochs, batches)
    return net


def main() -> None:
    """Train, test, print and write the table."""
    given = common.arguments(__doc__)
    torch.set_num_threads(1)
    try:
        test = MNISTDataModule(batch_size=500).test_dataloader()
    except ConfigurationError as error:
        print(f"skipped, there is no MNIST: {error}")
        return
    seeds = range(1, 2 if given.quick else 4)
    protocol = f"{EPOCHS} epochs, {HINT_EPOCHS} of hints before; Adam up to {PEAK}; T = {TEMPERATURE}, share {SHARE}"
    facts = common.environment(quick=given.quick, seeds=len(seeds), protocol=protocol)
    teacher = train_teacher(given.quick)
    errors: Errors = {"the teacher": [test_error(teacher, test)]}
    with tempfile.TemporaryDirectory() as place:
        cache = cache_teacher(teacher, loader_of(0), Path(place) / "cache")
        for seed in seeds:
            for way in (ALONE, KD, FITNET):
                net = train_student(way, teacher, cache, seed, given.quick)
                errors.setdefault(way, []).append(test_error(net, test))
                print(f"seed {seed}, {way}: {errors[way][-1]:.2f} %", flush=True)
    common.publish("distillation_mnist", rows_of(errors, {KD: ALONE, FITNET: KD}), facts, given.out)


if __name__ == "__main__":
    main()
