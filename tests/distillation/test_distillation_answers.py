"""A teacher that cannot teach is refused with one error that names it, before the student has learnt anything."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kd_models import QUIET, Classifier, Net, copied, fit, images, same
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_compress import ConfigurationError, Distillation, DistillationModule
from lightning_compress.distillation import ModuleTeacher, Question
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


def test_the_signature_is_known_to_help_and_to_command_lines() -> None:
    from jsonargparse import ArgumentParser

    assert list(inspect.signature(DistillationModule).parameters)[:3] == ["student", "teacher", "losses"]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningModule, "model")
    name = "lightning_compress.DistillationModule"
    args = [f"--model={name}", "--model.student=kd_models.Classifier", "--model.teacher=baseline"]
    parsed = parser.parse_args(args).model
    assert (parsed.class_path, parsed.init_args.teacher) == (name, "baseline")


class Tells(Callback):
    """Says whether the first epoch began."""

    begun = False

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.begun = True


@WAYS
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(9, 3), r"`teacher`: Linear failed .* tensors of \(2, 1, 6, 6\)"),
        (lambda: [Net(8), nn.Sequential(Net(8), nn.Linear(3, 5))], r"`teacher`: a mean needs outputs of one shape"),
        (lambda: nn.Sequential(Net(8), nn.Linear(3, 5)), r"`teacher`: Sequential returned \(2, 5\)"),
        (lambda: lambda batch: batch, r"`teacher` must take \(batch, batch_idx\)"),
        (lambda: Net(8).to("meta"), r"`teacher` lies on the meta device"),
    ],
    ids=["inputs", "ensemble", "classes", "function", "meta"],
)
def test_a_teacher_that_does_not_fit_is_refused_before_the_first_epoch(way: str, make: Any, message: str) -> None:
    tells = Tells()

    def run() -> None:
        if way == "module":
            fit(DistillationModule(Classifier(), make()), [tells], limit_val_batches=0)
        else:
            fit(Classifier(), [Distillation(make()), tells], limit_val_batches=0)

    with pytest.raises(ConfigurationError, match=message):
        run()
    assert not tells.begun


def test_a_function_that_returns_nothing_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"`teacher`: the function returned None"):
        distil("module", Classifier(), lambda batch, batch_idx: None)


def test_a_compiled_teacher_answers_as_the_module_does() -> None:
    net, x = Net(8), images().tensors[0]
    teacher = ModuleTeacher(torch.compile(net, backend="eager"))
    question = Question((x,), {})
    found = teacher.answer(question)
    torch.testing.assert_close(found.output, net(x))
    tapped = teacher.answer(Question((x,), {}, layers=("layer1",)))
    assert tapped.features["layer1"][0].shape == (24, 8, 6, 6)
    assert teacher.fingerprint() == ModuleTeacher(net).fingerprint()


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_checkpoint_without_distillation_is_not_resumed_by_the_callback(tmp_path: Path) -> None:
    for name, module in (("plain", Classifier()), ("module", DistillationModule(Classifier(), Net(8)))):
        trainer = fit(module, limit_val_batches=0)
        trainer.save_checkpoint(tmp_path / name)
        with pytest.raises(ConfigurationError, match="written without distillation by the Distillation callback"):
            fit(Classifier(), [Distillation(Net(8))], 2, ckpt_path=str(tmp_path / name), limit_val_batches=0)
