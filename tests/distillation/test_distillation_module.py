"""DistillationModule: the student stays itself, the teacher stays as it was, the objective is the formula."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kd_models import QUIET, Classifier, Manual, Net, copied, fit, images, same
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_compress import ConfigurationError, Distillation, DistillationModule, ExactResume
from lightning_compress.distillation import (
    FitNetsHints,
    KnowledgeDistillation,
    LogitsMSE,
    MutualLearning,
    Ramp,
    Supervised,
    Term,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


def objective() -> dict[str, Term]:
    return {"kd": Term(KnowledgeDistillation(), 0.9), "hint": Term(FitNetsHints(), 0.5, pairs={"net.layer*": "layer*"})}


def wrapped(width: int = 4, **kwargs: Any) -> tuple[DistillationModule, nn.Module]:
    seed_everything(1, verbose=False)
    teacher = Net(8)
    return DistillationModule(Classifier(width), teacher, **{"losses": objective(), **kwargs}), teacher


def test_the_first_step_is_the_formula() -> None:
    """Reference: the same forward passes by hand, T^2 KL and the hints' squared error, one SGD step."""
    seed_everything(0, verbose=False)
    student, teacher = Classifier(dropout=0.0), Net(8).eval()
    expected = copy.deepcopy(student)
    module = DistillationModule(student, teacher, temperature=3.0, task_weight=0.25)
    seen: list[Tensor] = []

    class First(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.extend(batch)

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            self.gradients = {name: p.grad.clone() for name, p in pl_module.named_parameters()}

    first = First()
    trainer = fit(module, [first], limit_train_batches=1, limit_val_batches=0)
    logits = expected.train()(seen[0])
    with torch.no_grad():
        soft = (teacher(seen[0]) / 3).softmax(1)
    kd = 9 * (soft * (soft.log() - (logits / 3).log_softmax(1))).sum(1).mean()
    (0.25 * F.cross_entropy(logits, seen[1]) + kd).backward()
    for name, parameter in expected.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(first.gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)
    assert trainer.callback_metrics["distill/kd"] == pytest.approx(kd.item(), rel=1e-2)
    assert trainer.callback_metrics["distill/loss"] == pytest.approx(kd.item(), rel=1e-2)
    assert trainer.callback_metrics["train/loss"] == pytest.approx(F.cross_entropy(logits, seen[1]).item(), rel=1e-5)


def test_the_teacher_is_bit_identical_and_nowhere() -> None:
    module, teacher = wrapped()
    before = copied(teacher)
    modes: list[bool] = []

    class Disturb(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            pl_module.train()
            teacher.train()

        def on_train_batch_end(self, *args: Any) -> None:
            modes.append(any(part.training for part in teacher.modules()))

    trainer = fit(module, [Disturb()], epochs=2)
    assert same(before, copied(teacher))
    assert modes == [False] * 8
    theirs = {id(parameter) for parameter in teacher.parameters()}
    assert not theirs & {id(p) for p in module.parameters()}
    assert not theirs & {id(p) for o in trainer.optimizers for g in o.param_groups for p in g["params"]}
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert not any(part is teacher for part in module.modules())


def test_names_keys_and_checkpoint_are_the_students(tmp_path: Path) -> None:
    module, _ = wrapped()
    assert list(module.state_dict()) == list(Classifier().state_dict())
    assert [name for name, _ in module.named_modules()] == [name for name, _ in Classifier().named_modules()]
    trainer = fit(module)
    assert not any(part._forward_hooks for part in module.modules())
    trainer.save_checkpoint(tmp_path / "file.ckpt", weights_only=False)
    content = torch.load(tmp_path / "file.ckpt", weights_only=True)
    assert content["hyper_parameters"] == {"width": 4, "dropout": 0.2, "lr": 0.05}
    assert list(content["distillation"]["learnt"]) == ["adapter.hint"]
    bare = Classifier.load_from_checkpoint(tmp_path / "file.ckpt", weights_only=True)
    assert type(bare) is Classifier
    assert same(copied(bare), copied(module.student))
    assert module.student.net is module.net
    assert isinstance(module, Classifier)


def test_adapters_learn_with_the_first_group_of_the_first_optimizer() -> None:
    module, _ = wrapped()
    seen: list[Tensor] = []

    class Start(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen.extend(p.detach().clone() for p in pl_module.distiller.parameters())

    trainer = fit(module, [Start()])
    learnt = module.distiller.parameters()
    held = {id(p) for p in trainer.optimizers[0].param_groups[0]["params"]}
    assert len(learnt) == len(seen) > 0
    assert all(id(p) in held for p in learnt)
    assert all(not torch.equal(a, b) for a, b in zip(seen, learnt, strict=True))


def train(folder: Path, seed: int, ckpt_path: Path | None = None, **kwargs: Any) -> tuple[Any, Any]:
    seed_everything(seed, verbose=False)
    teacher = Net(8)
    teacher.load_state_dict(torch.load(folder / "teacher.pt", weights_only=True))
    module = DistillationModule(Classifier(), teacher, objective(), temperature=Ramp(8, 1), task_weight=Ramp(0.1, 1.0))
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    callbacks = [ExactResume(), saver]
    trainer = fit(module, callbacks, epochs=2, ckpt_path=ckpt_path, enable_checkpointing=True, **kwargs)
    return module, trainer


def test_resume_equals_uninterrupted(tmp_path: Path) -> None:
    torch.save(Net(8).state_dict(), tmp_path / "teacher.pt")
    module, trainer = train(tmp_path, seed=0)
    for step in (3, 6):
        resumed, second = train(tmp_path, seed=77, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert same(module.state_dict(), resumed.state_dict())
        assert module.distiller.updates == resumed.distiller.updates == 8
        learnt = [{k: v.clone() for k, v in enumerate(m.distiller.parameters())} for m in (module, resumed)]
        assert same(*learnt)
        for a, b in zip(trainer.optimizers[0].state.values(), second.optimizers[0].state.values(), strict=True):
            assert same(a, b)


def test_another_teacher_on_resume_is_refused(tmp_path: Path) -> None:
    torch.save(Net(8).state_dict(), tmp_path / "teacher.pt")
    train(tmp_path, seed=0)
    seed_everything(1234, verbose=False)
    torch.save(Net(8).state_dict(), tmp_path / "teacher.pt")
    with pytest.raises(ConfigurationError, match="`teacher` is not the one"):
        train(tmp_path, seed=0, ckpt_path=tmp_path / "step=3.ckpt")


def test_copies_share_the_teacher_and_nothing_else() -> None:
    module, teacher = wrapped()
    fit(module)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin) is type(module)
        assert same(copied(twin), copied(module))
        assert twin.net is not module.net
        assert twin.student.net is twin.net
        twin.net.head.weight.data.zero_()
        assert twin.student.net.head.weight.abs().sum() == 0
        fit(twin)
    assert copy.deepcopy(module).distiller.teacher is module.distiller.teacher
    assert module.net.head.weight.abs().sum() > 0
    assert teacher is module.distiller.teacher.module


def test_manual_optimization_with_two_optimizers() -> None:
    seed_everything(0, verbose=False)
    module = DistillationModule(Manual(), Net(8), objective())
    trainer = fit(module, epochs=2)
    assert {"distill/kd", "distill/hint", "train/loss", "val/accuracy"} <= set(trainer.callback_metrics)
    assert module.distiller.updates == 8
    alone = Manual()
    alone.load_state_dict(Manual().state_dict())
    assert all(p.grad is not None for p in module.distiller.parameters())


@pytest.mark.parametrize(
    "kwargs",
    [
        {"accumulate_grad_batches": 2},
        {"precision": "bf16-mixed"},
        {"precision": "64-true"},
        {"gradient_clip_val": 0.1},
        {"fast_dev_run": True},
    ],
    ids=str,
)
def test_trainer_settings(kwargs: dict[str, Any]) -> None:
    module, teacher = wrapped(task_weight=Ramp(0.0, 1.0))
    before = copied(teacher)
    fit(module, epochs=2, **kwargs)
    assert same(before, copied(teacher))
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())


def test_the_teacher_runs_under_the_steps_autocast() -> None:
    types = []

    class Spy(Net):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            types.append((out.dtype, torch.is_grad_enabled()))
            return out

    fit(DistillationModule(Classifier(), Spy(8)), precision="bf16-mixed")
    assert set(types) == {(torch.bfloat16, False)}


def test_the_teacher_is_compared_while_validating() -> None:
    module, teacher = wrapped()
    trainer = fit(module)
    data, labels = images().tensors
    with torch.no_grad():
        theirs, ours = teacher(data).argmax(1), module.eval()(data).argmax(1)
    assert trainer.callback_metrics["teacher/accuracy"] == pytest.approx((theirs == labels).float().mean().item())
    assert trainer.callback_metrics["teacher/agreement"] == pytest.approx((theirs == ours).float().mean().item())
    assert trainer.callback_metrics["val/accuracy"] == pytest.approx((ours == labels).float().mean().item())


def test_a_plain_network_with_a_task(tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    net, teacher = Net(), Net(8)
    task = Supervised(
        optimizer=partial(torch.optim.SGD, lr=0.1), metric=lambda out, y: (out.argmax(1) == y).float().mean()
    )
    module = DistillationModule(net, teacher, objective_of_net(), task=task)
    module.example_input_array = images().tensors[0][:2]
    before = copied(net)
    loader = DataLoader(images(), batch_size=6)
    trainer = Trainer(max_epochs=1, **QUIET)
    trainer.fit(module, loader, loader)
    trainer.save_checkpoint(tmp_path / "file.ckpt")
    assert {"train/loss", "val/loss", "val/metric", "teacher/accuracy"} <= set(trainer.callback_metrics)
    assert not same(before, copied(net))
    fresh = Net()
    fresh.load_state_dict(torch.load(tmp_path / "file.ckpt", weights_only=True)["state_dict"])
    assert same(copied(fresh), copied(net))
    assert same(copied(copy.deepcopy(net)), copied(net))


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(1) == target).float().mean()


def objective_of_net() -> dict[str, Term]:
    return {"kd": Term(KnowledgeDistillation()), "hint": Term(FitNetsHints(), pairs="layer*")}


def test_a_weight_of_zero_costs_no_teacher() -> None:
    calls = []

    class Spy(Net):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(torch.is_grad_enabled())
            return super().forward(x)

    module = DistillationModule(Classifier(), Spy(8), Term(LogitsMSE(), 0.0))
    trainer = fit(module, limit_val_batches=0)
    assert not calls
    assert trainer.callback_metrics["distill/loss"] == 0


def test_mutual_learning_needs_no_teacher() -> None:
    class Peers(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.other = Net(6)

        def forward(self, x: Tensor) -> Any:
            return self.net(x), self.other(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return sum(F.cross_entropy(out, batch[1]) for out in self(batch[0]))

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val/loss", F.cross_entropy(self(batch[0])[0], batch[1]))

    trainer = fit(DistillationModule(Peers(), None, MutualLearning(), temperature=1.0))
    assert trainer.callback_metrics["distill/dml"] > 0


def test_weight_averaging_and_compile(tmp_path: Path) -> None:
    module, teacher = wrapped()
    before = copied(teacher)
    averaging = EMAWeightAveraging(decay=0.5)
    saver = ModelCheckpoint(tmp_path, filename="last")
    fit(module, [averaging, saver], epochs=2, enable_checkpointing=True)
    assert same(copied(Classifier.load_from_checkpoint(saver.best_model_path, weights_only=True)), copied(module))
    assert same(before, copied(teacher))


class NoForward(Classifier):
    forward = LightningModule.forward  # as if there were none

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", F.cross_entropy(self.net(batch[0]), batch[1]))


def test_a_student_that_calls_a_submodule() -> None:
    with pytest.raises(ConfigurationError, match='student_output="net"'):
        fit(DistillationModule(NoForward(), Net(8), objective()))
    trainer = fit(DistillationModule(NoForward(), Net(8), objective(), student_output="net"))
    assert trainer.callback_metrics["distill/kd"] > 0
    assert "teacher/agreement" in trainer.callback_metrics

    class Beside(NoForward):
        forward = Classifier.forward

    with pytest.raises(ConfigurationError, match='student_output="net"'):
        fit(DistillationModule(Beside(), Net(8)), num_sanity_val_steps=0)


class Clash(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)

    def log(self) -> None:
        """Hide Lightning's."""


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DistillationModule(3, Net()), "`student` must be a torch.nn.Module"),
        (lambda: DistillationModule(torch.compile(Net()), Net()), "`student` came out of torch.compile"),
        (lambda: DistillationModule(DistillationModule(Net(), Net()), Net()), "DistillationModule already"),
        (lambda: DistillationModule(LightningModule(), Net()), "no training_step"),
        (lambda: DistillationModule(Classifier(), Net(), task=Supervised()), "`task` is for a plain module"),
        (lambda: DistillationModule(Net(), None), "`teacher` is None"),
        (lambda: DistillationModule(Net(), 5), "`teacher` must be a module"),
        (lambda: DistillationModule(Net(), Net(), temperature=0), "`temperature` must be above 0"),
        (lambda: DistillationModule(Net(), Net(), task_weight=-1), "`task_weight` must be a number of at least 0"),
        (
            lambda: DistillationModule(Net(), Net(), losses=[KnowledgeDistillation]),
            r"build it: KnowledgeDistillation\(\)",
        ),
        (lambda: DistillationModule(Net(), Net(), losses=FitNetsHints()), "`pairs` is missing"),
        (lambda: DistillationModule(Net(), Net(), losses={}), "`losses` must be"),
        (lambda: Term(KnowledgeDistillation(), pairs="x"), "compares outputs; leave it out"),
        (lambda: DistillationModule(Clash(), Net()), "has a 'log' of its own"),
    ],
)
def test_errors_of_the_constructor(make: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_a_teacher_that_shares_parameters_is_refused() -> None:
    student = Classifier()
    student.net.head.requires_grad_(False)
    with pytest.raises(ConfigurationError, match="shares parameters"):
        DistillationModule(student, student.net)
    frozen = {name for name, p in student.named_parameters() if not p.requires_grad}
    assert frozen == {"net.head.weight", "net.head.bias"}
    assert student.net.training


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({"net.layer1": "layer3"}, "did you mean 'layer"),
        ({"net.layr1": "layer1"}, "did you mean 'net.layer"),
        ({"net.layer*": "head"}, "2 layers .*1"),
        ([], "`pairs` is empty"),
        ({"net.layer1": 3}, "map layer names"),
    ],
)
def test_layers_that_do_not_exist_are_refused_before_training(pairs: Any, message: str) -> None:
    student = Classifier()
    before = copied(student)
    with pytest.raises(ConfigurationError, match=message):
        fit(DistillationModule(student, Net(8), Term(FitNetsHints(), pairs=pairs)))
    assert same(before, copied(student))


def test_shapes_that_cannot_be_matched_name_both_layers() -> None:
    term = Term(FitNetsHints(), pairs={"net.layer1": "head"})
    with pytest.raises(ConfigurationError, match=r"student 'net.layer1' with teacher 'head'"):
        fit(DistillationModule(Classifier(), Net(8), term))


def test_loaders_passed_to_fit_need_example_inputs_for_features() -> None:
    student = Classifier()
    student.example_input_array = None
    loader = DataLoader(images(), batch_size=6)

    class Loaderless(Classifier):
        train_dataloader = LightningModule.train_dataloader
        val_dataloader = LightningModule.val_dataloader

    bare = Loaderless()
    bare.example_input_array = None
    with pytest.raises(ConfigurationError, match="`example_input_array` is None"):
        Trainer(max_epochs=1, **QUIET).fit(DistillationModule(bare, Net(8), objective()), loader, loader)
    fit(DistillationModule(student, Net(8), objective()))  # its own loader tells


def test_another_student_gets_another_baseline() -> None:
    callback = Distillation()
    for width in (4, 6):
        fit(student := Classifier(width), [callback], limit_train_batches=2)
        assert callback.distiller.updates == 2
        assert callback.distiller.teacher is not None
        assert callback.distiller.teacher.module.net.head.in_features == student.net.head.in_features


def test_other_losses_on_resume_are_refused(tmp_path: Path) -> None:
    module, _ = wrapped()
    fit(module).save_checkpoint(tmp_path / "file.ckpt")
    seed_everything(1, verbose=False)
    other = DistillationModule(Classifier(), Net(8))
    with pytest.raises(ConfigurationError, match=r"written with adapter.hint, this run has none"):
        fit(other, epochs=2, ckpt_path=tmp_path / "file.ckpt")
    plain = fit(Classifier())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(ConfigurationError, match="written without distillation"):
        fit(wrapped()[0], epochs=2, ckpt_path=tmp_path / "plain.ckpt")


def test_a_student_may_run_twice_in_a_step() -> None:
    """Two views of a batch: the objective is the mean over both runs, each with its own inputs."""

    class Twice(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            views = (batch[0], batch[0].flip(3))
            return sum(F.cross_entropy(self(view), batch[1]) for view in views)

    seed_everything(0, verbose=False)
    student, teacher = Twice(dropout=0.0), Net(8).eval()
    reference = copy.deepcopy(student).train()
    module = DistillationModule(student, teacher, LogitsMSE())
    seen: list[Tensor] = []

    class First(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.append(batch[0])

    trainer = fit(module, [First()], limit_train_batches=1, limit_val_batches=0)
    with torch.no_grad():
        views = (seen[0], seen[0].flip(3))
        expected = sum((reference(view) - teacher(view)).square().mean() for view in views) / 2
    assert trainer.callback_metrics["distill/logits_mse"] == pytest.approx(float(expected), rel=1e-4)
