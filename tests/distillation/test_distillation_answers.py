"""A teacher that cannot teach is refused with one error that names it, before the student has learnt anything."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kd_models import QUIET, Classifier, Net, copied, fit, images, same
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_compress import ConfigurationError, Distillation, DistillationModule
from lightning_compress.distillation.fit import comparison

WAYS = pytest.mark.parametrize("way", ["module", "callback"])


def distil(way: str, student: LightningModule, teacher: Any, **kwargs: Any) -> Any:
    """Train one epoch under a teacher in one of the two ways, without validation."""
    options = {key: kwargs.pop(key) for key in ("losses", "student_output", "target") if key in kwargs}
    run = {"limit_val_batches": 0, **kwargs}
    if way == "module":
        return fit(DistillationModule(student, teacher, **options), **run)
    return fit(student, [Distillation(teacher, **options)], **run)


class Filled(Net):
    """A teacher with one value in the score of the first class."""

    def __init__(self, value: float) -> None:
        super().__init__(8)
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).index_fill(1, torch.tensor(0), self.value)


@WAYS
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_teacher_that_is_not_finite_is_refused_and_harms_nothing(way: str, value: float) -> None:
    student = Classifier()
    before = copied(student)
    for batches in (0, 1):
        with pytest.raises(ConfigurationError, match=r"`teacher`: the output of Filled holds NaN or infinity"):
            distil(way, student, Filled(value), limit_val_batches=batches)
    learnt = {name: before[name] for name, _ in student.named_parameters()}
    assert same(learnt, {name: parameter.detach() for name, parameter in student.named_parameters()})


def test_masked_classes_of_a_teacher_are_no_error() -> None:
    trainer = distil("module", Classifier(), Filled(-torch.inf), limit_val_batches=1)
    assert torch.isfinite(trainer.callback_metrics["distill/kd"])


def test_rows_that_are_not_finite_never_agree() -> None:
    scores = torch.tensor([[2.0, 1.0], [0.0, 3.0], [torch.nan, 0.0], [-torch.inf, 1.0]])
    found = comparison(scores, scores.clone(), torch.tensor([0, 1, 0, 1]))
    assert found["agreement"].item() == 0.75


@WAYS
def test_outputs_of_other_shapes_are_refused_by_name(way: str) -> None:
    teacher = Net(8)
    teacher.head = nn.Linear(16, 5)
    student = Classifier()
    before = copy.deepcopy(dict(student.named_parameters()))
    with pytest.raises(ConfigurationError, match=r"`teacher`: Net returned \(\d+, 5\) and the student \(\d+, 3\)"):
        distil(way, student, teacher)
    assert all(torch.equal(before[name], p) for name, p in student.named_parameters())


class Owner(LightningModule):
    """A student whose own attributes have the names that the wrapper might have used."""

    distiller: Any = "its own"

    def __init__(self) -> None:
        super().__init__()
        self.student = Net()
        self.clock, self.pending, self.task = 0, [], "multiclass"
        self.example_input_array = images().tensors[0][:2]

    def forward(self, x: Tensor) -> Tensor:
        return self.student(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.clock += 1
        self.pending.append(batch_idx)
        assert (self.task, self.distiller) == ("multiclass", "its own")
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.student.parameters(), lr=0.05)

    train_dataloader = Classifier.train_dataloader


class Plain(Net):
    """The same for a plain network."""

    def __init__(self) -> None:
        super().__init__()
        self.clock, self.task = 0, "multiclass"

    def forward(self, x: Tensor) -> Tensor:
        self.clock += 1
        assert self.task == "multiclass"
        return super().forward(x)


def test_names_of_the_students_own_attributes_are_free() -> None:
    student = Owner()
    net, before = student.student, copied(student)
    module = DistillationModule(student, Net(8))
    trainer = fit(module)
    assert "distill/kd" in trainer.callback_metrics
    assert module.student is net
    assert (student.clock, student.pending, module.distiller) == (4, [0, 1, 2, 3], "its own")
    assert not same(before, copied(student))
    twin = copy.deepcopy(module)
    assert twin.student is not net
    assert same(copied(twin), copied(module))
    assert pickle.loads(pickle.dumps(module)).pending == [0, 1, 2, 3]

    plain = Plain()
    module = DistillationModule(plain, Net(8))
    loader = DataLoader(images(), batch_size=6)
    Trainer(max_epochs=1, **QUIET).fit(module, loader, loader)
    assert plain.clock >= 4
    assert module.student is plain
