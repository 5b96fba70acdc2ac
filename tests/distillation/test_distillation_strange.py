"""Students that train in unusual ways: each learns what it should, or is told what to change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kd_models import QUIET, Classifier, Manual, Net, copied, fit, images, same
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import ConfigurationError, Distillation, DistillationModule
from lightning_compress.distillation import (
    BoundedRegression,
    DecoupledDistillation,
    FitNetsHints,
    KnowledgeDistillation,
    MultiLabelDistillation,
    Ramp,
    RegressionDistillation,
    Term,
)
from lightning_compress.distillation.fit import comparison

WAYS = pytest.mark.parametrize("way", ["module", "callback"])


def distil(way: str, student: Any, teacher: Any, losses: Any = None, **kwargs: Any) -> Trainer:
    if way == "module":
        return fit(DistillationModule(student, teacher, losses), **kwargs)
    return fit(student, [Distillation(teacher, losses)], **kwargs)


class Adversarial(Manual):
    """Its first loss, that of a judge, comes from what the student said but does not reach it."""

    def __init__(self) -> None:
        super().__init__()
        self.judge = nn.Linear(3, 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        student, judge = self.optimizers()
        said = self(batch[0])
        judge.zero_grad()
        self.manual_backward(F.softplus(self.judge(said.detach())).mean())
        judge.step()
        student.zero_grad()
        self.manual_backward(F.softplus(-self.judge(said)).mean())
        student.step()

    def configure_optimizers(self) -> Any:
        parts = (self.net, self.judge)
        return [torch.optim.SGD(part.parameters(), lr=0.05) for part in parts]


def test_the_teacher_joins_the_loss_that_comes_from_the_students_output() -> None:
    torch.manual_seed(0)
    teacher, ends = Net(8), []
    for way in ("module", "callback"):
        torch.manual_seed(1)
        student = Adversarial()
        student.net.drop.p = 0.0
        before = copied(student.judge)
        trainer = distil(way, student, teacher, RegressionDistillation())
        assert trainer.callback_metrics["distill/regression"] > 0
        assert not same(before, copied(student.judge))
        ends.append(copied(student))
    assert all(torch.allclose(ends[0][key], ends[1][key], atol=1e-6) for key in ends[0])
    torch.manual_seed(1)
    alone = Adversarial()
    alone.net.drop.p = 0.0
    fit(alone)
    assert not torch.allclose(alone.net.head.weight, ends[0]["net.head.weight"], atol=1e-4)


class Direct(Manual):
    """Goes backward without telling Lightning."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        F.cross_entropy(self(batch[0]), batch[1]).backward()
        for optimizer in self.optimizers():
            optimizer.step()


@WAYS
def test_a_backward_pass_that_nobody_hears_of_is_refused(way: str) -> None:
    with pytest.raises(ConfigurationError, match=r"write self\.manual_backward\(loss\)"):
        distil(way, Direct(), Net(8))


@WAYS
def test_a_weight_that_begins_at_zero_has_its_adapters(way: str) -> None:
    hint = Term(FitNetsHints(), Ramp(0.0, 1.0), pairs={"net.layer1": "layer1"})
    trainer = distil(way, Classifier(), Net(8), {"hint": hint})
    assert trainer.callback_metrics["distill/hint"] > 0


class Values(Classifier):
    """One value a sample instead of class scores."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        self.net.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).reshape(-1, *self.shape)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        values = self(batch[0])
        return F.binary_cross_entropy_with_logits(values, (batch[1] > 0).float().reshape(values.shape))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])


@WAYS
@pytest.mark.parametrize("shape", [(1,), ()])
@pytest.mark.parametrize("loss", [KnowledgeDistillation(), DecoupledDistillation()], ids=["kd", "dkd"])
def test_soft_targets_over_one_class_would_teach_nothing(way: str, shape: tuple[int, ...], loss: Any) -> None:
    student = Values(shape)
    before = copied(student)
    with pytest.raises(ConfigurationError, match=r"two classes or more.*MultiLabelDistillation"):
        distil(way, student, Values(shape), loss)
    assert same(before, copied(student))


@WAYS
@pytest.mark.parametrize("shape", [(1,), ()])
def test_one_value_a_sample_is_taught_by_losses_on_values(way: str, shape: tuple[int, ...]) -> None:
    trainer = distil(way, Values(shape), Values(shape), [MultiLabelDistillation(), RegressionDistillation("huber")])
    assert trainer.callback_metrics["distill/loss"] > 0
    assert trainer.callback_metrics["teacher/distance"] > 0


class Masks(Classifier):
    """Class scores a pixel; half of each picture has no label."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 3, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1], ignore_index=255)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    def train_dataloader(self) -> DataLoader:
        labels = torch.randint(3, (24, 6, 6), generator=torch.Generator().manual_seed(0))
        labels[:, :3] = 255
        return DataLoader(TensorDataset(images().tensors[0], labels), batch_size=6)

    val_dataloader = train_dataloader


@WAYS
def test_pixels_without_a_label_count_nowhere(way: str) -> None:
    torch.manual_seed(0)
    teacher = Masks(8)
    pictures, labels = next(iter(DataLoader(teacher.train_dataloader().dataset, batch_size=24)))
    right = (teacher(pictures).argmax(1) == labels)[:, 3:].float().mean()
    losses = [KnowledgeDistillation(ignore_index=255), DecoupledDistillation(ignore_index=255)]
    trainer = distil(way, Masks(), teacher, losses)
    assert trainer.callback_metrics["teacher/accuracy"].item() == pytest.approx(right.item())


def test_tokens_have_their_classes_last() -> None:
    scores = torch.tensor([[[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]]])  # one text of three tokens, two classes
    found = comparison(scores, scores.flip(2), torch.tensor([[1, 1, -100]]), class_dim=-1)
    assert {name: value.item() for name, value in found.items()} == {"agreement": 0.0, "accuracy": 0.5}


def test_the_name_of_the_sum_is_taken() -> None:
    with pytest.raises(ConfigurationError, match="has the name 'loss'"):
        DistillationModule(Classifier(), Net(8), {"loss": KnowledgeDistillation()})


def test_a_bounded_regression_may_be_the_only_loss() -> None:
    class Numbers(Values):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.mse_loss(self(batch[0]), batch[1])

        def train_dataloader(self) -> DataLoader:
            pictures = images().tensors[0]
            return DataLoader(TensorDataset(pictures, pictures.sum((1, 2, 3))), batch_size=6)

        val_dataloader = train_dataloader

    module = DistillationModule(Numbers(()), Numbers(()), BoundedRegression())
    trainer = Trainer(max_epochs=1, **QUIET)
    trainer.fit(module)
    assert {"distill/bounded_regression", "teacher/mse"} <= trainer.callback_metrics.keys()
