"""The callback: the module's gradients without touching the step, and an error where they cannot arrive."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kd_models import Classifier, Manual, Net, copied, fit, images, same
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_compress import (
    ConfigurationError,
    Distillation,
    DistillationModule,
    ExactResume,
    IterativePruning,
    Schedule,
    Select,
    StructuredPruning,
    journal_of,
    load_compressed,
    save_compressed,
)
from lightning_compress.distillation import (
    AttentionTransfer,
    FitNetsHints,
    KnowledgeDistillation,
    Ramp,
    Term,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training"),
]


def objective() -> dict[str, Term]:
    return {
        "kd": Term(KnowledgeDistillation(), 0.9),
        "hint": Term(FitNetsHints(), 0.5, pairs=["net.layer1", "net.layer2"]),
        "at": Term(AttentionTransfer(), 20.0, pairs="net.layer*"),
    }


class Gradients(Callback):
    """Collects the gradients that each optimizer step sees."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        named = {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None}
        held = [p for group in optimizer.param_groups for p in group["params"]]
        own = {id(p) for p in pl_module.parameters()}
        self.seen.append(named | {f"extra{i}": p.grad.clone() for i, p in enumerate(held) if id(p) not in own})


@pytest.mark.parametrize(
    ("make", "kwargs"),
    [
        (Classifier, {}),
        (Classifier, {"accumulate_grad_batches": 2}),
        (Manual, {}),
        (Classifier, {"precision": "64-true"}),
    ],
    ids=["plain", "accumulated", "manual", "double"],
)
def test_gradients_equal_those_of_the_module(make: Any, kwargs: dict[str, Any]) -> None:
    found = []
    for way in ("module", "callback"):
        seed_everything(2, verbose=False)
        student = make()
        teacher = make(width=8)
        arguments: dict[str, Any] = {"losses": objective(), "temperature": Ramp(6, 2), "task_weight": 0.3}
        gradients = Gradients()
        if way == "module":
            trainer = fit(DistillationModule(student, teacher, **arguments), [gradients], epochs=2, **kwargs)
        else:
            trainer = fit(student, [Distillation(teacher, **arguments), gradients], epochs=2, **kwargs)
        found.append((gradients.seen, copied(student), trainer.callback_metrics))
    for ours, theirs in zip(found[0][0], found[1][0], strict=True):
        assert ours.keys() == theirs.keys()
        assert any(name.startswith("extra") for name in ours) or make is Manual
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-5)
    for key in found[0][1]:
        torch.testing.assert_close(found[0][1][key], found[1][1][key], rtol=1e-3, atol=1e-5)
    for name in ("distill/kd", "distill/hint", "distill/at", "distill/loss", "teacher/agreement", "train/loss"):
        assert found[0][2][name].item() == pytest.approx(found[1][2][name].item(), rel=1e-3, abs=1e-5)


def test_the_scale_of_mixed_precision_is_followed() -> None:
    """A scaler multiplies the loss; the teacher's gradients must follow (float16 itself needs a GPU)."""
    from lightning.pytorch.plugins import MixedPrecision

    found = []
    for scale in (None, 1024.0):
        seed_everything(2, verbose=False)
        student, teacher, gradients = Classifier(), Classifier(8), Gradients()
        plugin = MixedPrecision("bf16-mixed", "cpu")
        plugin.scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
        fit(
            student,
            [Distillation(teacher, KnowledgeDistillation()), gradients],
            limit_train_batches=1,
            plugins=[plugin],
        )
        found.append(gradients.seen[0])
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=2e-2, atol=1e-3)


def test_baseline_is_the_dense_student_and_stays_bit_identical() -> None:
    seed_everything(0, verbose=False)
    student = Classifier()
    dense = copied(student)
    distill = Distillation(temperature=2.0)
    prune = IterativePruning(Schedule(0.8, end="50%", every={"step": 1}), Select(types=["Conv2d"]), floor=0.0)
    fit(student, [distill, prune], epochs=2)
    assert distill.distiller.teacher is not None
    assert same(dense, copied(distill.distiller.teacher.module))
    zeros = sum(int((m.weight == 0).sum()) for m in student.modules() if isinstance(m, nn.Conv2d))
    total = sum(m.weight.numel() for m in student.modules() if isinstance(m, nn.Conv2d))
    assert zeros / total == pytest.approx(0.8, abs=0.01)
    assert list(student.state_dict()) == list(dense)
    assert "kd" in distill.plan_text
    assert "teacher Classifier" in distill.plan_text


@pytest.mark.parametrize("way", ["module", "callback"])
def test_channels_are_removed_under_a_teacher(way: str, tmp_path: Path) -> None:
    """The artifact loads on the bare student; plan and journal name the student's own layers."""
    seed_everything(0, verbose=False)
    student = Classifier()
    prune = StructuredPruning(Schedule(final=0.5, end="50%", every={"step": 1}))
    if way == "module":
        fit(DistillationModule(student, "baseline", objective_on_itself()), [prune], epochs=2)
    else:
        fit(student, [Distillation("baseline", objective_on_itself()), prune], epochs=2)
    assert prune.compressed is not None
    assert {edit.path for edit in journal_of(prune.compressed)} <= {
        "net.layer1.0",
        "net.layer1.1",
        "net.layer2.0",
        "net.head",
    }
    save_compressed(prune.compressed, tmp_path / "small.safetensors")
    bare = load_compressed(Classifier(), tmp_path / "small.safetensors")
    assert bare.net.layer1[0].out_channels == 2
    data = images().tensors[0]
    with torch.no_grad():
        assert torch.equal(bare.eval()(data), prune.compressed.eval()(data))


def objective_on_itself() -> dict[str, Term]:
    return {"kd": Term(KnowledgeDistillation()), "hint": Term(FitNetsHints(), 0.1, pairs="net.layer*")}


def train(folder: Path, seed: int, ckpt_path: Path | None = None) -> tuple[Any, Any, Any]:
    seed_everything(11, verbose=False)
    teacher = Classifier(8)
    seed_everything(seed, verbose=False)
    student = Classifier()
    distill = Distillation(teacher, objective(), Ramp(8, 1), name="big")
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    trainer = fit(student, [ExactResume(), distill, saver], epochs=2, ckpt_path=ckpt_path, enable_checkpointing=True)
    return student, distill, trainer


def test_resume_equals_uninterrupted(tmp_path: Path) -> None:
    student, distill, trainer = train(tmp_path, seed=0)
    for step in (3, 6):
        resumed, again, second = train(tmp_path / "again", seed=9, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert same(copied(student), copied(resumed))
        ours, theirs = (dict(enumerate(c.distiller.parameters())) for c in (distill, again))
        assert same(ours, theirs)
        assert again.distiller.updates == 8
        for a, b in zip(trainer.optimizers[0].state.values(), second.optimizers[0].state.values(), strict=True):
            assert same(a, b)
    content = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    assert "Distillation[big]" in content["callbacks"]
    assert not any("adapter" in key for key in content["state_dict"])


class CopyInside(Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        for callback in trainer.callbacks:
            if isinstance(callback, Distillation):
                for clone in (pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):
                    assert clone.distiller.updates == callback.distiller.updates
        assert same(copied(copy.deepcopy(pl_module)), copied(pl_module))


def test_copies_in_the_middle_of_a_fit_change_nothing(tmp_path: Path) -> None:
    results = []
    for extra in ([], [CopyInside()]):
        seed_everything(3, verbose=False)
        student, teacher = Classifier(), Classifier(8)
        fit(student, [Distillation(teacher, objective()), *extra])
        results.append(copied(student))
        assert not any(part._forward_hooks for part in student.modules())
    assert same(*results)


def test_hooks_are_gone_after_an_exception() -> None:
    class Fails(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            super().training_step(batch, batch_idx)
            raise ValueError("broken")

    student = Fails()
    with pytest.raises(ValueError, match="broken"):
        fit(student, [Distillation(Classifier(8), objective())])
    assert not any(part._forward_hooks for part in student.modules())


def test_a_layer_that_the_loss_does_not_use_is_refused() -> None:
    class Aside(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.aside = nn.Linear(36, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.aside(x.flatten(1))
            return self.net(x)

    losses = Term(FitNetsHints(), pairs={"aside": "head"})
    with pytest.raises(ConfigurationError, match="does not depend on what 'aside' returned"):
        fit(Aside(), [Distillation(Net(8), losses)])
    fit(DistillationModule(Aside(), Net(8), losses))


def test_a_student_whose_output_is_not_seen_is_refused() -> None:
    class Direct(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

    with pytest.raises(ConfigurationError, match='student_output="net"'):
        fit(Direct(), [Distillation(Net(8))])
    fit(Direct(), [Distillation(Net(8), student_output="net")])


def test_two_teachers_at_once() -> None:
    seed_everything(0, verbose=False)
    found = []
    for names in (["a"], ["a", "b"]):
        seed_everything(0, verbose=False)
        student, teacher = Classifier(dropout=0.0), Classifier(8)
        gradients = Gradients()
        callbacks = [Distillation(teacher, name=name, task_weight=1.0) for name in names]
        trainer = fit(student, [*callbacks, gradients], limit_train_batches=1)
        found.append(gradients.seen[0])
    seed_everything(0, verbose=False)
    alone, gradients = Classifier(dropout=0.0), Gradients()
    fit(alone, [gradients], limit_train_batches=1)
    for name, task in gradients.seen[0].items():
        one, two = found[0][name] - task, found[1][name] - task
        torch.testing.assert_close(two, 2 * one, rtol=1e-3, atol=1e-5)
    assert {"distill/a/kd", "distill/b/kd", "teacher/b/agreement"} <= set(trainer.callback_metrics)
