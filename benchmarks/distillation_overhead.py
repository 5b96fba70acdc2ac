"""What a teacher costs while a student trains: the time of a step, with the teacher running along and with a cache.

A step under a running teacher is compared with a step of the student alone plus one forward pass of the teacher, which
is the least it can cost; a step with stored outputs is compared with the student's own. All take turns every few
steps, each in a process of its own. Goals are judged on one thread and on processor time, which then equals wall time
on an idle machine and, unlike it, leaves out the time in which other processes ran; wall time is given beside it. What
a step costs in any case, one or two milliseconds, shows where the student's own step is short.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from benchmarks import _common as common
from benchmarks._common import Row, Times, ratio_of_medians
from benchmarks._fits import mlp
from benchmarks._turns import time_in_turns
from lightning_compress import DistillationModule
from lightning_compress.data import Normalize, ResumableLoader, TensorImages
from lightning_compress.data.tensors import already_batched
from lightning_compress.distillation.cache import cache_teacher
from lightning_compress.distillation.cached_data import cached_loader
from lightning_compress.models import ImageClassifier, resnet20, resnet56

GOAL = 1.05
BATCH = 128
ALONE, FORWARD, LIVE, CACHED = "student alone", "forward pass of the teacher", "under the teacher", "under a cache"
CASES = (ALONE, FORWARD, LIVE, CACHED)
Build = Callable[[], nn.Module]


def flat_mlp(width: int) -> nn.Module:
    """Return a perceptron for images of 3x32x32; three hidden layers of ``width``."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 2 * width), nn.ReLU(), mlp(width))


def loader_of(batches: int) -> ResumableLoader:
    """Return batches of random images that lie in memory, as those of the recipes do."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batches * BATCH, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (len(images),), generator=generator)
    data = TensorImages(images, labels, normalize=Normalize((0.5,), (0.25,)))
    return ResumableLoader(data, BATCH, collate_fn=already_batched)


def logits_of_nobody(images: Tensor) -> Tensor:
    """Return ten numbers per image; what a stored output is does not change what it costs."""
    return images.flatten(1)[:, :10]


def forward_only(teacher: nn.Module, watch: Callback, steps: int) -> None:
    """Run the teacher on one batch after another, without any Trainer."""
    images, _ = next(iter(loader_of(1)))
    nobody = (Trainer(logger=False, enable_checkpointing=False, barebones=False), LightningModule())
    with torch.no_grad():
        for step in range(steps):
            watch.on_train_batch_start(*nobody, None, step)
            teacher(images)


def timed(case: str, student: Build, teacher: Build, watch: Callback, steps: int) -> None:
    """Run one of :data:`CASES` as one of the fits that take turns; students begin with the same weights."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    module: LightningModule = ImageClassifier(student(), partial(torch.optim.SGD, lr=0.01, momentum=0.9))
    if case == FORWARD:
        forward_only(teacher().eval(), watch, steps)
        return
    loader = loader_of(steps)
    with tempfile.TemporaryDirectory() as folder:
        if case == LIVE:
            module = DistillationModule(module, teacher())
        elif case == CACHED:
            cache = cache_teacher(logits_of_nobody, loader, Path(folder) / "cache", name="nobody")
            module, loader = DistillationModule(module, cache), cached_loader(loader, cache)
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        trainer = Trainer(accelerator="cpu", max_steps=steps, callbacks=[watch], logger=False, **quiet)
        trainer.fit(module, loader)


def rows_of(name: str, times: dict[str, tuple[Times, Times]], goal: float | None = GOAL) -> list[Row]:
    """Return milliseconds of every case, and the ratios to what each must not exceed by much."""
    rows = []
    for kind, label in ((1, "processor time"), (0, "wall time")):
        taken = {case: times[case][kind] for case in CASES}
        for case, each in taken.items():
            rows.append(Row(f"{name}: step, {case}, {label}, median", 1e3 * float(np.median(each)), "ms"))
        judged = goal if kind == 1 else None
        for case, against, least in (
            (LIVE, f"{ALONE} + {FORWARD}", taken[ALONE] + taken[FORWARD]),
            (CACHED, ALONE, taken[ALONE]),
        ):
            ratio = ratio_of_medians(taken[case], least)
            what = f"{name}: step {case}, {label}"
            rows.append(Row(f"{what}, ratio", ratio.value, "x", against, ratio.value, judged))
            rows.append(Row(f"{what}, upper end of the ratio's 95 % interval", ratio.high, "x", against, ratio.value))
    return rows


def measure(quick: bool) -> list[Row]:
    """Return all rows."""
    pairs: tuple[tuple[str, Build, Build, int], ...] = (
        ("ResNet-56 teaches ResNet-20, batch 128", resnet20, resnet56, 2 if quick else 8),
        ("MLP of 4.2 M weights teaches one of 1.8 M, batch 128", partial(flat_mlp, 256), partial(flat_mlp, 512), 40),
    )
    rows = []
    for name, student, teacher, rounds in pairs:
        fits = {case: partial(timed, case, student, teacher) for case in CASES}
        rows += rows_of(name, time_in_turns(fits, min(rounds, 4) if quick else rounds))
    return rows


def main(quick: bool, out: Path) -> Path:
    """Measure, print and write."""
    torch.set_num_threads(1)
    facts = common.environment(quick=quick, judged="processor time; one thread")
    return common.publish("distillation_overhead", measure(quick), facts, out)


if __name__ == "__main__":
    options = common.arguments(__doc__)
    main(options.quick, options.out)
