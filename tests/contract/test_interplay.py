"""Pruning beside everything else a Trainer does: optimizers, precision, averaging, compilation, checkpoints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract_rows import RankFromData, Task
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn

from lightning_compress import (
    Binarization,
    ConfigurationError,
    EarlyStoppingAtTarget,
    ExactResume,
    FixedPointTraining,
    IterativePruning,
    ModelCheckpointAtTarget,
    Schedule,
    Select,
    SelectionError,
    SoftWeightSharing,
    Ternarization,
    WeightSharing,
    load_compressed,
    save_compressed,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training"),
    pytest.mark.filterwarnings("ignore:.*WeightAveraging"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]

PRUNED = ("net.stem.weight", "net.depthwise.weight", "net.grouped.weight")


def pruning(final: float = 0.75, **schedule: Any) -> IterativePruning:
    return IterativePruning(Schedule(final=final, **{"end": "50%", "every": {"step": 1}, **schedule}), floor=0.02)


def trainer(folder: Path, *callbacks: Callback, max_epochs: int = 3, **arguments: Any) -> Trainer:
    seed_everything(0, verbose=False)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(max_epochs=max_epochs, callbacks=list(callbacks), default_root_dir=folder, **{**quiet, **arguments})


def zeros(state: dict[str, Tensor], keys: tuple[str, ...] = PRUNED) -> float:
    values = torch.cat([state[key].detach().flatten() for key in keys])
    return float((values == 0).float().mean())


class Sparse(Callback):
    """Asserts after every batch that what was pruned is exactly zero."""

    def __init__(self, callback: IterativePruning) -> None:
        self.callback, self.seen = callback, 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        wanted = self.callback.history[-1]["sparsity"] if self.callback.history else 0.0
        assert zeros(dict(pl_module.named_parameters())) == pytest.approx(wanted)
        self.seen += wanted > 0


OPTIMIZERS = {
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5),
    "fused_adam": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("arguments", [{}, {"accumulate_grad_batches": 3}, {"precision": "bf16-mixed"}], ids=str)
def test_zeros_are_exact_after_every_step(optimizer: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    model, callback = Task(), pruning()
    model.configure_optimizers = lambda: OPTIMIZERS[optimizer](model.parameters())
    watch = Sparse(callback)
    trainer(tmp_path, callback, watch, max_epochs=7, enable_checkpointing=False, **arguments).fit(model)
    assert callback.at_target
    assert watch.seen >= 40
    assert zeros(model.state_dict()) == pytest.approx(0.75, abs=0.01)


def test_pruning_ends_at_the_exact_count(tmp_path: Path) -> None:
    model, callback = Task(), pruning(0.6)
    trainer(tmp_path, callback, enable_checkpointing=False).fit(model)
    count = sum(int((model.state_dict()[key] == 0).sum()) for key in PRUNED)
    assert count == round(0.6 * sum(model.state_dict()[key].numel() for key in PRUNED))
    assert not (model.net.norm.weight == 0).any()
    assert not (model.net.head.weight == 0).any()


class Adversarial(LightningModule):
    """Two optimizers stepped by hand, the second only every other batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 36))
        self.judge = nn.Sequential(nn.Linear(36, 32), nn.ReLU(), nn.Linear(32, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        real = batch[0].flatten(1)
        fake = self.generator(torch.randn(len(real), 4))
        for optimizer, loss_of in (
            (first, lambda: F.softplus(self.judge(fake.detach())).mean() + F.softplus(-self.judge(real)).mean()),
            (second, lambda: F.softplus(-self.judge(fake)).mean()),
        ):
            if optimizer is second and batch_idx % 2:
                continue
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(loss_of())
            optimizer.step()
            self.untoggle_optimizer(optimizer)
            for name in ("generator", "judge"):
                assert self.expect == 0 or (getattr(self, name)[0].weight == 0).float().mean() >= self.expect

    expect = 0.0

    def configure_optimizers(self) -> Any:
        return (
            torch.optim.Adam(self.judge.parameters(), lr=1e-2, weight_decay=0.1),
            torch.optim.SGD(self.generator.parameters(), lr=1e-2, momentum=0.9),
        )

    def train_dataloader(self) -> Any:
        return Task().train_dataloader()


def test_manual_optimization_with_two_optimizers_counts_batches(tmp_path: Path) -> None:
    model = Adversarial()
    callback = IterativePruning(Schedule(0.5, shape="once", start={"step": 3}), scope="layer")

    class Arm(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            pl_module.expect = 0.5 if callback.at_target else 0.0

    trainer(tmp_path, callback, Arm(), max_epochs=2, enable_checkpointing=False).fit(model)
    assert callback.updates == 16  # batches, although 24 optimizer steps were made
    assert callback.history[0]["step"] == 4
    assert (model.generator[0].weight == 0).float().mean() == 0.5


def test_steps_that_the_scaler_skips_do_not_count(tmp_path: Path) -> None:
    class Overflow(Task):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if batch_idx in (1, 2) else loss

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    callback = pruning(end={"step": 4})
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    model = Overflow()
    trainer(tmp_path, callback, max_epochs=1, enable_checkpointing=False, plugins=[plugin]).fit(model)
    assert callback.updates == 6
    assert [entry["step"] for entry in callback.history] == [1, 2, 3, 4, 5]
    assert zeros(model.state_dict()) == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize("skipped", [0, 3])
def test_a_target_at_the_end_is_reached_even_if_steps_were_skipped(skipped: int, tmp_path: Path) -> None:
    class Overflow(Task):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if batch_idx < skipped else loss

    callback, model = pruning(end="100%"), Overflow()
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))
    trainer(tmp_path, callback, max_epochs=1, enable_checkpointing=False, plugins=[plugin]).fit(model)
    assert callback.at_target
    assert zeros(model.state_dict()) == pytest.approx(0.75, abs=0.01)


# --------------------------------------------------------------------------- averaging


class ZerosInValidation(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if not trainer.sanity_checking:
            self.seen.append(zeros(pl_module.state_dict()))


def test_ema_is_sparse_in_validation_in_the_file_and_at_the_end(tmp_path: Path) -> None:
    model, callback, watch = Task(), pruning(), ZerosInValidation()
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(tmp_path, EMAWeightAveraging(decay=0.9), callback, watch, saver).fit(model)
    final = callback.history[-1]["sparsity"]
    assert watch.seen[-1] == pytest.approx(final)
    assert zeros(torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)["state_dict"]) == pytest.approx(final)
    assert zeros(model.state_dict()) == pytest.approx(final)


def test_ema_resumes_exactly(tmp_path: Path) -> None:
    def run(folder: Path, ckpt_path: str | None = None) -> Task:
        model, saver = Task(), ModelCheckpoint(folder, filename="{step}", every_n_train_steps=5, save_top_k=-1)
        trainer(tmp_path, ExactResume(), EMAWeightAveraging(decay=0.9), pruning(), saver).fit(
            model, ckpt_path=ckpt_path
        )
        return model

    whole = run(tmp_path / "a").state_dict()
    resumed = run(tmp_path / "b", str(tmp_path / "a" / "step=10.ckpt")).state_dict()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_an_average_has_the_structure_that_a_method_gave_the_model_and_resumes_exactly(tmp_path: Path) -> None:
    def run(folder: Path, seed: int, ckpt_path: str | None = None) -> Task:
        saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=5, save_top_k=-1)
        fitted = trainer(tmp_path, ExactResume(), EMAWeightAveraging(decay=0.9), RankFromData(), saver)
        torch.manual_seed(seed)
        model = Task("MLP")  # from other weights another rank would follow
        fitted.fit(model, ckpt_path=ckpt_path)
        return model

    whole = run(tmp_path / "a", 0).state_dict()
    assert any("first" in key for key in whole)
    resumed = run(tmp_path / "b", 3, str(tmp_path / "a" / "step=10.ckpt")).state_dict()
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_swa_is_sparse_in_the_file_and_at_the_end(tmp_path: Path) -> None:
    model, callback = Task(), pruning(end="30%")
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(tmp_path, StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2), callback, saver, max_epochs=5).fit(
        model
    )
    final = callback.history[-1]["sparsity"]
    assert final == pytest.approx(0.75, abs=0.01)
    assert zeros(model.state_dict()) == pytest.approx(final)
    for file in tmp_path.glob("epoch=[234].ckpt"):
        assert zeros(torch.load(file, weights_only=True)["state_dict"]) == pytest.approx(final)


@pytest.mark.parametrize(
    "averaging", [EMAWeightAveraging(), StochasticWeightAveraging(swa_lrs=0.1)], ids=["ema", "swa"]
)
def test_the_wrong_order_is_refused(averaging: Callback, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"put {type(averaging).__name__} before IterativePruning"):
        trainer(tmp_path, pruning(), averaging).fit(Task())


# --------------------------------------------------------------------------- compile


@pytest.mark.parametrize("how", ["in_place", "submodule"])
def test_compiled_modules(how: str, tmp_path: Path) -> None:
    model, callback = Task("MLP"), pruning()
    if how == "in_place":
        model.compile(backend="eager")
    else:
        model.net = torch.compile(model.net, backend="eager")
    trainer(tmp_path, callback, enable_checkpointing=False).fit(model)
    assert [target.key for target in callback._targets] == ["net.layers.1.weight", "net.layers.3.weight"]
    weights = [parameter for name, parameter in model.named_parameters() if "layers" in name and "weight" in name]
    assert float(torch.cat([w.flatten() for w in weights]).eq(0).float().mean()) == pytest.approx(0.75, abs=0.01)
    save_compressed(model, tmp_path / "file.safetensors")
    bare = load_compressed(Task("MLP"), tmp_path / "file.safetensors")
    assert torch.equal(bare.net.layers[1].weight, weights[0])


# --------------------------------------------------------------------------- which checkpoint


class SparsityMetric(Task):
    """Validates the number of zeros, so that the metric says which weights it belongs to."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("val/zeros", zeros(dict(self.named_parameters())))


def test_the_monitored_metric_belongs_to_the_saved_weights(tmp_path: Path) -> None:
    model = SparsityMetric()
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="val/zeros", mode="max", save_top_k=-1)
    fitted = trainer(tmp_path, pruning(end="90%"), saver, max_epochs=4)
    fitted.fit(model)
    for path, score in saver.best_k_models.items():
        saved = torch.load(path, weights_only=True)["state_dict"]
        assert zeros(saved) == pytest.approx(float(score))
        fresh = SparsityMetric()
        again = trainer(tmp_path, pruning()).validate(fresh, ckpt_path=path, verbose=False)
        assert again[0]["val/zeros"] == pytest.approx(float(score))
    assert len(set(map(float, saver.best_k_models.values()))) > 2


def test_checkpoints_and_early_stopping_wait_for_the_target(tmp_path: Path) -> None:
    model = Task()
    callback = pruning(0.7, start=2, end=2, shape="once")
    saver = ModelCheckpointAtTarget(tmp_path, filename="{epoch}", monitor="val/loss", save_top_k=-1)
    stopper = EarlyStoppingAtTarget("val/loss", patience=0, mode="max", min_delta=1e9)
    fitted = trainer(tmp_path, callback, saver, stopper, max_epochs=8)
    fitted.fit(model)
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["epoch=2.ckpt", "epoch=3.ckpt"]
    assert fitted.current_epoch == 4  # the first look is in epoch 2, the second stops
    assert zeros(torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)["state_dict"]) == pytest.approx(0.7, abs=0.01)


@pytest.mark.parametrize(
    "waiting", [ModelCheckpointAtTarget(), EarlyStoppingAtTarget("val/loss")], ids=["save", "stop"]
)
def test_waiting_for_nothing_is_refused(waiting: Callback, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no compression callback"):
        trainer(tmp_path, waiting).fit(Task())


# --------------------------------------------------------------------------- refused before epoch 0


def _refused(
    tmp_path: Path, callbacks: list[Callback], match: str, model: LightningModule | None = None, **arguments: Any
):
    model = model or Task()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ConfigurationError, match=match):
        trainer(tmp_path, *callbacks, enable_checkpointing=False, **arguments).fit(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_conflicts_and_duplicates(tmp_path: Path) -> None:
    _refused(tmp_path, [pruning(), ModelPruning("l1_unstructured", amount=0.5)], "ModelPruning change the same")
    _refused(
        tmp_path, [pruning(), pruning()], r"2 IterativePruning without a name.*IterativePruning\(..., name='first'\)"
    )
    named = [IterativePruning(0.5, name="a"), IterativePruning(0.5, name="a")]
    _refused(tmp_path, named, "2 IterativePruning named 'a'")
    different = [IterativePruning(0.5, Select(include=name), name=name) for name in ("net.stem", "net.grouped")]
    trainer(tmp_path, *different, ModelCheckpoint(tmp_path, "last")).fit(Task())
    states = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    assert {"IterativePruning[net.stem]", "IterativePruning[net.grouped]"} <= set(states)


@pytest.mark.parametrize(
    "pair",
    [
        (WeightSharing(2), FixedPointTraining()),
        (SoftWeightSharing(1e-4), FixedPointTraining()),
        (Binarization("bwn"), Ternarization()),
        (Ternarization(), WeightSharing(2)),
        (SoftWeightSharing(1e-4), Binarization()),
        (FixedPointTraining(), Binarization()),
    ],
    ids=lambda pair: "-".join(type(callback).__name__ for callback in pair),
)
def test_two_grids_for_one_weight_are_refused(pair: tuple[Callback, Callback], tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"would both hold the weights of 'net\.\w+', .* at values of their own"
    ):
        trainer(tmp_path, *pair, enable_checkpointing=False).fit(Task())


def test_grids_of_their_own_for_different_layers_are_fine(tmp_path: Path) -> None:
    model = Task()
    fixed = FixedPointTraining((2, 3), None, None, select=Select(include="net.head"))
    sharing = WeightSharing(2, Schedule(1.0, start=0, shape="once"), Select(include="net.stem"))
    trainer(tmp_path, sharing, fixed, enable_checkpointing=False).fit(model)
    assert len(model.net.stem.weight.unique()) <= 4
    assert not (model.net.head.weight * 8).frac().any()


@pytest.mark.parametrize(
    ("schedule", "arguments", "match"),
    [
        ({"end": 9}, {}, r"`end` of the schedule is epoch 9, but `max_epochs` is 3"),
        ({"start": 3, "shape": "once"}, {}, r"`start` of the schedule is epoch 3"),
        ({"every": 4}, {}, r"`every` of the schedule is epoch 4, but `max_epochs` is 3"),
        ({"every": {"step": 25}}, {}, r"`every` of the schedule is 25 optimizer steps, but the run has 24"),
        ({"end": {"step": 400}}, {}, r"`end` of the schedule is optimizer step 400, but the run has 24"),
        ({"end": "50%"}, {"max_epochs": -1}, r"no end \(max_epochs=-1\)"),
        ({"start": {"step": 20}, "end": "50%"}, {}, r"`start` \(optimizer step 20\) lies after `end`"),
    ],
)
def test_schedules_that_do_not_fit_the_run(schedule: dict, arguments: dict, match: str, tmp_path: Path) -> None:
    _refused(tmp_path, [pruning(**schedule)], match, **arguments)


def test_sharded_strategies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = trainer(tmp_path, callback := pruning())
    monkeypatch.setattr(type(fitted), "strategy", property(lambda self: FSDPStrategy.__new__(FSDPStrategy)))
    with pytest.raises(ConfigurationError, match=r"FSDPStrategy, which shards them; use strategy='ddp'"):
        callback.setup(fitted, Task(), "fit")


def test_layers_built_in_setup(tmp_path: Path) -> None:
    class Late(Task):
        def __init__(self) -> None:
            LightningModule.__init__(self)

        def setup(self, stage: str) -> None:
            self.net = Task("MLP").net

    with pytest.raises(SelectionError, match=r"built in `setup` do not exist yet"):
        trainer(tmp_path, pruning(), enable_checkpointing=False).fit(Late())


def test_layers_built_in_configure_model(tmp_path: Path) -> None:
    class Lazy(Task):
        def __init__(self) -> None:
            LightningModule.__init__(self)
            self.net = None

        def configure_model(self) -> None:
            if self.net is None:
                self.net = Task("Mixed").net

    model, callback = Lazy(), pruning()
    trainer(tmp_path, callback, enable_checkpointing=False).fit(model)
    assert zeros(model.state_dict()) == pytest.approx(0.75, abs=0.01)


# --------------------------------------------------------------------------- other shapes of a run


def test_ending_early_says_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"training ended after 4 optimizer updates .* was due at update 21"):
        trainer(tmp_path, pruning(end={"step": 20}), max_time=None, enable_checkpointing=False, max_epochs=3).fit(
            Stopping()
        )


class Stopping(Task):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.trainer.should_stop = batch_idx == 3


def test_fast_dev_run_reaches_the_target(tmp_path: Path) -> None:
    callback = pruning(start=2, end=5, every=1)
    trainer(tmp_path, callback, max_epochs=9, fast_dev_run=2).fit(Task())
    assert callback.at_target


@pytest.mark.filterwarnings("ignore:.*BaseFinetuning")
def test_a_frozen_backbone_is_pruned_from_the_epoch_it_is_unfrozen(tmp_path: Path) -> None:
    model = Task("MLP")
    model.backbone = model.net.layers
    model.configure_optimizers = lambda: torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    callback = IterativePruning(Schedule(0.5, end="90%", every={"step": 1}), Select(), scope="layer")
    shares: list[tuple[int, float, float]] = []

    class Look(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            w, h = model.backbone[1].weight, model.net.head.weight
            shares.append((trainer.current_epoch, float((w == 0).float().mean()), float((h == 0).float().mean())))

    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=2, verbose=False)
    trainer(tmp_path, finetuning, callback, Look(), max_epochs=4, enable_checkpointing=False).fit(model)
    assert [share for _, share, _ in shares[:2]] == [0.0, 0.0]
    assert shares[0][2] > 0
    assert shares[-1][1:] == (0.5, 0.5)


@pytest.mark.filterwarnings("ignore:.*BaseFinetuning")
def test_what_is_unfrozen_after_the_schedule_is_pruned_then(tmp_path: Path) -> None:
    model = Task("MLP")
    model.backbone = model.net.layers
    model.configure_optimizers = lambda: torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    callback = IterativePruning(Schedule(0.5, end={"step": 3}, every={"step": 1}), Select(), scope="layer")
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=2, verbose=False)
    trainer(tmp_path, callback, finetuning, max_epochs=4, enable_checkpointing=False).fit(model)
    assert float((model.backbone[1].weight == 0).float().mean()) == 0.5
    assert [entry["step"] for entry in callback.history] == [1, 2, 3, 4, 17]


def test_accumulation_that_changes_between_epochs(tmp_path: Path) -> None:
    callback = pruning(end="100%")
    trainer(tmp_path, GradientAccumulationScheduler({0: 1, 1: 4}), callback, max_epochs=3).fit(Task())
    assert callback.updates == 8 + 2 + 2
    assert callback.history[-1]["step"] == 12


def test_two_callbacks_on_different_parts(tmp_path: Path) -> None:
    first = IterativePruning(Schedule(0.5, end="50%"), Select(include="net.stem"), name="stem")
    second = IterativePruning(Schedule(0.8, end="80%"), Select(include="net.grouped"), name="grouped", floor=0.01)
    model, fitted = Task(), trainer(tmp_path, first, second, enable_checkpointing=False)
    fitted.fit(model)
    assert zeros(model.state_dict(), ("net.stem.weight",)) == pytest.approx(0.5, abs=0.01)
    assert zeros(model.state_dict(), ("net.grouped.weight",)) == pytest.approx(0.8, abs=0.02)
    assert {"compress/stem/sparsity", "compress/grouped/sparsity"} <= set(fitted.callback_metrics)


def test_a_second_fit_keeps_the_zeros(tmp_path: Path) -> None:
    model, callback = Task(), pruning()
    trainer(tmp_path, callback, enable_checkpointing=False).fit(model)
    watch = ZerosInValidation()
    trainer(tmp_path, callback, watch, enable_checkpointing=False).fit(model)
    assert min(watch.seen) == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize("changed", [{"max_epochs": 6}, {"final": 0.4}], ids=str)
def test_sparsity_never_falls_when_a_run_is_resumed_under_another_schedule(changed: dict, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "a", filename="{epoch}", save_top_k=-1)
    first = pruning(end="90%")
    trainer(tmp_path, first, saver, max_epochs=3).fit(Task())
    epochs, final = changed.get("max_epochs", 3), changed.get("final", 0.75)
    model, again = Task(), pruning(final, end="90%")
    fitted = trainer(tmp_path, again, ModelCheckpoint(tmp_path / "b"), max_epochs=epochs)
    fitted.fit(model, ckpt_path=tmp_path / "a" / "epoch=1.ckpt")
    amounts = [entry["sparsity"] for entry in again.history]
    assert amounts == sorted(amounts)
    assert again.at_target
    assert zeros(model.state_dict()) == pytest.approx(max(amounts))


def test_another_model_starts_afresh(tmp_path: Path) -> None:
    callback = pruning()
    trainer(tmp_path, callback, enable_checkpointing=False).fit(Task())
    model = Task("MLP")
    trainer(tmp_path, callback, enable_checkpointing=False).fit(model)
    assert float((model.net.layers[1].weight == 0).float().mean()) > 0.5
    assert callback.history[0]["step"] == 1


def test_a_mask_for_a_layer_that_is_not_selected_now(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(tmp_path, pruning(), saver, max_epochs=1).fit(Task())
    other = IterativePruning(Schedule(0.5), Select(include="net.stem"))
    with pytest.raises(ConfigurationError, match="not selected now"):
        trainer(tmp_path, other, ModelCheckpoint(tmp_path)).fit(Task(), ckpt_path=tmp_path / "epoch=0.ckpt")


def test_spawned_processes_would_lose_the_final_edits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from contract_rows import SliceAtEnd

    callback = SliceAtEnd()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(ConfigurationError, match="spawns or forks"):
        trainer(tmp_path, callback, enable_checkpointing=False).fit(Task("MLP"))
