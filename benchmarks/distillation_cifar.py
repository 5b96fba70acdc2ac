"""ResNet-20 from scratch on a few images of CIFAR-10 (JPEG copy), with labels alone and under a trained ResNet-56.

Both ways see the same images in the same order for the same number of epochs, with the same optimizer and the same
initial weights for a seed; only the loss differs. There is no augmentation, so the teacher's outputs are computed once
and come from a cache. The teacher is used as published, trained on the images before they became JPEG.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

from benchmarks import _common as common
from benchmarks._students import Errors, classifier, fit, rows_of, test_error
from lightning_compress import ConfigurationError, DistillationModule
from lightning_compress.data import ImageFolderDataModule, Normalize, ResumableLoader, TensorImages, find_data
from lightning_compress.data.few import some_of_each
from lightning_compress.data.tensors import already_batched
from lightning_compress.distillation import KnowledgeDistillation, Term
from lightning_compress.distillation.cache import TeacherCache, cache_teacher
from lightning_compress.distillation.cached_data import cached_loader
from lightning_compress.models import resnet20, resnet56
from lightning_compress.run.weights import load_weights

NORMALIZE = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PER_CLASS, EPOCHS, BATCH, PEAK = 100, 10, 64, 4e-3
TEMPERATURE, SHARE = 4.0, 0.9
ALONE, KD = "labels alone", "under ResNet-56"


def loader_of(data: TensorImages, seed: int) -> ResumableLoader:
    return ResumableLoader(data, BATCH, seed=seed, collate_fn=already_batched)


def train_student(way: str, data: TensorImages, cache: TeacherCache, seed: int, epochs: int) -> nn.Module:
    """Return a student trained one of the two ways; each seed begins with the same weights for both."""
    torch.manual_seed(seed)
    net, loader = resnet20(), loader_of(data, seed)
    module = classifier(net, torch.optim.AdamW, PEAK, epochs * len(loader))
    if way == ALONE:
        fit(module, loader, epochs, len(loader))
    else:
        soft = Term(KnowledgeDistillation(), weight=SHARE)
        taught = DistillationModule(module, cache, soft, temperature=TEMPERATURE, task_weight=1 - SHARE)
        fit(taught, cached_loader(loader, cache), epochs, len(loader))
    return net


def main() -> None:
    """Train, test, print and write the table."""
    given = common.arguments(__doc__)
    torch.set_num_threads(1)
    try:
        weights = find_data("resnet_cifar10/resnet56.safetensors")
        folder = ImageFolderDataModule("cifar10_jpeg.tar.gz", 500, normalize=NORMALIZE)
        train, test = folder.splits.train, folder.test_dataloader()
    except ConfigurationError as error:
        print(f"skipped, the data are not there: {error}")
        return
    per_class, epochs, seeds = (20, 1, [1]) if given.quick else (PER_CLASS, EPOCHS, [1, 2, 3])
    teacher = resnet56()
    load_weights(teacher, str(weights))
    data = TensorImages(*some_of_each(*train, per_class), normalize=NORMALIZE)
    errors: Errors = {}
    with tempfile.TemporaryDirectory() as place:
        cache = cache_teacher(teacher, loader_of(data, 0), Path(place) / "cache")
        for seed in seeds:
            for way in (ALONE, KD):
                net = train_student(way, data, cache, seed, epochs)
                errors.setdefault(way, []).append(test_error(net, test))
                print(f"seed {seed}, {way}: {errors[way][-1]:.2f} %", flush=True)
    protocol = f"{10 * per_class} images, {epochs} epochs, batch {BATCH}, AdamW up to {PEAK}"
    facts = common.environment(quick=given.quick, seeds=len(seeds), protocol=f"{protocol}; T = {TEMPERATURE}, {SHARE}")
    common.publish("distillation_cifar", rows_of(errors, {KD: ALONE}), facts, given.out)


if __name__ == "__main__":
    main()
