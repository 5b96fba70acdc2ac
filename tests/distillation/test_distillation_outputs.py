"""Which of several outputs of the student and the teacher is compared."""

from __future__ import annotations

from typing import Any

import pytest
import torch.nn.functional as F
from kd_models import Classifier, Net, fit
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_compress import Distillation, DistillationModule
from lightning_compress.distillation import ModuleTeacher

WAYS = pytest.mark.parametrize("way", ["module", "callback"])


def distil(way: str, student: LightningModule, teacher: Any, **options: Any) -> Any:
    """Train on one batch under a teacher in one of the two ways, without validation."""
    run = {"limit_val_batches": 0, "limit_train_batches": 1}
    if way == "module":
        return fit(DistillationModule(student, teacher, **options), **run)
    return fit(student, [Distillation(teacher, **options)], **run)


class Two(Classifier):
    """Returns its hidden state before the logits."""

    def forward(self, x: Tensor) -> Any:
        return self.net.layer2(self.net.layer1(x)).mean((2, 3)), self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden, logits = self(batch[0])
        return F.cross_entropy(logits, batch[1]) + 0.01 * hidden.square().mean()


@WAYS
def test_one_of_several_outputs_is_compared_by_its_place(way: str, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):  # others may have silenced them
        caplog.set_level("INFO", logger=name)
    distil(way, Two(), "baseline")
    assert "output:0 of 2" in caplog.text
    found = distil(way, Two(), ModuleTeacher(Two(), output=":1"), student_output=":1")
    assert ":1  " in caplog.text
    assert found.callback_metrics["distill/kd"] > 0
    plain = distil(way, Two(), Net(8), student_output=":1")
    assert plain.callback_metrics["distill/kd"] > 0
    distil(way, Two(), "baseline", student_output=":1")
