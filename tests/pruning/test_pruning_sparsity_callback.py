"""SparsityRegularization in a Trainer: steps by hand, both modes, holding zeros, and layers of every kind."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_compress import ConfigurationError, Schedule, Select, SelectionError, compress
from lightning_compress.pruning.granularity import layout_of
from lightning_compress.pruning.sparsity import (
    SparsityRegularization,
    StrengthRule,
    group_lasso,
    group_soft_threshold,
)
from lightning_compress.pruning.sparsity.groups import find_groups, parse_groups
from lightning_compress.pruning.sparsity.shortcuts import without_shortcut

pytestmark = [pytest.mark.filterwarnings("ignore:.*WeightAveraging")]

QUIET: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False,
    "enable_progress_bar": False,
}  # fmt: skip
CONSTANT = Schedule(1.0, initial=0.999999, shape="linear", start=0, end="100%", every={"step": 1})
"""Nearly the whole strength from the second step on, zeros held after the last."""


class Task(LightningModule):
    """Regression of any network on fixed data."""

    def __init__(
        self, net: nn.Module, inputs: Tensor, optimizer: Callable[..., Optimizer] = SGD, **options: Any
    ) -> None:
        super().__init__()
        self.net, self.inputs, self.make, self.options = net, inputs, optimizer, {"lr": 0.1, **options}

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self) -> Tensor:
        outputs = self(self.inputs)
        return F.mse_loss(outputs, torch.linspace(-1, 1, outputs.numel()).reshape(outputs.shape))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss()

    def configure_optimizers(self) -> Optimizer:
        return self.make([p for p in self.parameters() if p.requires_grad], **self.options)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.zeros(64), batch_size=1)


def fit(module: LightningModule, *callbacks: Callback, steps: int = 6, **arguments: Any) -> Trainer:
    trainer = Trainer(max_epochs=1, limit_train_batches=steps, callbacks=list(callbacks), **{**QUIET, **arguments})
    trainer.fit(module)
    return trainer


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))


INPUTS = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))


def by_hand(mode: str, granularity: str, steps: int, **options: Any) -> nn.Module:
    """Train with plain torch: the penalty in the loss, or proximal steps after the optimizer."""
    task = Task(mlp(), INPUTS, **options)
    optimizer = task.configure_optimizers()
    groups = find_groups(task, {"net.0": task.net[0], "net.2": task.net[2]}, parse_groups(granularity)).targets
    for step in range(steps):
        strength = 0.0 if step == 0 else 0.05 * (0.999999 + 1e-6 * (step - 1) / (steps - 1))
        optimizer.zero_grad()
        loss = task.loss()
        tensors = [(t, *t.tensors(dict(task.named_modules()))) for t in groups]
        if mode == "penalty":
            loss = loss + strength * sum(group_lasso(w, t.granularity, t.layout, b) for t, w, b in tensors)
        loss.backward()
        optimizer.step()
        for t, weight, bias in tensors if mode == "proximal" else ():
            rate = optimizer.param_groups[0]["lr"]
            with torch.no_grad():
                new, new_bias = group_soft_threshold(weight, strength * rate, t.granularity, t.layout, bias)
                weight.copy_(new)
                if bias is not None:
                    bias.copy_(new_bias)
    return task


@pytest.mark.parametrize("granularity", ["l1", "filter", "channel"])
@pytest.mark.parametrize("mode", ["proximal", "penalty"])
@pytest.mark.parametrize("optimizer", [SGD, Adam])
def test_a_run_equals_one_by_hand(mode: str, granularity: str, optimizer: type[Optimizer]) -> None:
    task = Task(mlp(), INPUTS, optimizer)
    fit(task, SparsityRegularization(0.05, granularity, CONSTANT, mode, threshold=0.0), steps=6)
    wanted = by_hand(mode, granularity, 6, optimizer=optimizer)
    for (name, found), other in zip(task.named_parameters(), wanted.parameters(), strict=True):
        assert torch.allclose(found, other, atol=1e-6), name


def test_accumulation_adds_the_penalty_once_an_update() -> None:
    whole, parts = Task(mlp(), INPUTS), Task(mlp(), INPUTS)
    fit(whole, SparsityRegularization(0.05, "filter", CONSTANT, "penalty"), steps=3)
    fit(parts, SparsityRegularization(0.05, "filter", CONSTANT, "penalty"), steps=6, accumulate_grad_batches=2)
    for found, other in zip(parts.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(found, other, atol=1e-6)


def test_the_penalty_is_clipped_with_the_loss() -> None:
    task = Task(mlp(), INPUTS)
    before = [p.detach().clone() for p in task.parameters()]
    strong = SparsityRegularization(
        0.9, "l1", Schedule(1.0, initial=0.9, shape="linear", end="100%"), "penalty", threshold=0.0
    )

    class LastStep(Callback):
        def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
            self.norm = math.sqrt(
                sum(float(p.grad.square().sum()) for p in pl_module.parameters() if p.grad is not None)
            )

    watch = LastStep()
    fit(task, strong, watch, steps=4, gradient_clip_val=0.01)
    moved = math.sqrt(
        sum(float((p.detach() - old).square().sum()) for p, old in zip(task.parameters(), before, strict=True))
    )
    assert moved <= 4 * 0.1 * 0.01 + 1e-6
    assert watch.norm <= 0.01 + 1e-6


def test_each_parameter_group_has_its_own_rate() -> None:
    class TwoRates(Task):
        def configure_optimizers(self) -> Optimizer:
            slow = {"params": self.net[0].parameters(), "lr": 0.01}
            return SGD([slow, {"params": self.net[2:].parameters(), "lr": 0.1}], lr=0.5)

    task = TwoRates(mlp(), torch.zeros(1, 6))
    task.loss = lambda: 0.0 * sum(p.sum() for p in task.parameters())  # type: ignore[method-assign]
    before = {name: p.detach().clone() for name, p in task.named_parameters()}
    fit(task, SparsityRegularization(0.05, "l1", CONSTANT, threshold=0.0), steps=3)
    for name, rate in (("net.0.weight", 0.01), ("net.2.weight", 0.1)):
        shrunk = (before[name].abs() - task.get_parameter(name).detach().abs()).max()
        assert float(shrunk) == pytest.approx(2 * rate * 0.05, rel=1e-3)  # the first step comes before the strength
    assert torch.equal(task.net[0].bias, before["net.0.bias"])


class TwoOptimizers(Task):
    """Manual optimization that never clears the gradients of the optimizer that does not step."""

    def __init__(self) -> None:
        super().__init__(mlp(), INPUTS)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(self.loss())
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [SGD(self.net[0].parameters(), lr=0.1), SGD(self.net[2:].parameters(), lr=0.1)]


@pytest.mark.parametrize("mode", ["proximal", "penalty"])
def test_two_optimizers_take_the_penalty_once_each(mode: str) -> None:
    task = TwoOptimizers()
    fit(task, SparsityRegularization(0.05, "filter", CONSTANT, mode, threshold=0.0), steps=6)
    for found, other in zip(task.parameters(), by_hand(mode, "filter", 6).parameters(), strict=True):
        assert torch.allclose(found, other, atol=1e-6)


def test_a_fused_optimizer_is_given_the_penalty_in_the_scale_of_its_gradients() -> None:
    net = mlp()
    callback = SparsityRegularization(0.5, "l1", CONSTANT, "penalty", select=Select(include=("0",)))
    layers = callback.choose(net).layers
    callback._amount = 0.5
    for scale in (1.0, 1024.0):
        net.zero_grad(set_to_none=True)
        callback.before_step(layers, SGD(net.parameters(), lr=0.1), scale)
        assert torch.allclose(net[0].weight.grad, 0.25 * scale * net[0].weight.sign())
    assert net[2].weight.grad is None


def test_zeros_are_held_at_the_end_of_the_schedule_and_the_rest_is_not_shrunk() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 2))
    with torch.no_grad():
        net[0].weight[:3] *= 0.1
    task = Task(net, torch.randn(8, 1, 6, 6), AdamW, lr=1e-3)
    ssl = SparsityRegularization(5.0, "filter", Schedule(1.0, end="50%", every={"step": 2}))
    fit(task, ssl, steps=40)
    silent = (net[0].weight == 0).flatten(1).all(1)
    assert 0 < int(silent.sum()) < 6
    for tensor in (net[0].bias, net[1].weight, net[1].bias):
        assert torch.equal(tensor == 0, silent)
    assert ssl.at_target
    assert ssl.history[-1]["zero_groups"] == ssl.history[-1]["zero_groups/net.0.weight"] == int(silent.sum())
    assert ssl.history[-1]["groups"] == 6
    assert ssl.history[-1]["penalty"] > 0
    assert [entry["strength"] for entry in ssl.history] == sorted(entry["strength"] for entry in ssl.history)
    held = float(ssl.history[-1]["penalty"])
    weight, bias = net[0].weight.detach(), net[0].bias.detach()
    assert float(5.0 * group_lasso(weight, parse_groups("filter"), layout_of(net[0]), bias)) > held


def test_small_groups_become_zero_at_the_threshold() -> None:
    task = Task(mlp(), INPUTS)
    with torch.no_grad():
        task.net[0].weight[1:3] *= 1e-3
        task.net[0].bias[1:3] = 0
    free = SparsityRegularization(0.0, "filter", CONSTANT, threshold=0.5, select=Select(include=("net.0",)))
    task.options["lr"] = 0.0
    fit(task, free, steps=2)
    assert (task.net[0].weight == 0).all(1).tolist() == [False, True, True, False, False]


def test_averaged_weights_are_saved_with_zeros(tmp_path: Any) -> None:
    task = Task(mlp(), INPUTS, lr=1e-3)
    with torch.no_grad():
        task.net[0].weight[:2] *= 0.1
        task.net[0].bias[:2] = 0
    ssl = SparsityRegularization(5.0, "filter", Schedule(1.0, end="50%", every={"step": 1}))
    trainer = fit(task, EMAWeightAveraging(decay=0.9), ssl, steps=60)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    dead = (task.net[0].weight == 0).all(1)
    assert int(dead.sum()) > 0
    assert (saved["net.0.weight"][dead] == 0).all()


class Residual(nn.Module):
    """A stem, two residual blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.inner = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.norm(self.second(F.relu(self.first(x)))))
        x = x + self.inner(x)
        return self.head(x.mean((2, 3)))


def test_depth_takes_layers_with_a_shortcut_only() -> None:
    net = Residual()
    assert set(without_shortcut(net, ["stem", "first", "second", "inner", "head"])) == {"stem", "head"}
    callback = SparsityRegularization(0.1, "depth")
    found = callback.choose(net)
    assert [t.key for t in callback._targets] == ["first.weight", "second.weight", "inner.weight"]
    assert found.left["stem.weight"] == "kept: no shortcut leads around it"
    assert "norm" in found.layers  # falls silent with the convolution before it
    with pytest.raises(ConfigurationError, match=r"cannot remove 'stem\.weight': no shortcut leads around it"):
        SparsityRegularization(0.1, "layer", select=Select(include=("stem", "first"))).choose(net)
    with pytest.raises(SelectionError, match="no shortcut leads around it"):
        SparsityRegularization(0.1, "layer").choose(mlp())


def test_a_removed_layer_leaves_the_shortcut() -> None:
    torch.manual_seed(0)
    task = Task(Residual(), torch.randn(4, 1, 6, 6), lr=0.01)
    rules = {"inner": StrengthRule("net.inner", 9.0), "others": StrengthRule("net.first", 0.0)}
    fit(task, SparsityRegularization(0.0, "layer", Schedule(1.0, end="80%", every={"step": 1}), rules=rules), steps=60)
    assert not task.net.inner.weight.any()
    assert not task.net.inner.bias.any()
    assert task.net.second.weight.all()
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(x + task.net.inner(x), x)


class Unusual(nn.Module):
    """Tied, frozen, recurrent, attention, transposed, grouped, depthwise, one- and three-dimensional layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.recur = nn.LSTM(8, 8, batch_first=True)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.up = nn.ConvTranspose1d(8, 8, 2, stride=2)
        self.volume = nn.Conv3d(1, 8, 1, groups=1)
        self.depthwise = nn.Conv2d(8, 8, 1, groups=8)
        self.decode = nn.Linear(8, 7, bias=False)
        self.decode.weight = self.embed.weight
        self.head = nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        e = self.embed(x.long().remainder(7))
        e = e + self.conv(e.transpose(1, 2)).transpose(1, 2)
        e = e + self.attend(e, e, e, need_weights=False)[0]
        e = self.frozen(self.recur(e)[0]).transpose(1, 2)
        e = self.up(e).mean(2)
        v = self.depthwise(self.volume(e[:, None, :, None, None]).squeeze(2).flatten(2)[..., None])
        return self.head(self.decode(v.mean((2, 3))))


@pytest.mark.parametrize("granularity", ["l1", "filter", "channel", "shape", "kernel", "block:2x2"])
def test_unusual_layers_shrink_and_frozen_and_tied_ones_do_not(granularity: str) -> None:
    torch.manual_seed(0)
    task = Task(Unusual(), torch.arange(24.0).reshape(4, 6), Adam, lr=1e-3)
    before = {name: p.detach().clone() for name, p in task.named_parameters()}
    callback = SparsityRegularization(100.0, granularity, Schedule(1.0, end="90%", every={"step": 1}))
    with pytest.warns(UserWarning, match="every group of"):
        fit(task, callback, steps=40)
    kept = {"net.embed.weight", "net.frozen.weight", "net.frozen.bias"}
    for name, parameter in task.named_parameters():
        if name in kept:
            assert name == "net.embed.weight" or torch.equal(parameter, before[name])
            assert parameter.all()
    shrunk = {t.key for t in callback._targets} - {"net.frozen.weight"}
    assert {"net.conv.weight", "net.recur.weight_hh_l0", "net.attend.in_proj_weight", "net.up.weight"} <= shrunk
    for key in shrunk:
        assert not task.get_parameter(key).any(), key
    assert "tied with" in callback.plan_text
    assert "kept while frozen" in callback.plan_text


def test_slimming_makes_scales_zero_and_their_shifts_at_the_end() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2))
    with torch.no_grad():
        net[1].weight[:3] = 0.05
        net[1].bias += 0.1
    task = Task(net, torch.randn(8, 1, 6, 6), Adam, lr=1e-3)
    fit(task, SparsityRegularization(5.0, "slimming", Schedule(1.0, end="50%", every={"step": 1})), steps=60)
    silent = net[1].weight == 0
    assert 0 < int(silent.sum()) < 8
    assert torch.equal(net[1].bias == 0, silent)
    assert net[0].weight.all()


def test_compress_says_that_it_must_train() -> None:
    net = mlp()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ConfigurationError, match="works while a model trains"):
        compress(net, SparsityRegularization(0.1), inplace=True)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": -1}, "`strength` must be a finite number"),
        ({"strength": "1e-3"}, "YAML reads 1e-4 as text"),
        ({"mode": "prox"}, "did you mean 'proximal'"),
        ({"threshold": 1}, "`threshold` must be a number from 0 to below 1"),
        ({"granularity": "2:4"}, "is a pattern"),
        ({"schedule": Schedule(1.0, shape="once")}, "must rise"),
        (
            {"rules": {"a": {"include": "0", "strengthen": 1}}},
            "rule 'a' has no argument 'strengthen': did you mean 'strength'",
        ),
        ({"rules": {"a": {"include": "0"}}}, "lacks `strength`"),
    ],
)
def test_arguments_outside_their_range(arguments: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        SparsityRegularization(**{"strength": 0.1, **arguments})


def test_an_optimizer_without_a_rate_is_one_clear_error() -> None:
    class NoRate(Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

        def step(self, closure: Any = None) -> Any:
            return closure() if closure is not None else None

    task = Task(mlp(), INPUTS, lambda params, lr: NoRate(params))
    with pytest.raises(ConfigurationError, match=r"has no learning rate `lr` for 'net\.0\.weight'"):
        fit(task, SparsityRegularization(0.1, "l1", CONSTANT), steps=3)


def test_rules_name_layers_that_are_there() -> None:
    with pytest.raises(SelectionError, match="rule 'a'"):
        SparsityRegularization(0.1, rules={"a": StrengthRule("nowhere", 0.1)}).choose(mlp())
    callback = SparsityRegularization(
        0.1, "filter", rules={"last": StrengthRule("4", 0.2), "off": StrengthRule("0", 0.0)}
    )
    callback.choose(mlp())
    assert callback._strengths == {"0.weight": ("off", 0.0), "2.weight": ("select", 0.1), "4.weight": ("last", 0.2)}


def test_repeatable_from_a_seed() -> None:
    runs = []
    for _ in range(2):
        seed_everything(5, verbose=False)
        task = Task(mlp(), INPUTS)
        fit(task, SparsityRegularization(0.3, "channel", CONSTANT))
        runs.append(task.state_dict())
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])
