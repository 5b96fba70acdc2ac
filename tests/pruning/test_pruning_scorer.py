"""What scores collect while a model trains: against a plain loop, through skipped steps, into checkpoints."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress.core.compress import compress
from lightning_compress.core.errors import ConfigurationError, SelectionError
from lightning_compress.core.schedule import Schedule
from lightning_compress.core.select import Select
from lightning_compress.pruning.callbacks import IterativePruning
from lightning_compress.pruning.granularity import Layout
from lightning_compress.pruning.scorer import Scorer
from lightning_compress.pruning.scores import SCORES, find_score

BATCHES, LR, UPDATE = 6, 0.1, 3  # masks are updated after optimizer update 3, counted from 0


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(4 * BATCHES, 6, 5, 5, generator=generator), torch.arange(4 * BATCHES) % 3


def network() -> nn.Sequential:
    torch.manual_seed(0)
    conv = [nn.Conv2d(6, 8, 3, groups=2), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2), nn.ReLU()]
    return nn.Sequential(*conv, nn.Flatten(), nn.Linear(64, 10), nn.Tanh(), nn.Linear(10, 3))


class Task(LightningModule):
    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net or network()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=LR)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(*data()), batch_size=4)


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**{"max_epochs": 1, "accelerator": "cpu", "callbacks": list(callbacks), **quiet, **options})


WEIGHTS = ("0.weight", "2.weight", "5.weight")


def by_hand(score: str) -> dict[str, Tensor]:
    """Train in a plain loop; return scores at the update, by the definitions."""
    net, (x, y) = network(), data()
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    seen: dict[str, list[Tensor]] = {name: [] for name in WEIGHTS}
    for step in range(UPDATE + 1):
        h = x[4 * step : 4 * step + 4]
        inputs = {}
        for i, layer in enumerate(net):
            inputs[f"{i}.weight"], h = h.detach(), layer(h)
        optimizer.zero_grad()
        F.cross_entropy(h, y[4 * step : 4 * step + 4]).backward()
        for name in WEIGHTS:
            w = net.get_parameter(name)
            found = {
                "gradient": (w * w.grad).abs(),
                "snip": (w * w.grad).abs(),
                "movement": -w * w.grad,
                "obd": w.grad**2,
            }
            seen[name].append(found[score].detach() if score != "wanda" else inputs[name])
        optimizer.step()
    result = {}
    for name in WEIGHTS:
        w = net.get_parameter(name).detach()
        if score == "snip":
            result[name] = seen[name][0]
        elif score == "wanda":
            last = seen[name][-1]
            norms = last.square().mean([d for d in range(last.dim()) if d != 1]).sqrt()
            result[name] = w.abs() * _norm_of_each(w, norms, net[int(name[0])])
        else:
            total = sum(seen[name])
            result[name] = w**2 * total / (UPDATE + 1) / 2 if score == "obd" else total
    return result


def _norm_of_each(w: Tensor, norms: Tensor, layer: nn.Module) -> Tensor:
    if isinstance(layer, nn.ConvTranspose2d):
        return norms[:, None, None, None].expand_as(w)
    if isinstance(layer, nn.Conv2d):  # two groups of three inputs
        return torch.cat([norms[:3].expand(4, 3), norms[3:].expand(4, 3)])[:, :, None, None].expand_as(w)
    return norms.expand_as(w)


@pytest.mark.parametrize("score", ["gradient", "movement", "snip", "obd", "wanda"])
def test_the_masks_are_those_of_a_plain_loop(score: str) -> None:
    callback = IterativePruning(Schedule(0.6, shape="once", start={"step": UPDATE}), score=score)
    model = Task()
    trainer(callback, max_steps=UPDATE + 1).fit(model)
    expected = by_hand(score)
    flat = torch.cat([value.flatten() for value in expected.values()])
    cut = flat.sort().values[round(0.6 * flat.numel()) - 1]
    for name, value in expected.items():
        gone = model.net.get_parameter(name) == 0
        assert torch.equal(gone, value <= cut)
    assert not (model.net[7].weight == 0).any()


def scorer(name: str, steps: int = 2) -> tuple[Scorer, dict[str, nn.Parameter]]:
    found, weights = Scorer(find_score(name)), {"w": nn.Parameter(torch.tensor([1.0, -3.0, 2.0, -0.5]))}
    for step in range(steps):
        weights["w"].grad = torch.tensor([2.0, 0.5, 0.0, 4.0]) * (step + 1)
        found.observe(weights)
    return found, weights


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gradient", [3.0, 2.25, 0.0, 3.0]),  # mean of once and twice
        ("movement", [-6.0, 4.5, 0.0, 6.0]),  # sum
        ("snip", [2 / 5.5, 1.5 / 5.5, 0.0, 2 / 5.5]),  # the first only
        ("obd", [5.0, 2.8125, 0.0, 5.0]),  # mean of squares: 10, 0.625, 0, 40
    ],
)
def test_two_steps_by_hand(name: str, expected: list[float]) -> None:
    found, weights = scorer(name)
    rated = found.rate(weights, {"w": Layout()}, step=0, shared=False)
    assert rated["w"].tolist() == pytest.approx(expected)
    found.updated()
    again = found.rate(weights, {"w": Layout()}, step=0, shared=False)
    kept = name in ("movement", "snip")
    assert again["w"].tolist() == pytest.approx(expected if kept else [0.0] * 4)


@pytest.mark.parametrize("name", ["gradient", "movement", "snip", "obd"])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_gradients_that_the_scaler_will_skip_are_not_collected(name: str, bad: float) -> None:
    found, weights = scorer(name)
    before = found.state()
    other = nn.Parameter(torch.ones(2))
    other.grad = torch.tensor([bad, 1.0])
    found.observe({**weights, "other": other})
    after = found.state()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_gradients_are_collected_in_float32(dtype: torch.dtype) -> None:
    found, weight = Scorer(find_score("gradient")), nn.Parameter(torch.full((4,), 300.0, dtype=dtype))
    for _ in range(300):
        weight.grad = torch.full((4,), 300.0, dtype=dtype)
        found.observe({"w": weight})
    rated = found.rate({"w": weight}, {"w": Layout()}, step=0, shared=False)["w"]
    assert rated.dtype == torch.float32
    assert rated.tolist() == [90_000.0] * 4


@pytest.mark.parametrize("name", ["gradient", "movement", "snip", "obd", "random"])
def test_state_comes_back_bit_for_bit(name: str) -> None:
    found, weights = scorer(name) if name != "random" else (Scorer(find_score(name)), scorer("obd")[1])
    layouts = {"w": Layout()}
    first = found.rate(weights, layouts, step=3, shared=False)["w"]
    torch.manual_seed(12345)
    again = Scorer(find_score(name))
    mask = {"net.0.weight": torch.ones(1, dtype=torch.uint8)}
    assert again.load({**found.state(), **mask}) == mask
    again.attach(weights, layouts, shared=False)
    assert torch.equal(again.rate(weights, layouts, step=3, shared=False)["w"], first)
    assert all(torch.equal(value, again.state()[key]) for key, value in found.state().items())


def test_state_of_another_score_or_another_model() -> None:
    found, weights = scorer("obd")
    with pytest.raises(ConfigurationError, match=r"written with `score` 'obd', the run has 'gradient'"):
        Scorer(find_score("gradient")).load(found.state())
    for others, message in (({}, "is not selected now"), ({"w": nn.Parameter(torch.ones(5))}, r"needs \(5,\)")):
        again = Scorer(find_score("obd"))
        again.load(found.state())
        with pytest.raises(ConfigurationError, match=rf"'w', which.*{message}|'w'.*{message}"):
            again.attach(others, {"w": Layout()}, shared=False)
    assert weights


@pytest.mark.parametrize("score", ["gradient", "movement", "snip", "obd", "wanda"])
def test_one_shot_pruning_has_no_batches(score: str) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ConfigurationError, match=rf"`score` '{score}' needs the (gradients|inputs) of training batches"
    ):
        compress(model, IterativePruning(0.5, score=score), inplace=True)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("score", [name for name, score in SCORES.items() if score.needs == "weights"])
def test_one_shot_pruning_by_what_needs_no_batches(score: str) -> None:
    method = IterativePruning(0.5, score=score, granularity="filter", scope="layer")
    pruned = compress(network(), method)
    for index, outputs in ((0, 8), (2, 4), (5, 10)):
        weight = pruned[index].weight.transpose(0, 1) if index == 2 else pruned[index].weight
        assert int((weight.flatten(1) == 0).all(1).sum()) == outputs // 2
    assert method.history[-1]["sparsity"] == 0.5


def test_batch_norm_scale_prunes_the_filters_before_it() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False), nn.ReLU())
    net[1].weight.data = torch.tensor([0.5, -2.0, 0.1, 1.0])
    method = IterativePruning(0.5, Select(), score="bn_scale", granularity="filter")
    pruned = compress(net, method)
    assert (pruned[0].weight.flatten(1) == 0).all(1).tolist() == [True, False, True, False]
    assert not (pruned[3].weight == 0).any()
    assert torch.equal(pruned[1].weight, net[1].weight)
    with pytest.raises(SelectionError, match=r"3.weight: kept: no batch norm with a scale follows it"):
        compress(net, IterativePruning(0.5, Select(include="3"), score="bn_scale", granularity="filter"))


class Hooks(Callback):
    """Counts the forward hooks of the net in each batch."""

    def __init__(self) -> None:
        self.inside: list[int] = []
        self.after: list[int] = []

    @staticmethod
    def count(pl_module: Any) -> int:
        return sum(len(module._forward_hooks) for module in pl_module.net.modules())

    def on_before_backward(self, trainer: Trainer, pl_module: Any, loss: Tensor) -> None:
        self.inside.append(self.count(pl_module))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.after.append(self.count(pl_module))


def test_inputs_are_looked_at_around_updates_only() -> None:
    hooks = Hooks()
    schedule = Schedule(0.5, start={"step": 1}, end={"step": 3}, every={"step": 2}, shape="linear")
    trainer(IterativePruning(schedule, score="wanda"), hooks).fit(Task())
    assert hooks.inside == [0, 3, 0, 3, 0, 0]
    assert hooks.after == [0] * 6


def test_accumulated_batches_are_all_looked_at() -> None:
    hooks = Hooks()
    callback = IterativePruning(Schedule(0.5, shape="once", start={"step": 1}), score="wanda")
    trainer(callback, hooks, accumulate_grad_batches=2).fit(Task())
    assert hooks.inside == [0, 0, 3, 3, 0, 0]


class Failing(Task):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        super().training_step(batch, batch_idx)
        raise RuntimeError("the batch failed")


def test_a_batch_that_fails_leaves_no_hook_behind() -> None:
    model = Failing()
    callback = IterativePruning(Schedule(0.5, shape="once", start={"step": 0}), score="wanda")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the batch failed"):
            trainer(callback).fit(model)
        assert Hooks.count(model) == 0


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(150, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(x.flatten(1), self.hidden.weight))


def test_a_layer_that_is_not_called_is_named() -> None:
    callback = IterativePruning(Schedule(0.5, shape="once", start={"step": 1}), score="wanda")
    with pytest.raises(ConfigurationError, match=r"inputs of 'net\.hidden\.weight'.*did not run through it"):
        trainer(callback).fit(Task(Functional()))


@pytest.mark.parametrize("score", ["gradient", "wanda"])
def test_what_was_unfrozen_late_is_pruned_late(score: str) -> None:
    model = Task()
    model.net[5].requires_grad_(False)

    class Unfreeze(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                pl_module.net[5].requires_grad_(True)
                trainer.optimizers[0].add_param_group({"params": list(pl_module.net[5].parameters())})

    callback = IterativePruning(Schedule(0.5, end={"step": 3}, every={"step": 1}), score=score)
    trainer(Unfreeze(), callback, max_epochs=1).fit(model)
    assert not (model.net[5].weight == 0).any()
    model.net[5].requires_grad_(False)
    callback = IterativePruning(Schedule(0.5, end={"step": 3}, every={"step": 1}), score=score)
    trainer(Unfreeze(), callback, max_epochs=2).fit(model)
    zeros = sum(int((model.net[i].weight == 0).sum()) for i in (0, 2, 5))
    assert zeros == round(0.5 * sum(model.net[i].weight.numel() for i in (0, 2, 5)))
    assert (model.net[5].weight == 0).any()


def test_gradients_are_collected_until_the_last_update_only() -> None:
    callback = IterativePruning(Schedule(0.5, end={"step": 3}, every={"step": 1}), score="gradient")
    trainer(callback).fit(Task())
    assert not [key for key in callback.values() if key.startswith("gradient")]
    callback = IterativePruning(Schedule(0.5, shape="once", start={"step": 4}), score="gradient")
    kept: list[set[str]] = []

    class Look(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            kept.append({key.partition(":")[0] for key in callback.values() if ":" in key})

    trainer(callback, Look()).fit(Task())
    assert kept == [{"gradient.sum", "gradient.count"}] * 4 + [set()] * 2


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_checkpoint_of_another_score_is_refused(tmp_path: Path) -> None:
    schedule = Schedule(0.5, end={"step": 5}, every={"step": 5})
    saver = ModelCheckpoint(tmp_path, filename="half", every_n_train_steps=3, save_top_k=1)
    trainer(IterativePruning(schedule, score="obd"), saver, enable_checkpointing=True, limit_train_batches=5).fit(
        Task()
    )
    with pytest.raises(ConfigurationError, match=r"`score` 'obd', the run has 'movement'; resume with 'obd'"):
        trainer(IterativePruning(schedule, score="movement"), max_epochs=2).fit(
            Task(), ckpt_path=tmp_path / "half.ckpt"
        )


@pytest.mark.parametrize("score", ["gradient", "wanda"])
def test_mixed_precision(score: str) -> None:
    callback = IterativePruning(Schedule(0.5, end={"step": 4}, every={"step": 2}), score=score)
    trainer(callback, precision="bf16-mixed").fit(Task())
    assert callback.history[-1]["sparsity"] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("score", ["gradient", "wanda"])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_network(score: str, in_place: bool) -> None:
    plain, compiled = Task(), Task()
    if in_place:
        compiled.net.compile(backend="eager")
    else:
        compiled.net = torch.compile(compiled.net, backend="eager")
    for model in (plain, compiled):
        callback = IterativePruning(Schedule(0.5, end={"step": 4}, every={"step": 2}), score=score)
        trainer(callback).fit(model)
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
