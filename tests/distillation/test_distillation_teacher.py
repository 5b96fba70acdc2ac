"""Teachers of every kind, frozen; files; ensembles; what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from kd_models import Classifier, Net, copied, fit, images, same
from lightning.pytorch import LightningModule, seed_everything
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_compress import (
    ArtifactError,
    ConfigurationError,
    DistillationModule,
    IterativePruning,
    Select,
    compress,
    save_compressed,
)
from lightning_compress.distillation import (
    Answer,
    Ensemble,
    FitNetsHints,
    FunctionTeacher,
    KnowledgeDistillation,
    LogitsMSE,
    ModuleTeacher,
    Question,
    Teacher,
    Term,
    as_teacher,
    load_teacher,
)
from lightning_compress.distillation.cached_batch import CachedBatch

X = images().tensors[0][:4]


def ask(teacher: Teacher, *layers: str) -> Answer:
    answer = teacher.answer(Question((X,), {}, (X, None), 0, layers=layers))
    assert answer is not None
    return answer


def test_a_module_is_frozen_and_answers_with_layers() -> None:
    net = Net(8)
    expected = copy.deepcopy(net).eval()
    teacher = ModuleTeacher(net)
    net.train()
    answer = ask(teacher, "layer1")
    assert torch.equal(answer.output, expected(X))
    assert torch.equal(answer.features["layer1"][0], expected.layer1(X))
    assert not answer.output.requires_grad
    assert not any(part.training for part in net.modules())
    assert not any(p.requires_grad for p in net.parameters())
    assert "layer2.0" in teacher.layers()
    assert copy.deepcopy(teacher) is teacher


def test_the_fingerprint_follows_weights_and_statistics() -> None:
    net = Net()
    first = ModuleTeacher(net).fingerprint()
    assert ModuleTeacher(copy.deepcopy(net)).fingerprint() == first
    net.layer1[1].running_mean += 1e-6
    assert ModuleTeacher(net).fingerprint() != first


def test_a_teacher_in_another_precision_gets_inputs_of_its_own() -> None:
    assert ask(ModuleTeacher(Net().double())).output.dtype == torch.float64


@pytest.mark.parametrize("kind", ["lightning", "state_dict", "inner", "safetensors", "artifact", "pruned"])
def test_weights_from_every_kind_of_file(kind: str, tmp_path: Path) -> None:
    seed_everything(4, verbose=False)
    source, student = Classifier(), Classifier()
    path = tmp_path / ("file.safetensors" if kind in ("safetensors", "artifact", "pruned") else "file.ckpt")
    if kind == "lightning":
        fit(source, limit_train_batches=1).save_checkpoint(path, weights_only=False)
    elif kind == "state_dict":
        torch.save(source.state_dict(), path)
    elif kind == "inner":  # the network's names lack the module's prefix
        torch.save(source.net.state_dict(), path)
    elif kind == "safetensors":
        save_file(source.state_dict(), path)
    else:
        source = compress(source, IterativePruning(0.5, Select(types=["Conv2d"]))) if kind == "pruned" else source
        save_compressed(source, path)
    before = copied(student)
    teacher = as_teacher(str(path), student)
    assert isinstance(teacher, ModuleTeacher)
    assert same(copied(teacher.module), copied(source))
    assert same(before, copied(student))
    if kind not in ("artifact", "pruned"):
        assert same(copied(load_teacher(path, Net()).module), copied(source.net))


def test_a_class_is_built_from_its_checkpoint(tmp_path: Path) -> None:
    source = Classifier(width=6)
    fit(source, limit_train_batches=1).save_checkpoint(tmp_path / "file.ckpt", weights_only=False)
    teacher = load_teacher(tmp_path / "file.ckpt", Classifier)
    assert teacher.module.net.layer1[0].out_channels == 6
    assert same(copied(teacher.module), copied(source))


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, ConfigurationError, "there is no file .*did you mean 'teacher.ckpt'"),
        (b"not a file of tensors", ArtifactError, "is not a file of tensors and builtins"),
        ({"a.weight": torch.ones(1)}, ConfigurationError, "holds other tensors than Net"),
        ("wide", ConfigurationError, "does not fit Net"),
        ([1], ArtifactError, "holds a list"),
    ],
    ids=["missing", "damaged", "other", "shapes", "list"],
)
def test_files_that_are_refused(content: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    path = tmp_path / "teacher.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(Net(9).state_dict() if content == "wide" else content, path)
    else:
        torch.save({}, path)
        path = tmp_path / "teacher.ckp"
    with pytest.raises(error, match=message):
        as_teacher(path, Net())


def test_means_of_several_teachers() -> None:
    a, b = Net(), Net(6)
    logits = [ask(ModuleTeacher(net)).output for net in (a, b)]
    weighted = Ensemble([a, b], weights=[3, 1])
    torch.testing.assert_close(ask(weighted, "layer1").output, 0.75 * logits[0] + 0.25 * logits[1])
    assert torch.equal(ask(weighted, "layer1").features["layer1"][0], a.layer1(X))
    probable = ask(Ensemble([a, b], mean="probabilities")).output
    torch.testing.assert_close(probable.softmax(1), (logits[0].softmax(1) + logits[1].softmax(1)) / 2)
    assert isinstance(as_teacher([a, b]), Ensemble)


def test_an_ensemble_trains_a_student() -> None:
    members = [Net(6), Classifier(8)]
    before = [copied(member) for member in members]
    trainer = fit(DistillationModule(Classifier(), members))
    assert [same(a, copied(b)) for a, b in zip(before, members, strict=True)] == [True, True]
    assert "teacher/accuracy" in trainer.callback_metrics


def test_a_function_sees_batch_and_number() -> None:
    seen = []

    def oracle(batch: Any, batch_idx: int) -> Tensor:
        seen.append((len(batch), batch_idx))
        return nn.functional.one_hot(batch[1], 3) * 10.0

    trainer = fit(DistillationModule(Classifier(), oracle))
    assert seen == [(2, index) for index in range(4)]
    assert "teacher/agreement" not in trainer.callback_metrics
    assert isinstance(as_teacher(oracle), FunctionTeacher)


def test_stored_outputs_come_with_the_batch() -> None:
    """The student's own step gets the plain batch, and nobody runs the teacher."""
    calls = []

    class Spy(Net):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(x)
            return super().forward(x)

    class Stored(Classifier):
        def train_dataloader(self) -> Any:
            data, labels = images().tensors
            return DataLoader([CachedBatch((data[:6], labels[:6]), torch.full((6, 3), 2.0))], batch_size=None)

    trainer = fit(DistillationModule(Stored(), Spy(), LogitsMSE()), limit_val_batches=0)
    assert [len(inputs) for inputs in calls] == [2] * len(calls)  # the look at two samples before the first epoch
    assert trainer.callback_metrics["distill/logits_mse"] > 0


def test_a_teacher_of_ones_own() -> None:
    class Oracle(Teacher):
        has_validation = False

        def split(self, batch: Any) -> tuple[Any, Any]:
            return batch[:2], batch[1]

        def answer(self, question: Question) -> Answer:
            return Answer(nn.functional.one_hot(question.extra, 3).float())

    trainer = fit(DistillationModule(Classifier(), Oracle(), LogitsMSE()))
    assert trainer.callback_metrics["distill/logits_mse"] > 0


class Headless(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: as_teacher(3), "`teacher` must be a module"),
        (lambda: as_teacher(Net), "`teacher` must be a module"),
        (lambda: as_teacher("baseline"), "needs the student"),
        (lambda: as_teacher([]), "must be a list of teachers"),
        (lambda: Ensemble([Net()], weights=[0]), "`weights` must be 1 numbers above 0"),
        (lambda: Ensemble([Net()], mean="median"), "`mean` must be"),
        (lambda: ModuleTeacher(Headless()), "has no forward to call.*one of 'net'"),
        (lambda: ModuleTeacher("net"), "must be a torch.nn.Module"),
        (lambda: FunctionTeacher(3), "something to call"),
        (lambda: load_teacher("x", 3), "`model` must be a module"),
    ],
)
def test_what_is_no_teacher(make: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_a_teacher_without_forward_is_called_where_the_student_is() -> None:
    assert torch.equal(ask(ModuleTeacher(module := Headless(), output="net")).output, module.net(X))
    assert ask(as_teacher(module, output="net")).output.shape == (4, 3)


def test_layers_of_a_teacher_that_has_none_are_refused() -> None:
    hint = Term(FitNetsHints(), pairs={"net.layer1": "a"})
    module = DistillationModule(Classifier(), lambda batch, index: batch, hint)
    with pytest.raises(ConfigurationError, match="gives only its output"):
        fit(module)
    module = DistillationModule(Classifier(), lambda batch, index: torch.zeros(6, 4), KnowledgeDistillation())
    with pytest.raises(ConfigurationError, match=r"\(6, 4\).*\(6, 3\)"):
        fit(module)
