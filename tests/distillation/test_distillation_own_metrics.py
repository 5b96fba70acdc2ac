"""What a teacher's own validation and test steps log appears beside the student's metrics, for one more pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kd_models import QUIET, Classifier, Net, copied, fit, images, same
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader

from lightning_compress import Distillation, DistillationModule
from lightning_compress.distillation import ModuleTeacher


class Judged(Classifier):
    """A teacher that logs under names of its own, and counts how often it is asked."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        asked.append("validation")
        super().validation_step(batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        asked.append("test")
        self.log("test/worst", F.cross_entropy(self(batch[0]), batch[1]), reduce_fx="max")

    def on_validation_epoch_end(self) -> None:
        self.log("val/constant", 7.0)


class Student(Classifier):
    """A student with a test of its own."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/loss", F.cross_entropy(self(batch[0]), batch[1]))


asked: list[str] = []


def teacher() -> Judged:
    seed_everything(3, verbose=False)
    asked.clear()
    return Judged(width=8)


def distilled(way: str, judge: Any) -> tuple[LightningModule, list[Any], Any]:
    seed_everything(1, verbose=False)
    student = Student()
    if way == "module":
        module = DistillationModule(student, judge)
        return module, [], module.distiller
    callback = Distillation(judge)
    return student, [callback], callback.distiller


@pytest.mark.parametrize("way", ["module", "callback"])
def test_its_own_validation_is_run_once_a_fit_and_logged_in_every_epoch(way: str) -> None:
    judge = teacher()
    expected = Trainer(**QUIET).validate(judge, verbose=False)[0]
    before = copied(judge)
    asked.clear()
    module, callbacks, _ = distilled(way, judge)
    found = fit(module, callbacks, epochs=3, num_sanity_val_steps=2).callback_metrics
    assert asked == ["validation"] * 2  # batches, not times three epochs
    assert expected.keys() == {"val/loss", "val/accuracy", "val/constant"}
    for name, value in expected.items():
        assert found[f"teacher/{name}"] == pytest.approx(value)
    assert found["teacher/val/accuracy"] == pytest.approx(float(found["teacher/accuracy"]))
    assert {"val/loss", "teacher/agreement"} <= found.keys()
    assert same(before, copied(judge))
    assert not judge.accuracy.update_called


@pytest.mark.parametrize("way", ["module", "callback"])
def test_its_own_test_appears_in_a_test(way: str) -> None:
    module, callbacks, _ = distilled(way, teacher())
    trainer = fit(module, callbacks)
    loader = DataLoader(images(), batch_size=8, generator=torch.Generator())
    asked.clear()
    found = trainer.test(module, loader, verbose=False)[0]
    assert asked == ["test"] * 3
    with torch.no_grad():
        judge = Judged(width=8)
        judge.load_state_dict(copied(teacher()))
        losses = [F.cross_entropy(judge.eval()(x), y).item() for x, y in loader]
        logits, labels = judge(images().tensors[0]), images().tensors[1]
    assert found["teacher/test/worst"] == pytest.approx(max(losses))
    assert found["teacher/accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert {"test/loss", "teacher/agreement"} <= found.keys()


def test_a_student_learns_the_same_whether_or_not_they_are_asked_for() -> None:
    weights = []
    for metrics in (True, False):
        module, _, _ = distilled("module", ModuleTeacher(teacher(), metrics=metrics))
        loader = DataLoader(images(), batch_size=6, shuffle=True)  # its order comes from the global generator
        trainer = Trainer(max_epochs=3, **QUIET)
        trainer.fit(module, loader)
        weights.append(copied(module))
        assert ("teacher/val/loss" in trainer.callback_metrics) is metrics
    assert same(*weights)


def test_new_loaders_are_looked_at_anew() -> None:
    module, _, _ = distilled("module", teacher())
    fit(module, epochs=3, reload_dataloaders_every_n_epochs=1)
    assert asked == ["validation"] * 6


def test_data_changed_on_its_way_reach_the_teacher_changed() -> None:
    class Scaled(LightningDataModule):
        def val_dataloader(self) -> DataLoader:
            return DataLoader(images(), batch_size=24, generator=torch.Generator())

        train_dataloader = val_dataloader

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [3 * batch[0], batch[1]]

    judge = teacher()
    with torch.no_grad():
        expected = F.cross_entropy(judge.eval()(3 * images().tensors[0]), images().tensors[1])
    module, _, _ = distilled("module", judge)
    trainer = Trainer(max_epochs=1, **QUIET)
    trainer.fit(module, datamodule=Scaled())
    torch.testing.assert_close(trainer.callback_metrics["teacher/val/loss"], expected)


def test_a_step_that_cannot_run_here_is_left_out_with_a_warning() -> None:
    class Elsewhere(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val/boxes", batch["boxes"].mean())

    module, _, _ = distilled("module", Elsewhere(width=8))
    with pytest.warns(UserWarning, match="`teacher`: the validation_step of Elsewhere failed"):
        found = fit(module, epochs=2).callback_metrics
    assert "teacher/agreement" in found
    assert "teacher/val/boxes" not in found


def test_teachers_without_a_step_have_only_what_can_be_compared() -> None:
    for judge in (Net(8), [Judged(width=8), Judged(width=8)]):
        asked.clear()
        module, _, distiller = distilled("module", judge)
        found = fit(module).callback_metrics
        assert {name for name in found if name.startswith("teacher/")} == {"teacher/agreement", "teacher/accuracy"}
        assert distiller.teacher.judge() is None or not isinstance(distiller.teacher.judge(), LightningModule)
        assert asked == []


def test_its_baseline_self_is_judged_by_the_students_own_step() -> None:
    seed_everything(1, verbose=False)
    student = Student()
    expected = Trainer(**QUIET).validate(student, verbose=False)[0]
    found = fit(DistillationModule(student, "baseline"), epochs=2).callback_metrics
    assert found["teacher/val/loss"] == pytest.approx(expected["val/loss"])
    assert found["val/loss"] != pytest.approx(expected["val/loss"])
