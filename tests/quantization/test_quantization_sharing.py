"""Weight sharing by hand, against centroids that are real parameters, and on networks of every kind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_compress import (
    Binarization,
    ConfigurationError,
    FixedPointTraining,
    IterativePruning,
    OptimalBrainCompression,
    Schedule,
    Select,
    SelectionError,
    SharingRule,
    WeightSharing,
    compress,
    load_compressed,
    save_compressed,
)
from lightning_compress.core.select import Selection
from lightning_compress.data import DigitsDataModule
from lightning_compress.quantization.sharing import EntropyConstrained, Fisher, KMeans
from lightning_compress.quantization.sharing.held import HeldCodes
from lightning_compress.quantization.sharing.members import Members, sum_by_code

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*WeightAveraging"),
    pytest.mark.filterwarnings("ignore:Swapping scheduler"),
]

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] + X[:, 1] > 0).long() + (X[:, 2] > 1).long()


class Net(LightningModule):
    """Two linear layers, some of whose weights are zero."""

    def __init__(self, optimizer: Callable[[Any], torch.optim.Optimizer] | None = None) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 3)
        with torch.no_grad():
            self.first.weight[:, ::3] = 0
        self.make = optimizer or (lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make(self.parameters())

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=16)


def at(step: int) -> Schedule:
    return Schedule(1.0, start={"step": step}, shape="once")


def fit(model: LightningModule, *callbacks: Any, **arguments: Any) -> LightningModule:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "accelerator": "cpu"}
    seed_everything(0, verbose=False)
    options = {"max_epochs": 3, "enable_progress_bar": False, **quiet, **arguments}
    Trainer(callbacks=list(callbacks), **options).fit(model)
    return model


def clusters(weight: Tensor) -> int:
    return len(weight[weight != 0].unique())


def test_four_weights_by_hand() -> None:
    net = nn.Sequential(nn.Linear(4, 1, bias=False))
    net[0].weight.data = torch.tensor([[1.0, 2.0, 9.0, 12.0]])
    shared = compress(net, WeightSharing(1))
    assert shared[0].weight.tolist() == [[1.5, 1.5, 10.5, 10.5]]
    net[0].weight.data = torch.tensor([[0.0, 2.0, 4.0, 12.0]])  # zero is kept apart: 3 and 12, not 2 and 12
    assert compress(net, WeightSharing(1))[0].weight.tolist() == [[0.0, 3.0, 3.0, 12.0]]


class FourWeights(LightningModule):
    """Loss whose gradient is (1, 2, 4, 8) wherever it is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1, bias=False)
        self.layer.weight.data = torch.tensor([[1.0, 3.0, 0.0, 5.0]])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.layer(torch.tensor([1.0, 2.0, 4.0, 8.0])).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.zeros(1, 1))


@pytest.mark.parametrize(("gradient", "left"), [("sum", 2.0 - 1.5), ("mean", 2.0 - 0.75)])
def test_one_step_by_hand(gradient: str, left: float) -> None:
    # 1 and 3 share 2, the zero stays, 5 is alone: gradients 1 + 2 (mean 1.5) and 8, at a rate of 0.5
    model = fit(FourWeights(), WeightSharing(1, at(0), gradient=gradient), max_epochs=1)
    assert model.layer.weight.tolist() == [[left, left, 0.0, 1.0]]


class Explicit(nn.Module):
    """The same network with centroids that are parameters, looked up by autograd."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.books, self.codes = nn.ParameterList(), []
        for layer in (net.first, net.second):
            book, codes = layer.weight.detach().unique(return_inverse=True)
            self.books.append(nn.Parameter(book.clone()))
            self.codes.append((codes, book == 0))
        self.biases = nn.ParameterList([nn.Parameter(layer.bias.detach().clone()) for layer in (net.first, net.second)])

    def forward(self, x: Tensor) -> Tensor:
        first, second = (book.masked_fill(z, 0)[c] for book, (c, z) in zip(self.books, self.codes, strict=True))
        return F.linear(F.relu(F.linear(x, first, self.biases[0])), second, self.biases[1])


OPTIMIZERS = {
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.3),
    "fused_adam": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.001, momentum=0.5),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moves_as_centroids_that_are_parameters_do(name: str) -> None:
    seed_everything(3, verbose=False)
    model = compress(Net(OPTIMIZERS[name]).double(), WeightSharing(2))
    explicit = Explicit(model)
    optimizer = OPTIMIZERS[name](explicit.parameters())
    for _ in range(2):
        for x, y in zip(X.double().split(16), Y.split(16), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(explicit(x), y).backward()
            optimizer.step()
    fit(model, WeightSharing(2, at(0)), max_epochs=2, precision="64-true")
    for layer, book, (codes, zero) in zip((model.first, model.second), explicit.books, explicit.codes, strict=True):
        assert torch.allclose(layer.weight, book.masked_fill(zero, 0)[codes], atol=1e-12)
        assert clusters(layer.weight) == 4


@pytest.mark.parametrize("name", [*OPTIMIZERS, "bfloat16", "ema", "swa", "accumulate"])
def test_weights_of_a_cluster_stay_equal_to_the_bit(name: str) -> None:
    class Look(WeightSharing):
        def enforce(self, layers: Any) -> None:
            super().enforce(layers)
            if self._held.members:
                seen.append((clusters(model.first.weight), clusters(model.second.weight)))

    seen: list[tuple[int, int]] = []
    model = Net(OPTIMIZERS.get(name))
    before: list[Any] = {
        "ema": [EMAWeightAveraging(decay=0.9, update_every_n_steps=1)],
        "swa": [StochasticWeightAveraging(0.01, swa_epoch_start=0.5, annealing_epochs=1)],
    }.get(name, [])
    options = {"bfloat16": {"precision": "bf16-mixed"}, "accumulate": {"accumulate_grad_batches": 3}}.get(name, {})
    fit(model, *before, Look(2, at(0)), **options)
    assert len(seen) > 3
    assert set(seen) == {(4, 4)}
    assert bool((model.first.weight[:, ::3] == 0).all())


@pytest.mark.parametrize("start", [0, 3])
def test_averaged_weights_are_shared_in_the_file_too(start: int, tmp_path: Path) -> None:
    model, average = Net(OPTIMIZERS["adam"]), EMAWeightAveraging(decay=0.8, update_every_n_steps=1)
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(model, average, WeightSharing(2, at(start)), saver, enable_checkpointing=True)
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    for key in ("first.weight", "second.weight"):
        assert clusters(saved["state_dict"][key]) == 4
    assert (clusters(model.first.weight), clusters(model.second.weight)) == (4, 4)


def test_a_step_that_the_gradient_scaler_skips_changes_nothing() -> None:
    class Overflow(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * torch.inf if batch_idx == 2 else loss

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append(self.first.weight.detach().clone())

    seen: list[Tensor] = []
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))
    fit(Overflow(), WeightSharing(2, at(0)), plugins=[precision], max_epochs=1)
    assert torch.equal(seen[1], seen[2])
    assert not torch.equal(seen[2], seen[3])
    assert all(clusters(weight) == 4 and bool(torch.isfinite(weight).all()) for weight in seen)


def test_the_first_batch_already_sees_shared_weights_with_a_start_of_zero() -> None:
    model = Net()
    callback = WeightSharing(2, at(0))
    before = compress(model, WeightSharing(2))
    fit(model, callback, max_steps=1)
    assert clusters(model.first.weight) == 4
    old, new = before.first.weight.detach(), model.first.weight.detach()
    assert all(len(new[old == v].unique()) == 1 for v in old.unique())  # the same clusters, one step further
    assert callback.history[0]["error"] > 0


def test_weights_pruned_later_leave_their_cluster_for_good() -> None:
    model = Net()
    pruning = IterativePruning(Schedule(0.6, start={"step": 6}, shape="once"), Select())
    fit(model, pruning, WeightSharing(2, at(2)))
    kept = 0.4 * sum(layer.weight.numel() for layer in (model.first, model.second))
    assert sum(int((layer.weight != 0).sum()) for layer in (model.first, model.second)) <= round(kept) + 4
    assert clusters(model.first.weight) <= 4
    assert clusters(model.second.weight) <= 4


def layers_of_every_kind() -> list[nn.Module]:
    return [
        nn.Conv1d(4, 6, 3),
        nn.Conv2d(4, 8, 3, groups=2),
        nn.Conv2d(8, 8, 3, groups=8, dilation=2),
        nn.Conv3d(2, 4, 2),
        nn.ConvTranspose2d(4, 6, 3),
        nn.Bilinear(3, 4, 5),
        nn.Embedding(20, 6),
        nn.EmbeddingBag(20, 6),
        nn.LSTM(6, 8, num_layers=2, bidirectional=True),
        nn.GRUCell(6, 8),
        nn.MultiheadAttention(8, 2),
        nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last),
        nn.Linear(8, 8).half(),
        nn.Linear(8, 8).bfloat16(),
    ]


@pytest.mark.parametrize("layer", layers_of_every_kind(), ids=lambda layer: type(layer).__name__)
def test_every_kind_of_weight(layer: nn.Module) -> None:
    model = nn.Sequential(layer)
    shared = compress(model, WeightSharing(2))
    for name, after in shared.named_parameters():
        before, value = dict(model.named_parameters())[name].detach(), after.detach()
        if "weight" in name:
            assert value.unique().numel() <= 4
            assert value.stride() == before.stride()
            assert float((value - before).double().square().sum()) < float(before.double().square().sum())
        else:
            assert torch.equal(value, before)


def test_codes_are_the_nearest_centroids_and_the_metrics_say_so() -> None:
    model, callback = Net(), WeightSharing(KMeans(clusters=3))
    shared = compress(model, callback)
    old, new = (torch.cat([m.first.weight.flatten(), m.second.weight.flatten()]).detach() for m in (model, shared))
    (entry,) = callback.history
    assert entry["clusters"] == 6
    assert entry["error"] == pytest.approx(float((old - new).square().sum() / old.square().sum()), rel=1e-5)
    assert 0 < entry["bits"] <= 1.6


def test_a_global_codebook_is_shared_by_all_but_those_with_a_rule() -> None:
    shared = compress(Net(), WeightSharing(2, scope="global"))
    both = torch.cat([shared.first.weight.flatten(), shared.second.weight.flatten()])
    assert clusters(both) == 4
    shared = compress(Net(), WeightSharing(2, scope="global", rules={"last": SharingRule("second", 3)}))
    assert (clusters(shared.first.weight), clusters(shared.second.weight)) == (4, 8)
    model = fit(Net(), WeightSharing(2, at(1), scope="global"))
    assert clusters(torch.cat([model.first.weight.flatten(), model.second.weight.flatten()])) == 4


def test_rules_leave_layers_alone() -> None:
    model = Net()
    callback = WeightSharing(2, rules={"all": SharingRule("*", 1), "last": {"include": "second", "quantizer": None}})
    shared = compress(model, callback)
    assert torch.equal(shared.second.weight, model.second.weight)
    assert clusters(shared.first.weight) == 2


def test_frozen_weights_wait_until_they_are_unfrozen() -> None:
    class Thaw(Net):
        def on_train_epoch_start(self) -> None:
            self.first.weight.requires_grad_(self.current_epoch >= 1)

    model = Thaw()
    model.first.weight.requires_grad_(False)
    callback = WeightSharing(2, at(2))
    fit(model, callback, max_epochs=1)
    assert clusters(model.first.weight) > 4
    assert "kept while frozen" in callback.plan_text
    callback = WeightSharing(2, at(2))
    fit(model, callback)
    assert clusters(model.first.weight) == 4


def test_weights_that_are_unfrozen_in_the_last_epoch_are_shared_at_its_end() -> None:
    class Thaw(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.first.weight.requires_grad_(self.global_step >= 2)

    model = Thaw()
    model.first.weight.requires_grad_(False)
    fit(model, WeightSharing(2, at(0)), max_epochs=1)
    assert model.first.weight.requires_grad
    assert clusters(model.first.weight) == 4


def test_weights_that_are_frozen_until_the_first_batch_of_a_resumed_run_stay_in_their_cluster() -> None:
    net, held = nn.Sequential(nn.Linear(2, 1), nn.Linear(2, 1)), HeldCodes()
    layers = held.find(net, Selection({"0": net[0], "1": net[1]})).layers
    held.groups = dict.fromkeys(held.groups, "all")
    codes = torch.tensor([0, 1])
    held.share(layers, {"0.weight": codes, "1.weight": codes}, "all", torch.tensor([1.0, 2.0]))
    net[1].weight.requires_grad_(False)
    held.tie(layers)
    assert held.members.keys() == {"0.weight", "1.weight"}
    held.let_go(layers)  # what a step does
    assert held.members.keys() == {"0.weight"}


def test_weights_that_are_unfrozen_later_join_the_global_codebook() -> None:
    class Thaw(Net):
        def on_train_epoch_start(self) -> None:
            self.first.weight.requires_grad_(self.current_epoch >= 1)

    model = Thaw(lambda p: torch.optim.SGD(p, lr=0.01))
    model.first.weight.requires_grad_(False)
    fit(model, WeightSharing(2, at(2), scope="global"), max_epochs=1)
    assert clusters(model.first.weight) > 4
    model.first.weight.requires_grad_(False)
    fit(model, WeightSharing(2, at(0), scope="global"), max_epochs=3)
    both = torch.cat([model.first.weight.flatten(), model.second.weight.flatten()])
    assert clusters(model.second.weight) == clusters(both) == 4
    assert clusters(model.first.weight) > 1


@pytest.mark.parametrize("removed", [False, True], ids=["in the optimizer", "taken out of it"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_weights_that_are_frozen_after_the_sharing_never_move_and_join_again(scope: str, removed: bool) -> None:
    class Freeze(Net):
        def on_train_epoch_start(self) -> None:
            trains = self.current_epoch not in (1, 2)
            if self.current_epoch == 1:
                self.kept = self.first.weight.detach().clone()
                self.other = self.second.weight.detach().clone()
            if self.current_epoch == 3:
                assert torch.equal(self.first.weight, self.kept)
                assert not torch.equal(self.second.weight, self.other)
                assert clusters(self.second.weight) == 4
            self.first.weight.requires_grad_(trains)
            group = self.optimizers().param_groups[0]["params"]
            if removed and trains is not any(p is self.first.weight for p in group):
                group[:] = [*group, self.first.weight] if trains else [p for p in group if p is not self.first.weight]

    model, callback = Freeze(), WeightSharing(2, at(2), scope=scope)
    fit(model, callback, max_epochs=3)
    assert torch.equal(model.first.weight, model.kept)
    assert len(callback.values()["codes:second.weight"]) == 48
    assert ("codes:first.weight" in callback.values()) is (scope == "layer")
    model = Freeze()
    fit(model, WeightSharing(2, at(2), scope=scope), max_epochs=5)
    assert not torch.equal(model.first.weight, model.kept)
    both = torch.cat([model.first.weight.flatten(), model.second.weight.flatten()])
    assert clusters(both) == (4 if scope == "global" else 8)


def test_weights_frozen_between_two_fits_keep_their_values() -> None:
    model, callback = Net(), WeightSharing(2, at(2), scope="global")
    fit(model, callback)
    model.first.weight.requires_grad_(False)
    kept, other = model.first.weight.detach().clone(), model.second.weight.detach().clone()
    fit(model, callback)
    assert torch.equal(model.first.weight, kept)
    assert not torch.equal(model.second.weight, other)
    assert clusters(model.second.weight) <= 4


@pytest.mark.parametrize("how", ["sum", "mean"])
def test_no_step_waits_for_a_value_of_an_accelerator(how: str) -> None:
    layers = {str(i): nn.Linear(4, 3, bias=False, device="meta") for i in range(2)}  # whose values cannot be read
    held = HeldCodes()
    held.find(nn.ModuleDict(layers), Selection(layers, {}))
    held.groups = dict.fromkeys(held.groups, "all")
    held.sizes = {"all": 2}
    codes = torch.tensor([0, 1, -1] * 4)
    held.members = {
        f"{i}.weight": Members.of(each).to(torch.device("meta")) for i, each in enumerate([codes, codes.abs()])
    }
    for layer in layers.values():
        layer.weight.grad = torch.zeros_like(layer.weight)
    held.share_gradients(layers, how)
    with torch.no_grad():
        held.tie(layers)
    with pytest.raises(RuntimeError, match="meta"):
        held.metrics()


@pytest.mark.parametrize("copies", [1, 3, 64])
def test_sums_by_code_are_those_of_bincount(copies: int) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 6, (1000,), generator=generator)
    for terms in (torch.randint(-99, 99, (1000,), generator=generator), torch.randn(1000, generator=generator)):
        sums = sum_by_code(codes, terms, 7, copies)
        expected = torch.bincount(codes, weights=terms.double(), minlength=8)[1:]
        assert torch.equal(sums, expected) if copies == 1 else torch.allclose(sums, expected, rtol=1e-14)
        assert sums[5:].tolist() == [0.0, 0.0]


def test_weights_that_something_else_has_pruned_never_come_back() -> None:
    net = nn.Sequential(nn.Linear(4, 1, bias=False))
    held = HeldCodes()
    layers = held.find(net, Selection({"0": net[0]}, {})).layers
    held.share(layers, {"0.weight": torch.tensor([0, 0, 1, 1])}, "0.weight", torch.tensor([2.0, 5.0]))
    weight = net[0].weight
    weight.data[0, 1] = 0  # by pruning
    weight.grad = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    held.share_gradients(layers)
    assert weight.grad.tolist() == [[1.0, 0.0, 12.0, 12.0]]
    weight.data += torch.tensor([[1.0, 3.0, 1.0, 1.0]])  # what momentum would do
    held.tie(layers)
    assert weight.tolist() == [[3.0, 0.0, 6.0, 6.0]]
    assert held.counts()["0.weight"].tolist() == [1, 2]
    assert held.state()["codes:0.weight"].tolist() == [1, 0, 2, 2]
    state = {"0.weight": torch.tensor([[9.0, 9.0, 0.0, 7.0]])}  # averaged, and pruned in the average
    held.tie_state(state)
    assert state["0.weight"].tolist() == [[9.0, 0.0, 0.0, 7.0]]
    assert held.counts()["0.weight"].tolist() == [1, 2]
    weight.data.zero_()
    held.tie(layers)
    assert held.present(layers, "0.weight") is None


def test_a_global_codebook_has_one_type() -> None:
    model = Net()
    model.second.half()
    shared = compress(model, WeightSharing(2, scope="global"))
    assert (clusters(shared.first.weight), clusters(shared.second.weight)) == (4, 4)


def test_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.decode = nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)
            self.decode.weight = self.embed.weight

    shared = compress(Tied(), WeightSharing(2))
    assert shared.embed.weight is shared.decode.weight
    assert clusters(shared.embed.weight) == 4
    with pytest.raises(SelectionError, match=r"tied with decode\.weight, which is not selected"):
        compress(Tied(), WeightSharing(2, select=Select(types="Embedding")))


def test_sparse_gradients_are_left_alone() -> None:
    with pytest.raises(SelectionError, match="its gradients are sparse"):
        compress(nn.Sequential(nn.Embedding(5, 4, sparse=True)), WeightSharing(2))


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        (nn.Linear(4, 4, dtype=torch.complex64), "its type is complex64"),
        (nn.Linear(4, 4).requires_grad_(False).to(torch.float8_e4m3fn), "its type is float8_e4m3fn"),
        (nn.ConvTranspose1d(1, 4, 1).requires_grad_(False), "it is empty"),
    ],
    ids=["complex", "float8", "empty"],
)
def test_weights_that_are_no_real_numbers_are_left_alone(odd: nn.Module, words: str) -> None:
    if words == "it is empty":
        odd.weight.data = odd.weight.data[:0]
    net = nn.Sequential(nn.Linear(4, 4), odd, nn.Linear(4, 4))
    for method in (WeightSharing(1), Binarization("bwn", select=Select()), FixedPointTraining([2, 2], None, None)):
        small = compress(net, method)
        assert small[1].weight.dtype == odd.weight.dtype
        assert torch.equal(small[1].weight.view(torch.uint8), odd.weight.view(torch.uint8))
        assert not torch.equal(small[0].weight, net[0].weight)
        with pytest.raises(SelectionError, match=words):
            compress(nn.Sequential(odd), method)


def test_fisher_weights_are_the_hessian_of_a_quadratic_loss() -> None:
    # one input of size 10 matters 10,000 times as much: its weights, small ones, get most of the clusters
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 64, bias=False))
    net[0].weight.data[:, 0] *= 0.1
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(1)) * torch.tensor([10.0, 0.1, 0.1, 0.1])
    pairs = [(x, torch.zeros(40, 64))]
    fisher = Fisher(pairs, loss=lambda y, target: y.sum(), samples=40)
    h = fisher.diagonal(net, {"w": net[0].weight})["w"]
    assert torch.allclose(h, x.double().square().mean(0).expand(64, 4), rtol=1e-5)
    plain, weighted = compress(net, WeightSharing(3)), compress(net, WeightSharing(3, importance=fisher))
    errors = [(m[0].weight - net[0].weight).double().square() for m in (plain, weighted)]
    assert (errors[1] * h).sum() < 0.8 * (errors[0] * h).sum()
    assert errors[1].sum() > errors[0].sum()


@pytest.mark.parametrize(("batch", "words"), [((X, Y + 9), "`loss` cannot judge"), (X, r"must hold pairs \(inputs, t")])
def test_fisher_data_that_no_loss_can_judge_is_refused_before_training(batch: Any, words: str) -> None:
    model = Net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigurationError, match=words):
        fit(model, WeightSharing(2, importance=Fisher([batch])))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_importance_does_not_wreck_a_trained_network_where_entropy_is_constrained() -> None:
    """Nearly all of the Fisher information of a trained network lies in few weights; the others count all the same."""
    data = DigitsDataModule(batch_size=64)
    data.prepare_data()
    data.setup("fit")
    batches = [(batch[0].flatten(1), batch[1]) for batch in data.train_dataloader()]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(net.parameters(), 4e-3)
    for x, y in batches * 12:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    inputs = torch.cat([x for x, _ in batches])
    fisher = Fisher(batches, samples=256)
    for quantizer in (EntropyConstrained(2.5, clusters=16), EntropyConstrained(3.0)):
        plain, weighted = (
            compress(net, WeightSharing(quantizer, importance=importance)) for importance in ("equal", fisher)
        )
        with torch.no_grad():
            lost = [float((found(inputs) - net(inputs)).square().mean()) for found in (plain, weighted)]
        assert lost[1] < 1.5 * lost[0]  # without the mean 2.3 and 4 times


def test_importance_of_adam_is_the_root_of_its_second_moment() -> None:
    found: dict[str, Tensor] = {}

    class Look(WeightSharing):
        def _importances(self, layers: Any, weights: Any) -> dict[str, Tensor]:
            found.update(super()._importances(layers, weights))
            return found

    model = Net(OPTIMIZERS["adam"])
    fit(model, Look(2, at(3), importance="adam"), max_steps=4)
    (optimizer,) = [model.trainer.optimizers[0]]
    moments = {k: optimizer.state[p]["exp_avg_sq"].sqrt() for k, p in model.named_parameters() if "weight" in k}
    assert found.keys() == moments.keys()
    assert all(torch.equal(found[key], moments[key]) for key in found)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adamax])
def test_importance_of_adam_without_a_second_moment_is_refused_before_training(make: Any) -> None:
    message = r"`importance` 'adam' needs .* but 'first\.weight' is trained by " + make.__name__
    refused_before_training(Net(lambda p: make(p, lr=0.1)), WeightSharing(2, at(3), importance="adam"), message)


def test_importance_of_adam_names_a_weight_that_no_optimizer_trains() -> None:
    model = Net()
    model.make = lambda p: torch.optim.Adam(model.second.parameters(), lr=0.1)
    refused_before_training(
        model, WeightSharing(2, at(3), importance="adam"), r"'first\.weight' is in no optimizer: let `configure_opt"
    )
    model.first.requires_grad_(False)
    fit(model, WeightSharing(2, at(3), importance="adam"))
    assert (clusters(model.first.weight), clusters(model.second.weight)) == (64, 4)


def refused_before_training(model: LightningModule, callback: Any, message: str) -> None:
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigurationError, match=message):
        fit(model, callback)
    assert model.trainer.global_step == 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class NoReads(TorchDispatchMode):
    """Refuse to read values, for which a GPU would have to be waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def test_squared_gradients_are_collected_without_reading_them_and_leave_out_steps_that_overflow() -> None:
    net, callback = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1)), WeightSharing(2, at(3), importance="gradients")
    layers = callback.choose(net).layers
    for first, second in (([1.0, float("inf")], 9.0), ([1.0, 2.0], 3.0), ([2.0, 0.0], float("nan")), ([1.0, 1.0], 1.0)):
        net[0].weight.grad, net[1].weight.grad = torch.tensor([first]), torch.tensor([[second]])
        with NoReads():
            callback.before_step(layers, torch.optim.SGD(net.parameters()), 2.0)
    squares = {key: value.tolist() for key, value in callback.values().items() if key.startswith("squares:")}
    assert squares == {"squares:0.weight": [[0.5, 1.25]], "squares:1.weight": [[2.5]]}


def test_squared_gradients_are_those_that_an_optimizer_steps_by() -> None:
    net, callback = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1)), WeightSharing(2, at(3), importance="gradients")
    layers = callback.choose(net).layers
    net[0].weight.grad, net[1].weight.grad = torch.ones(1, 2), torch.ones(1, 1)  # of another optimizer's loss
    callback.before_step(layers, torch.optim.SGD(net[0].parameters()), 1.0)
    assert [key for key in callback.values() if key.startswith("squares:")] == ["squares:0.weight"]


class TwoOptimizers(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(layer.parameters(), lr=0.01) for layer in (self.first, self.second)]


def test_several_optimizers() -> None:
    model = fit(TwoOptimizers(), WeightSharing(2, at(1)))
    assert (clusters(model.first.weight), clusters(model.second.weight)) == (4, 4)
    message = r"'second\.weight' is trained by another optimizer than other .* or use scope='layer'"
    refused_before_training(TwoOptimizers(), WeightSharing(2, at(3), scope="global"), message)


def test_a_global_codebook_names_a_weight_that_no_optimizer_trains() -> None:
    model = Net()
    model.make = lambda p: torch.optim.Adam(model.second.parameters(), lr=0.1)
    message = r"'first\.weight' is trained by no optimizer, unlike other weights of its codebook 'everything'"
    refused_before_training(model, WeightSharing(2, at(3), scope="global"), message)
    model.first.requires_grad_(False)
    fit(model, WeightSharing(2, at(3), scope="global"))
    assert (clusters(model.first.weight), clusters(model.second.weight)) == (64, 4)


def test_a_part_that_is_compiled_keeps_its_paths(tmp_path: Path) -> None:
    model = Net()
    model.first = torch.compile(model.first, backend="eager")
    shared = fit(model, WeightSharing(2, at(1), rules={"first": SharingRule("first", 1)}))
    assert clusters(shared.first.weight) == 2


def test_a_wrong_order_is_refused_by_name() -> None:
    message = r"has IterativePruning after WeightSharing.* put IterativePruning first"
    with pytest.raises(ConfigurationError, match="`methods` " + message):
        compress(Net(), WeightSharing(2), IterativePruning(0.5))
    with pytest.raises(ConfigurationError, match="`callbacks` " + message):
        fit(Net(), WeightSharing(2), IterativePruning(Schedule(0.5, end="40%")))
    after = OptimalBrainCompression(0.5, batches=[X])
    with pytest.raises(ConfigurationError, match="OptimalBrainCompression changes weights after fit, which would undo"):
        fit(Net(), after, WeightSharing(2))
    shared = compress(Net(), IterativePruning(0.5, Select()), WeightSharing(2))
    assert (clusters(shared.first.weight), clusters(shared.second.weight)) == (4, 4)
    assert sum(int((layer.weight == 0).sum()) for layer in (shared.first, shared.second)) == 72


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: WeightSharing(9), "`bits` must be an int from 1 to 8"),
        (lambda: WeightSharing(scope="net"), "`scope` is 'net'"),
        (lambda: WeightSharing(gradient="sums"), "did you mean 'sum'"),
        (lambda: WeightSharing(importance="adams"), "did you mean 'adam'"),
        (lambda: WeightSharing(importance=3), "`importance` is 3"),
        (lambda: WeightSharing(schedule=Schedule(0.5, shape="once")), "must share all weights at one time"),
        (lambda: WeightSharing(schedule=Schedule(1.0)), "must share all weights at one time"),
        (lambda: WeightSharing(schedule=at(0), importance="gradients"), "the schedule starts at 0"),
        (lambda: WeightSharing(rules={"a": {"include": "x"}}), "rule 'a' lacks `quantizer`"),
        (lambda: WeightSharing(rules={"a": SharingRule("x", 0)}), "`bits` must be an int from 1 to 8, got 0"),
        (lambda: Fisher(None), "`batches` is missing"),
        (lambda: Fisher([X], loss=3), "`loss` must be callable"),
        (lambda: compress(Net(), WeightSharing(importance="gradients")), "`compress` does not train"),
        (lambda: compress(Net(), WeightSharing(rules={"a": SharingRule("firsd", 2)})), "rule 'a'.*did you mean"),
    ],
)
def test_errors(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build()


def test_weights_that_diverged_are_named() -> None:
    model = Net()
    with torch.no_grad():
        model.second.weight[0, 0] = float("nan")
    with pytest.raises(ConfigurationError, match=r"'second\.weight': `values` holds NaN"):
        compress(model, WeightSharing(2))


def test_a_checkpoint_of_another_selection_is_refused() -> None:
    model, callback = Net(), WeightSharing(2, at(0))
    fit(model, callback, max_steps=2)
    state = copy.deepcopy(callback.state_dict())
    other = WeightSharing(2, at(0), select=Select(include="second"))
    other.load_state_dict(state)
    layers = {"second": model.second}
    other.choose(model)
    with pytest.raises(ConfigurationError, match=r"clusters for 'first\.weight', which is not selected now"):
        other.attach_values(layers)
    scoped = WeightSharing(2, at(0), scope="global")
    scoped.load_state_dict(state)
    scoped.choose(model)
    with pytest.raises(ConfigurationError, match="`scope` and `rules` it was written with"):
        scoped.attach_values({"first": model.first, "second": model.second})


def _networks() -> dict[str, Callable[[], nn.Module]]:
    return {
        "resnet": lambda: torchvision.models.resnet18(num_classes=4),
        "mobilenet": lambda: torchvision.models.mobilenet_v3_small(num_classes=4),
        "densenet": lambda: torchvision.models.densenet121(num_classes=4),
        "transformer": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2),
        "recurrent": lambda: nn.Sequential(nn.LSTM(32, 64, num_layers=2, batch_first=True)),
    }


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("resnet", marks=pytest.mark.slow),
        "mobilenet",
        pytest.param("densenet", marks=pytest.mark.slow),
        "transformer",
        "recurrent",
    ],
)
def test_whole_networks_become_small_files_that_restore_every_bit(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = _networks()[name]().eval()
    shared = compress(model, WeightSharing(3), inplace=True)
    for path, parameter in shared.named_parameters():
        assert parameter.dim() < 2 or len(parameter.detach().unique()) <= 8, path
    save_compressed(shared, tmp_path / "file.safetensors")
    restored = load_compressed(_networks()[name]().eval(), tmp_path / "file.safetensors")
    state = shared.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in restored.state_dict().items())
    dense = sum(4 * parameter.numel() for parameter in shared.parameters())
    assert (tmp_path / "file.safetensors").stat().st_size < dense / 7


class Split(Net):
    """Biases and weights with an optimizer each, in manual optimization."""

    def __init__(self, several: bool) -> None:
        super().__init__()
        self.several, self.automatic_optimization = several, False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers = self.optimizers() if self.several else [self.optimizers()]
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        layers = (self.first, self.second)
        parts = [[layer.bias for layer in layers], [layer.weight for layer in layers]]  # the first steps first
        return [torch.optim.SGD(part, lr=0.05) for part in (parts if self.several else [parts[0] + parts[1]])]


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_an_optimizer_of_biases_alone_does_not_sum_gradients_again(scope: str) -> None:
    def trained(several: bool) -> dict[str, Tensor]:
        seed_everything(0, verbose=False)
        model = Split(several)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = Trainer(max_epochs=3, accelerator="cpu", enable_checkpointing=False, **quiet, callbacks=[
            WeightSharing(2, schedule=Schedule(1.0, shape="once"), select=Select(), scope=scope)
        ])  # fmt: skip
        trainer.fit(model, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=16))
        return model.state_dict()

    together, apart = trained(False), trained(True)
    assert all(torch.equal(together[key], apart[key]) for key in together)
