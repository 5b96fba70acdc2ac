"""Quantization-aware training in real Trainers: its course, and beside averaging, compilation, masks and precisions."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_rows import Task, dataset
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress import (
    ConfigurationError,
    ExactResume,
    IterativePruning,
    LowRank,
    QuantizationAwareTraining,
    Schedule,
    WeightSharing,
    convert,
    load_from_checkpoint,
)
from lightning_compress.core.checks import check_times
from lightning_compress.core.schedule import Horizon
from lightning_compress.quantization import ActivationQuantizer, Quantizer, quantizers_of
from lightning_compress.quantization.affine import affine_parameters
from lightning_compress.quantization.integer import integer_tensors

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training"),
    pytest.mark.filterwarnings("ignore:.*WeightAveraging"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
LSQ = {"bits": 4, "range": "lsq"}


def qat(*bits: Any, **arguments: Any) -> QuantizationAwareTraining:
    return QuantizationAwareTraining(*bits, **{"start": {"step": 2}, "freeze": {}, **arguments})


def fit(module: LightningModule, *callbacks: Callback, epochs: int = 2, **arguments: Any) -> Trainer:
    seed_everything(0, verbose=False)
    ckpt_path = arguments.pop("ckpt_path", None)
    arguments.setdefault("enable_checkpointing", any(isinstance(c, ModelCheckpoint) for c in callbacks))
    trainer = Trainer(
        max_epochs=epochs, callbacks=list(callbacks), accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, **arguments,
    )  # fmt: skip
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer


def seeded(net: str = "Mixed") -> Task:
    seed_everything(0, verbose=False)
    return Task(net)


def activations(module: nn.Module) -> dict[str, ActivationQuantizer]:
    return {name: part for name, part in module.named_modules() if isinstance(part, ActivationQuantizer)}


class Course(Callback):
    """Notes at the start of every batch what the quantizers and the batch norm do, and after it the loss."""

    def __init__(self) -> None:
        self.quantizing: list[bool] = []
        self.observing: list[bool] = []
        self.norm_trains: list[bool] = []
        self.scales: list[Tensor] = []
        self.means: list[Tensor] = []
        self.losses: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        quantizers = quantizers_of(pl_module)
        self.quantizing.append(any(q.active for q in quantizers))
        assert not quantizers or all(q.active for q in quantizers) == self.quantizing[-1]
        self.observing.append(any(q.observing for q in activations(pl_module).values()))
        self.norm_trains.append(pl_module.net.norm.training)
        self.scales += [q.scale.detach().clone() for q in list(activations(pl_module).values())[:1]]
        self.means.append(pl_module.net.norm.running_mean.clone())

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))


def test_warm_up_quantization_and_freezes_begin_when_they_should() -> None:
    freeze = {"ranges": {"step": 6}, "batch_norm": {"step": 9}}
    course, plain = Course(), Course()
    fit(seeded(), qat(start={"step": 3}, freeze=freeze), course)
    fit(seeded(), plain)
    batches = range(16)
    assert course.quantizing == [batch > 3 for batch in batches]
    assert course.observing == [batch <= 6 for batch in batches]
    assert course.norm_trains == [batch <= 9 for batch in batches]
    assert course.losses[:4] == plain.losses[:4]  # nothing is rounded while it warms up
    assert course.losses[4] != plain.losses[4]
    moved = [not torch.equal(a, b) for a, b in zip(course.scales, course.scales[1:], strict=False)]
    assert moved == [batch <= 6 for batch in batches[:-1]]
    kept = [torch.equal(a, b) for a, b in zip(course.means, course.means[1:], strict=False)]
    assert kept == [batch > 9 for batch in batches[:-1]]


def test_validation_moves_nothing_and_float_checkpoints_keep_their_keys(tmp_path: Path) -> None:
    module = seeded()
    weights = dict(module.named_parameters())
    keys = set(module.state_dict())
    trainer = fit(module, qat(), ModelCheckpoint(tmp_path, "last"))
    before = copy.deepcopy(module.state_dict())
    trainer.validate(module, verbose=False)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert keys < set(before)
    assert all(dict(module.named_parameters())[name] is parameter for name, parameter in weights.items())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    found = Task().load_state_dict(saved, strict=False)
    assert found.missing_keys == []
    assert all("quantizer" in key or key == "compression_journal" or "journal" in key for key in found.unexpected_keys)


# --------------------------------------------------------------------------- averaging


def consistent(state: dict[str, Tensor], module: nn.Module) -> int:
    """Assert that scales and zero points of a file are those of its ranges, and return how many there are."""
    found = activations(module)
    for name, quantizer in found.items():
        low, high = state[f"{name}.observer.low"], state[f"{name}.observer.high"]
        scale, zero_point = affine_parameters(low, high, quantizer.bounds)
        assert torch.equal(state[f"{name}.scale"], scale)
        assert torch.equal(state[f"{name}.zero_point"], zero_point)
        assert state[f"{name}._extra_state"].tolist() == quantizer.get_extra_state().tolist()
    return len(found)


@pytest.mark.parametrize("bits", [(8, 8), (LSQ, LSQ)], ids=["observed", "learned"])
def test_an_averaged_model_is_a_quantized_model(bits: tuple[Any, Any], tmp_path: Path) -> None:
    module = seeded()
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer = fit(module, EMAWeightAveraging(decay=0.8), qat(*bits), saver, epochs=3)
    saved = torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)["state_dict"]
    if bits == (8, 8):
        assert consistent(saved, module) == 5
        assert consistent(module.state_dict(), module) == 5
    again = load_from_checkpoint(Task, tmp_path / "epoch=2.ckpt")
    assert all(q.active for q in quantizers_of(again))
    validated = trainer.validate(again, verbose=False)[0]["val/loss"]
    assert validated == pytest.approx(float(trainer.callback_metrics["val/loss"]))
    integers, x = convert(again.eval()), dataset().tensors[0]
    with torch.no_grad():
        assert torch.allclose(integers(x), again(x), atol=0.05 * float(again(x).abs().max()))


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_stochastic_weight_averaging_ends_with_quantized_weights(tmp_path: Path) -> None:
    module = seeded()
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer = fit(module, StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2), qat(), saver, epochs=5)
    assert consistent(module.state_dict(), module) == 5
    assert all(q.active for q in quantizers_of(module))
    assert trainer.validate(module, verbose=False)[0]["val/loss"] < 2
    for file in tmp_path.glob("epoch=[234].ckpt"):
        assert consistent(torch.load(file, weights_only=True)["state_dict"], module) == 5


def test_the_wrong_order_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="put EMAWeightAveraging before QuantizationAwareTraining"):
        fit(seeded(), qat(), EMAWeightAveraging())


# --------------------------------------------------------------------------- compilation, precision, accumulation


@pytest.mark.slow
@pytest.mark.parametrize("how", ["in_place", "submodule"])
def test_compiled_modules_learn_the_same(how: str) -> None:
    plain, module = seeded(), seeded()
    if how == "in_place":
        module.compile(backend="eager")
    else:
        module.net = torch.compile(module.net, backend="eager")
    freeze = {"ranges": {"step": 6}}
    fit(plain, qat(freeze=freeze))
    fit(module, qat(freeze=freeze))
    assert all(q.active for q in quantizers_of(module))
    held = {key.replace("_orig_mod.", ""): value for key, value in module.state_dict().items() if "journal" not in key}
    for key, value in plain.state_dict().items():
        if "journal" not in key:
            assert torch.allclose(held[key].double(), value.double(), atol=1e-6), key


PRECISIONS = {
    "32-true": {torch.float32},
    "bf16-true": {torch.bfloat16},
    "bf16-mixed": {torch.float32, torch.bfloat16},  # weights and the input stay float32 there
}


class Exact(Callback):
    """Compares what every quantizer returns with the formula in float32, rounded once to the type of its input."""

    def __init__(self, ranges: torch.dtype) -> None:
        self.ranges = ranges
        self.seen: set[torch.dtype] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for part in quantizers_of(pl_module):
            part.register_forward_hook(self.compare)

    def compare(self, part: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        if not part.active:
            return
        (x,) = (argument.detach() for argument in args)
        scale, zero = part.affine(x)
        assert scale.dtype in (torch.float32, self.ranges)  # what follows the weight is exact
        scale = scale.float()
        if part.axis is not None:
            scale, zero = (value.reshape(-1, *[1] * (x.dim() - 1)) for value in (scale, zero))
        grid = torch.round(x.float() / scale) + zero
        expected = (grid.clamp(*part.bounds) - zero) * scale
        assert torch.equal(output.detach(), expected.to(x.dtype))
        self.seen.add(x.dtype)


@pytest.mark.parametrize("bits", [8, LSQ], ids=["observed", "learned"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_rounding_happens_in_float32_whatever_the_precision(bits: Any, precision: str) -> None:
    halves = torch.bfloat16 if precision == "bf16-true" else torch.float32
    module, exact = seeded(), Exact(halves)
    fit(module, qat(bits, bits), exact, epochs=1, precision=precision)
    assert exact.seen == PRECISIONS[precision]
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())


def test_ranges_do_not_take_what_overflowed() -> None:
    class Overflow(Task):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            images = batch[0] * (float("inf") if batch_idx == 1 else 1.0)
            return super().training_step([images.nan_to_num(posinf=7e4, nan=7e4), batch[1]], batch_idx)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    module, callback = Overflow(), qat()
    fit(module, callback, epochs=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
    assert callback.updates < 8  # the scaler skipped a step
    assert all(torch.isfinite(q.affine()[0]).all() for q in activations(module).values())


def test_accumulated_batches_are_observed_as_one_step() -> None:
    module = seeded()
    callback = qat(8, {"range": "minmax"}, start={"step": 0})
    fit(module, callback, epochs=1, accumulate_grad_batches=4)
    assert callback.updates == 2
    images = dataset().tensors[0]
    observer = module.net.stem.input_quantizer.observer
    assert (observer.low, observer.high) == (images.min(), images.max())


# --------------------------------------------------------------------------- other optimizers, other methods


class Two(LightningModule):
    """Two networks whose optimizers are stepped by hand, the second only every other batch."""

    def __init__(self, learned: bool = True) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.learned = learned
        self.generator = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 36))
        self.judge = nn.Sequential(nn.Linear(36, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.judge(self.generator(x))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        fake, real = self.generator(torch.randn(len(batch[0]), 4)), batch[0].flatten(1)
        loss = F.softplus(self.judge(fake.detach())).mean() + F.softplus(-self.judge(real)).mean()
        for optimizer in (first, second) if batch_idx % 2 == 0 else (first,):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(loss if optimizer is first else F.softplus(-self.judge(fake)).mean())
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        fixed = [p for name, p in self.judge.named_parameters() if "quantizer" not in name]
        judged = self.judge.parameters() if self.learned else fixed
        return torch.optim.Adam(judged, lr=1e-2), torch.optim.SGD(self.generator.parameters(), lr=1e-2)

    def train_dataloader(self) -> Any:
        return Task().train_dataloader()


@pytest.mark.parametrize("bits", [8, LSQ], ids=["observed", "learned"])
def test_manual_optimization_with_two_optimizers(bits: Any) -> None:
    module, callback = Two(), qat(bits, bits, start={"step": 3})
    fit(module, callback, epochs=2)
    assert callback.updates == 16  # batches, although 24 optimizer steps were made
    assert callback.history[0]["step"] == 4
    assert callback.history[0]["quantizing"] == 1.0
    for path in ("generator", "judge"):
        quantizers = quantizers_of(module.get_submodule(path))
        assert len(quantizers) >= 3
        assert all(q.active and float(q.affine()[0].min()) > 0 for q in quantizers)
        assert bits == 8 or all(p.grad is not None for q in quantizers for p in q.parameters())


def test_a_learned_range_that_no_optimizer_trains_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"learned range of 'judge\.0' is in no optimizer"):
        fit(Two(learned=False), qat(LSQ, LSQ))


class Zeros(Callback):
    """Asserts that a pruned weight is zero where it was pruned, and where it is quantized."""

    def __init__(self, pruning: IterativePruning) -> None:
        self.pruning, self.seen = pruning, 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        if not self.pruning.at_target:
            return
        for layer in (pl_module.net.stem, pl_module.net.grouped):
            share = float((layer.weight == 0).float().mean())
            assert share >= 0.5
            assert float((layer.quantized_weight()[layer.weight == 0] == 0).float().mean()) == 1.0
            self.seen += 1


@pytest.mark.parametrize("first", ["pruning", "quantization"])
@pytest.mark.parametrize("bits", [8, LSQ], ids=["observed", "learned"])
def test_pruned_weights_stay_zero(first: str, bits: Any) -> None:
    pruning = IterativePruning(Schedule(0.6, end="50%", every={"step": 1}), scope="layer")
    watch, callbacks = Zeros(pruning), [pruning, qat(bits, bits)]
    module = seeded()
    fit(module, *(callbacks if first == "pruning" else callbacks[::-1]), watch)
    assert watch.seen > 8
    zeros = float((module.net.grouped.weight == 0).float().mean())
    integers = {name: part for name, part in convert(module).named_modules() if name.endswith("grouped.integer_weight")}
    assert float((next(iter(integers.values()))() == 0).float().mean()) >= zeros


def test_factorized_layers_are_quantized_factor_by_factor() -> None:
    module = seeded("MLP")
    fit(module, LowRank(factors=4, when="before"), qat(4, 8))
    factors = [path for path, part in module.named_modules() if type(part).__name__ == "QuantizedLinear"]
    assert len(factors) > 3  # two for each layer that was factorized
    integers = convert(module)
    assert {held.bits for held in integer_tensors(integers)} <= {4, 8}
    x = dataset().tensors[0]
    with torch.no_grad():
        assert torch.allclose(integers(x), module.eval()(x), atol=1e-4)


def test_shared_weights_stay_shared_while_they_are_quantized() -> None:
    module = seeded("MLP")
    sharing = WeightSharing(4, schedule=Schedule(1.0, start={"step": 4}, shape="once"))
    fit(module, sharing, qat({"per_channel": False}, 8, start={"step": 8}))
    assert all(q.active for q in quantizers_of(module))
    for layer in (module.net.layers[1], module.net.layers[3]):
        assert len(layer.quantized_weight().unique()) <= 16
    x = dataset().tensors[0]
    with torch.no_grad():
        assert torch.allclose(convert(module.eval())(x), module(x), atol=1e-3)


def test_a_second_fit_goes_on_with_the_ranges_there_are() -> None:
    module, callback = seeded(), qat(LSQ, LSQ)
    fit(module, callback)
    before = [q.affine()[0].clone() for q in activations(module).values()]
    fit(module, qat(LSQ, LSQ, start={"step": 5}), epochs=1)
    after = [q.affine()[0] for q in activations(module).values()]
    assert all(torch.allclose(a, b, rtol=0.5) for a, b in zip(after, before, strict=True))
    with pytest.raises(ConfigurationError, match=r"are quantized to 8 bits, .* already"):
        fit(module, qat(8, LSQ), epochs=1)


@pytest.mark.slow
@pytest.mark.parametrize("step", [5, 10])
def test_resume_inside_an_epoch_beside_averages_and_masks(step: int, tmp_path: Path) -> None:
    def run(folder: Path, seed: int, ckpt_path: Path | None = None) -> Task:
        seed_everything(seed, verbose=False)
        module, saver = Task(), ModelCheckpoint(folder, filename="{step}", every_n_train_steps=5, save_top_k=-1)
        pruning = IterativePruning(Schedule(0.6, end="60%", every={"step": 1}))
        freeze = {"ranges": {"step": 9}, "batch_norm": {"step": 12}}
        callbacks = [ExactResume(), EMAWeightAveraging(decay=0.9), pruning, qat(LSQ, 8, freeze=freeze), saver]
        fit(module, *callbacks, ckpt_path=ckpt_path)
        return module

    whole = run(tmp_path / "a", 0).state_dict()
    resumed = run(tmp_path / "b", 77, tmp_path / "a" / f"step={step}.ckpt").state_dict()
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_copies_of_a_running_module_are_quantized_like_it() -> None:
    copies: list[tuple[Tensor, Tensor]] = []

    class Copy(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            if trainer.global_step == 6:
                twin, x = copy.deepcopy(pl_module).eval(), dataset().tensors[0]
                with torch.no_grad():
                    copies.append((twin(x), pl_module.eval()(x)))
                pl_module.train()
                assert all(isinstance(q, Quantizer) and q.active for q in quantizers_of(twin))

    fit(seeded(), qat(), Copy(), epochs=1)
    assert torch.equal(*copies[0])


@pytest.mark.slow
def test_two_processes_with_different_data_have_the_same_ranges(tmp_path: Path) -> None:
    worker = Path(__file__).with_name("qat_ddp_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", worker, tmp_path]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert set(first) == {"minmax", "percentile", "learned"}
    for name, held in first.items():
        ranges = [key for key in held["state"] if "quantizer" in key]
        assert len(ranges) > 20
        for key in (*ranges, "net.stem.weight", "net.head.weight"):
            assert torch.equal(held["state"][key], second[name]["state"][key]), (name, key)
    observed = [first["minmax"]["state"][f"net.stem.input_quantizer.observer.{end}"] for end in ("low", "high")]
    both = torch.stack([rank["minmax"]["extremes"] for rank in (first, second)])
    assert observed == [both[:, 0].min(), both[:, 1].max()]  # of the images of both


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"start": {"step": 10**6}}, r"`start` is {'step': 1000000}, optimizer step 1000000, but the run has 20"),
        ({"start": {"step": 20}, "freeze": {}}, r"`start` is {'step': 20}, optimizer step 20, but the run has 20"),
        ({"freeze": {"ranges": {"step": 99}}}, r"`freeze\.ranges` is {'step': 99}, .* but the run has 20"),
        ({"start": 1, "freeze": {"batch_norm": "50%"}}, r"`freeze\.batch_norm` is '50%'.* later than `start`, 1, "),
        (
            {"start": {"step": 18}},
            r"`freeze\.ranges and freeze\.batch_norm` is '80%', optimizer step 16, .* than `start`, {'step': 18}",
        ),
    ],
)
def test_times_that_do_not_fit_are_named_as_they_were_given(given: dict[str, Any], message: str) -> None:
    schedule = QuantizationAwareTraining(**given).schedule
    with pytest.raises(ConfigurationError, match=message) as caught:
        schedule.resolve(Horizon(total=20, per_epoch=10))
    assert "milestones" not in str(caught.value)
    assert schedule.resolve(Horizon(total=1, per_epoch=1), clamp=True).end == 0


def test_times_are_named_where_the_run_has_no_length() -> None:
    with pytest.raises(ConfigurationError, match=r"`freeze\.ranges and freeze\.batch_norm` is '80%' of the run"):
        QuantizationAwareTraining(start=0).schedule.resolve(Horizon(None, 10))
    callback = QuantizationAwareTraining(start=0, freeze={"ranges": 7})
    with pytest.raises(ConfigurationError, match=r"`freeze\.ranges` is epoch 7, but `max_epochs` is 3"):
        check_times(callback.schedule, Trainer(max_epochs=3, logger=False, enable_checkpointing=False))
