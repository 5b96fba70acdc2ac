"""Methods that prune a trained model from calibration batches: on layers, networks, files and data."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract_rows import Mixed, Sequences
from lightning.pytorch import Trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_compress as lc
from lightning_compress import ConfigurationError, FisherPruning, OptimalBrainCompression, Select, SelectionError
from lightning_compress.core.calibration import calibration_batches
from lightning_compress.core.gradients import sample_gradients
from lightning_compress.core.hessians import collect_hessians, layer_hessian
from lightning_compress.data import DigitsDataModule
from lightning_compress.models import ImageClassifier
from lightning_compress.pruning.granularity import layout_of, to_units
from lightning_compress.pruning.second_order import fisher_diagonal, obd_saliency

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def images(count: int = 40) -> Tensor:
    return torch.rand(count, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def labelled(count: int = 40) -> list[tuple[Tensor, Tensor]]:
    x = images(count)
    return list(zip(x.split(16), (x.mean((1, 2, 3)) * 30).long().remainder(3).split(16), strict=True))


def zeros(module: nn.Module) -> float:
    weight = module.weight
    return 1 - int(torch.count_nonzero(weight)) / weight.numel()


BUILD: dict[str, Callable[..., Any]] = {
    "obc": lambda amount, **kw: OptimalBrainCompression(amount, labelled(), **kw),
    "obc_row": lambda amount, **kw: OptimalBrainCompression(amount, labelled(), scope="row", **kw),
    "fisher": lambda amount, **kw: FisherPruning(amount, labelled(), block=7, **kw),
    "obd": lambda amount, **kw: FisherPruning(amount, labelled(), block=1, **kw),
}
methods = pytest.mark.parametrize("name", BUILD)


@methods
def test_a_network_with_residual_concat_and_grouped_layers(name: str, tmp_path: Path):
    torch.manual_seed(0)
    model = Mixed().train()
    before = copy.deepcopy(model.state_dict())
    method = BUILD[name](0.5)
    pruned = lc.compress(model, method)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert pruned.training
    names = ("stem", "depthwise", "grouped")
    if name.startswith("obc"):
        assert [zeros(pruned.get_submodule(n)) for n in names] == [0.5, 0.5, 0.5]
    total = sum(pruned.get_submodule(n).weight.numel() for n in names)
    assert sum(zeros(pruned.get_submodule(n)) * pruned.get_submodule(n).weight.numel() for n in names) == total / 2
    assert torch.equal(pruned.head.weight, model.head.weight)
    assert torch.equal(pruned.norm.running_mean, model.norm.running_mean)
    assert method.history[-1]["sparsity"] == pytest.approx(0.5)
    assert not any(layer._forward_pre_hooks for layer in pruned.modules())
    lc.save_compressed(pruned, tmp_path / "file.safetensors")
    bare = lc.load_compressed(Mixed(), tmp_path / "file.safetensors")
    assert torch.equal(bare.eval()(images()), pruned.eval()(images()))


def test_updates_beat_the_same_network_without_them():
    torch.manual_seed(0)
    model = Mixed().eval()
    pruned = lc.compress(model, OptimalBrainCompression(0.5, images()))
    plain = lc.compress(model, lc.IterativePruning(0.5, scope="layer"))
    with torch.no_grad():
        errors = [float((net(images()) - model(images())).square().sum()) for net in (pruned, plain)]
    assert errors[0] < errors[1]


def test_a_transformer_says_what_it_leaves():
    torch.manual_seed(0)
    model = Sequences()
    method = OptimalBrainCompression(0.5, images(), Select())
    pruned = lc.compress(model, method)
    assert torch.equal(pruned.attend.out_proj.weight, model.attend.out_proj.weight)
    assert torch.equal(pruned.decode.weight, model.embed.weight)
    assert [zeros(layer) for layer in (pruned.conv, pruned.frozen)] == [0.5, 0.5]
    left = method.choose(model).left
    assert "attention" in left["attend.out_proj"]
    assert "tied" in left["decode.weight"]


def test_two_of_four_and_what_that_leaves_alone():
    torch.manual_seed(0)
    model = Mixed().eval()
    method = OptimalBrainCompression(0.5, images(), Select(), granularity="2:4")
    pruned = lc.compress(model, method)
    for layer in (pruned.grouped, pruned.head):
        units = to_units(layer.weight, layout_of(layer)).unflatten(2, (-1, 4))
        assert (units.ne(0).sum(3) == 2).all()
    left = method.choose(model).left
    assert left["stem.weight"] == "kept: its 1 inputs are not a multiple of 4"
    assert torch.equal(pruned.stem.weight, model.stem.weight)
    assert torch.equal(pruned.depthwise.weight, model.depthwise.weight)
    with pytest.raises(SelectionError, match=r"no layer fits '2:4': stem\.weight: kept: its 1 inputs"):
        lc.compress(model, OptimalBrainCompression(0.5, images(), Select(include="stem"), granularity="2:4"))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"amount": 0.6, "granularity": "2:4"}, "`amount` is 0.6, but '2:4' removes 0.5"),
        ({"amount": 0.5, "granularity": "filter"}, "`granularity` must be 'element' or a pattern such as '2:4'"),
        ({"amount": 0.5, "granularity": "2:4", "scope": "global"}, "`scope` 'global' gives each layer"),
        ({"amount": 0.5, "scope": "globl"}, "did you mean 'global'"),
    ],
)
def test_patterns_and_scopes_that_contradict(arguments: dict[str, Any], match: str):
    with pytest.raises(ConfigurationError, match=match):
        OptimalBrainCompression(batches=images(), **arguments)


def test_all_layers_against_each_other_lose_less_than_all_the_same():
    torch.manual_seed(0)
    model = Mixed().eval()
    total = sum(layer.weight.numel() for layer in (model.stem, model.depthwise, model.grouped, model.head))
    errors = {}
    for scope in ("layer", "global"):
        pruned = lc.compress(model, OptimalBrainCompression(0.6, images(), Select(), scope=scope))
        zeros = sum(int((p == 0).sum()) for p in pruned.parameters() if p.dim() > 1)
        assert abs(zeros - round(0.6 * total)) <= (2 if scope == "layer" else 0)
        errors[scope] = float((pruned(images()) - model(images())).detach().square().sum())
    assert errors["global"] < errors["layer"]


def test_a_layer_that_is_called_twice_sees_both_inputs():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.fc(input=self.fc(x).relu()))

    net, x = Twice(), torch.randn(10, 4)
    found = collect_hessians(net, {"fc": net.fc}, [x[:3], x[3:]])["fc"]
    wanted = layer_hessian(net.fc, x) + layer_hessian(net.fc, net.fc(x).relu())
    assert torch.allclose(found, wanted / 20)


def test_sources_of_batches():
    x = torch.arange(10.0)[:, None]
    assert [len(batch) for batch in calibration_batches(x, 3)] == [10]
    loader = DataLoader(TensorDataset(x, x), batch_size=4)
    assert [len(batch[0]) for batch in calibration_batches(loader, 5)] == [4, 4]
    (first,) = calibration_batches(DigitsDataModule(batch_size=8), 8)
    assert first[0].shape == (8, 1, 8, 8)
    net = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 2))
    one, two = (lc.compress(net, OptimalBrainCompression(0.5, source, samples=10)) for source in (x, loader))
    assert torch.allclose(one[0].weight, two[0].weight)


def test_batches_as_keywords():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, *, x: Tensor) -> Tensor:
            return self.head(self.fc(x).relu())

    x, y = torch.randn(6, 3), torch.randint(0, 2, (6,))
    assert zeros(lc.compress(Named(), OptimalBrainCompression(0.5, [{"x": x}])).fc) == 0.5
    assert zeros(lc.compress(Named(), FisherPruning(0.5, [({"x": x}, y)])).fc) == 0.5


def test_gradients_of_samples_average_to_that_of_the_batch():
    torch.manual_seed(0)
    net = Mixed().eval()
    net.stem.requires_grad_(False)
    weights = {"stem": net.stem.weight, "head": net.head.weight}
    found = list(sample_gradients(net, weights, labelled(20)))
    assert not net.stem.weight.requires_grad
    x, y = torch.cat([b[0] for b in labelled(20)]), torch.cat([b[1] for b in labelled(20)])
    net.stem.requires_grad_(True)
    wanted = torch.autograd.grad(F.cross_entropy(net(x), y), [net.stem.weight, net.head.weight])
    assert len(found) == 20
    for key, gradient in zip(weights, wanted, strict=True):
        assert torch.allclose(torch.stack([g[key] for g in found]).mean(0), gradient, atol=1e-6)


def test_one_weight_a_block_is_optimal_brain_damage_over_all_layers():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 3))
    weights = {"1": net[1].weight, "3": net[3].weight}
    gradients = list(sample_gradients(net, weights, labelled()))
    scores = {k: obd_saliency(w, fisher_diagonal(g[k] for g in gradients)) for k, w in weights.items()}
    cut = torch.cat([score.flatten() for score in scores.values()]).sort().values[155]
    pruned = lc.compress(net, FisherPruning(156 / 312, labelled(), select=Select(), block=1, damping=1e-12))
    for key, score in scores.items():
        assert torch.equal(pruned.get_submodule(key).weight != 0, score > cut)


def test_digits_lose_less_accuracy_than_by_magnitude():
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32).flatten(1) / 16
    y = torch.tensor(data.target)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(net(x[:1200]), y[:1200]).backward()
        optimizer.step()
    pairs = [(x[:400], y[:400])]
    everything: dict[str, Any] = {"select": Select()}

    def accuracy(model: nn.Module) -> float:
        return float((model(x[1200:]).argmax(1) == y[1200:]).float().mean())

    magnitude = accuracy(lc.compress(net, lc.IterativePruning(0.7, **everything)))
    assert accuracy(lc.compress(net, OptimalBrainCompression(0.7, pairs, **everything))) > magnitude + 0.2
    assert accuracy(lc.compress(net, FisherPruning(0.7, pairs, damping=1e-4, **everything))) > magnitude + 0.1


@methods
def test_after_a_fit_the_copy_is_pruned_and_the_model_is_not(name: str):
    torch.manual_seed(0)
    task = ImageClassifier(nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 3)), num_classes=3)
    method = BUILD[name](0.75)
    data = DataLoader(TensorDataset(images(32), torch.arange(32) % 3), batch_size=8)
    trainer = Trainer(max_epochs=1, callbacks=[method], accelerator="cpu", **QUIET)
    trainer.fit(task, data, data)
    assert zeros(task.net[1]) == 0
    assert zeros(method.compressed.net[1]) == 0.75
    assert type(method.compressed) is ImageClassifier
    at_once = lc.compress(task, BUILD[name](0.75))
    assert torch.equal(at_once.net[1].weight, method.compressed.net[1].weight)
    assert "after fit, on a copy" in method.plan_text


class Fork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.used(x))


def test_a_layer_that_data_never_reaches_is_named_and_nothing_changes():
    net = Fork()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ConfigurationError, match="never reach 'unused'"):
        lc.compress(net, OptimalBrainCompression(0.5, torch.randn(4, 4)), inplace=True)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    only = OptimalBrainCompression(0.5, torch.randn(4, 4), Select(include=("used", "unused"), exclude=("unused",)))
    assert zeros(lc.compress(net, only).used) == 0.5


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"amount": 1.0}, "`amount`"),
        ({"amount": True}, "`amount`"),
        ({"amount": 0.5, "damping": 0}, "`damping`"),
        ({"amount": 0.5, "samples": 0}, "`samples`"),
        ({"amount": 0.5, "batches": iter([torch.zeros(1)])}, "read again"),
        ({"amount": 0.5, "batches": 3}, "`batches` must be"),
    ],
)
@pytest.mark.parametrize("method", [OptimalBrainCompression, FisherPruning])
def test_bad_arguments(method: type, arguments: dict[str, Any], match: str):
    with pytest.raises(ConfigurationError, match=match):
        method(**arguments)


def test_more_bad_arguments():
    with pytest.raises(ConfigurationError, match="did you mean 'layer'"):
        OptimalBrainCompression(0.5, scope="layers")
    with pytest.raises(ConfigurationError, match="`block`"):
        FisherPruning(0.5, block=0)
    with pytest.raises(ConfigurationError, match="`loss`"):
        FisherPruning(0.5, loss="mse")
    net = Fork()
    for batches, match in ((None, "missing"), ([], "empty")):
        with pytest.raises(ConfigurationError, match=match):
            lc.compress(net, OptimalBrainCompression(0.5, batches))
    with pytest.raises(ConfigurationError, match="pairs"):
        lc.compress(net, FisherPruning(0.5, torch.randn(4, 4)))
    constant = FisherPruning(0.5, [(torch.randn(4, 4), torch.zeros(4))], loss=lambda y, t: torch.zeros(()))
    with pytest.raises(ConfigurationError, match="does not depend"):
        lc.compress(net, constant)
    only = Select(include=("used",))
    with pytest.raises(ConfigurationError, match="`batches`: what 'used' sees on them holds NaN"):
        lc.compress(net, OptimalBrainCompression(0.5, torch.full((4, 4), torch.nan), only))
    with pytest.raises(SelectionError, match="no layer of type LSTM"):
        lc.compress(net, OptimalBrainCompression(0.5, torch.zeros(2, 4), Select(types=("LSTM",))))


@pytest.mark.parametrize(
    ("batches", "match"),
    [
        (torch.randn(4, 4), "`batches` must hold pairs"),
        ([(torch.randn(4, 4), torch.zeros(4, 7))], r"`loss` cannot judge what .* returns, a tensor of shape \[1, "),
    ],
)
def test_a_loss_that_cannot_be_computed_is_noticed_before_training(batches: Any, match: str):
    task = ImageClassifier(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), num_classes=3)
    data = DataLoader(TensorDataset(torch.randn(8, 4), torch.zeros(8, dtype=torch.long)), batch_size=4)
    trainer = Trainer(max_epochs=1, callbacks=[FisherPruning(0.5, batches)], accelerator="cpu", **QUIET)
    with pytest.raises(ConfigurationError, match=match):
        trainer.fit(task, data, data)
    assert trainer.global_step == 0
