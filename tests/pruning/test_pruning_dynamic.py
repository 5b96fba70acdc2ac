"""Dynamic sparse training: hand-worked exchanges, an independent reference, and what must hold while it trains."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import BaseFinetuning, EMAWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import ConfigurationError, DynamicSparseTraining, IterativePruning, Select, compress
from lightning_compress.core.errors import CompressionError
from lightning_compress.pruning.dynamic.regrowth import (
    connection_counts,
    cosine_fraction,
    drop_and_grow,
    random_mask,
    zero_state,
)

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
}


def mask_of(*active: int) -> Tensor:
    return torch.tensor(active, dtype=torch.int8).neg()


def test_the_fraction_by_hand() -> None:
    assert cosine_fraction(0, 80, 0.3) == 0.3
    assert cosine_fraction(40, 80, 0.3) == pytest.approx(0.15)
    assert cosine_fraction(20, 80, 0.4) == pytest.approx(0.2 * (1 + math.sqrt(0.5)))
    assert cosine_fraction(80, 80, 0.3) == cosine_fraction(0, 0, 0.3) == 0.0


@pytest.mark.parametrize(
    ("count", "growth", "expected"),
    [
        (0, [0, 9, 0, 9], (1, 0, 1, 0)),
        (1, [5, 2, 0, 3], (1, 0, 0, 1)),  # 2 is the smallest that is active; 3 has the largest gradient
        (1, [0, 2, 8, 3], (1, 0, 1, 0)),  # what is dropped grows again at once: nothing moves
        (2, [1, 2, 0, 3], (0, 1, 0, 1)),
        (7, [1, 2, 0, 3], (0, 1, 0, 1)),  # no more than there are
    ],
)
def test_four_connections_by_hand(count: int, growth: list[float], expected: tuple[int, ...]) -> None:
    weight = torch.tensor([3.0, 0.0, -2.0, 0.0])
    moved = drop_and_grow(weight, mask_of(1, 0, 1, 0), torch.tensor(growth), count)
    assert moved.tolist() == mask_of(*expected).tolist()


def test_against_numpy() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        size = int(rng.integers(2, 40))
        alive, count = int(rng.integers(1, size + 1)), int(rng.integers(0, size))
        active = rng.permutation(size) < alive
        weight, growth = rng.normal(size=size) * active, rng.random(size)
        kept = sorted(np.flatnonzero(active), key=lambda i: -abs(weight[i]))[: max(0, alive - count)]
        rest = sorted(set(range(size)) - set(kept), key=lambda i: -growth[i])
        expected = sorted([*kept, *rest[: alive - len(kept)]])
        mask = torch.from_numpy(active).to(torch.int8).neg()
        moved = drop_and_grow(torch.from_numpy(weight), mask, torch.from_numpy(growth), count)
        assert moved.nonzero().flatten().tolist() == expected


def test_what_is_not_a_number_is_refused() -> None:
    with pytest.raises(CompressionError, match="NaN"):
        drop_and_grow(torch.ones(3), mask_of(1, 1, 0), torch.tensor([1.0, 3.0, float("nan")]), 1)


def test_channels_last_weights_keep_their_layout() -> None:
    weight = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)
    mask = random_mask(weight, 30, seed=1, step=0, key="conv.weight")
    moved = drop_and_grow(weight * (mask != 0), mask, torch.rand(weight.shape), 10)
    assert mask.stride() == moved.stride() == weight.stride()
    assert int(mask.count_nonzero()) == int(moved.count_nonzero()) == 30
    assert torch.equal(mask, random_mask(weight.contiguous(), 30, seed=1, step=0, key="conv.weight"))


def test_counts_of_connections_add_up() -> None:
    shapes = {"a": (300, 784), "b": (100, 300), "c": (10, 100), "d": (1, 1)}
    total = sum(math.prod(shape) for shape in shapes.values())
    erk = connection_counts(shapes, 0.9, "erk")
    assert sum(erk.values()) == total - round(0.9 * total)
    assert erk["c"] == 1000  # small enough to stay dense
    assert erk["a"] / erk["b"] == pytest.approx(1084 / 400, rel=1e-3)
    assert connection_counts(shapes, 0.9, "uniform") == {"a": 23520, "b": 3000, "c": 100, "d": 1}


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
def test_optimizers_forget_the_grown(make: Any) -> None:
    weight, other = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(6))
    optimizer = make([weight, other])
    (weight.sum() + other.sum()).backward()
    optimizer.step()
    where = torch.tensor([[True, False]] * 3)
    before = {key: value.clone() for key, value in optimizer.state[other].items()}
    zero_state([torch.optim.SGD([other], 0.1), optimizer], weight, where)
    for value in optimizer.state[weight].values():
        if value.dim():
            assert (value[where] == 0).all()
            assert (value[~where] != 0).all()
        else:
            assert value == 1
    assert all(torch.equal(value, before[key]) for key, value in optimizer.state[other].items())


# --- in training


class Net(LightningModule):
    """Two layers and a head, with whatever optimizer and training a test asks for."""

    def __init__(self, manual: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.automatic_optimization = not manual

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.first(x)))))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        if not self.automatic_optimization:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
        return loss

    def configure_optimizers(self) -> Any:
        if self.automatic_optimization:
            trained = [p for p in self.parameters() if p.requires_grad]
            return torch.optim.SGD(trained, 0.1, momentum=0.9, weight_decay=1e-3)
        groups = (self.first.parameters(), [*self.second.parameters(), *self.head.parameters()])
        return [torch.optim.Adam(parameters, 0.01) for parameters in groups]

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(96, 12, generator=generator)
        return DataLoader(TensorDataset(x, (x[:, :3]).argmax(1)), batch_size=8)


class Check(Callback):
    """Compare the weights with the masks after every batch, and remember the masks."""

    def __init__(self, method: DynamicSparseTraining) -> None:
        self.method, self.masks = method, []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        masks = {key: value.clone() for key, value in self.method.values().items() if key.startswith("mask:")}
        self.masks.append(masks)
        for key in masks:
            weight = pl_module.get_parameter(key.removeprefix("mask:"))
            alive = torch.from_numpy(np.unpackbits(masks[key].numpy())[: weight.numel()]).reshape(weight.shape)
            assert (weight[alive == 0] == 0).all()
            assert int(alive.sum()) == (84 if "first" in key else 95)


def train(method: DynamicSparseTraining, net: Net | None = None, **kw: Any) -> tuple[Net, Check]:
    seed_everything(0, verbose=False)
    net, check = Net() if net is None else net, Check(method)
    Trainer(callbacks=[*kw.pop("before", []), method, check], **{"max_epochs": 3, **QUIET, **kw}).fit(net)
    return net, check


@pytest.mark.parametrize("kind", ["rigl", "set"])
@pytest.mark.parametrize("kw", [{}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.01}], ids=str)
def test_zeros_and_counts_hold_at_every_step(kind: str, kw: dict[str, Any]) -> None:
    method = DynamicSparseTraining(0.6, kind, distribution="erk", every={"step": 2}, end="80%")
    _, check = train(method, **kw)
    assert sum(int(np.unpackbits(mask.numpy()).sum()) for mask in check.masks[0].values()) == 448 - round(0.6 * 448)
    moved = [entry["moved"] for entry in method.history]
    assert moved[0] > 10
    assert moved[-1] == 0
    assert {entry["sparsity"] for entry in method.history} == {1 - 179 / 448}
    assert any(not torch.equal(a, b) for a, b in zip(check.masks[0].values(), check.masks[-1].values(), strict=True))


def test_without_a_fraction_the_masks_stay() -> None:
    _, check = train(DynamicSparseTraining(0.6, fraction=0.0, every={"step": 1}))
    assert all(torch.equal(check.masks[0][key], check.masks[-1][key]) for key in check.masks[0])


def test_several_optimizers_trained_by_hand() -> None:
    method = DynamicSparseTraining(0.6, every={"step": 3})
    train(method, Net(manual=True))
    assert method.history[0]["moved"] > 10
    assert method.updates == 36


class Reference(Callback):
    """What the first exchange must do, from the gradients and weights around the first step."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == 0:
            self.grad, self.before = pl_module.first.weight.grad.abs().clone(), pl_module.first.weight.detach().clone()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == 1:
            self.after = pl_module.first.weight.detach().clone()
            self.momentum = trainer.optimizers[0].state[pl_module.first.weight]["momentum_buffer"].clone()


def test_grown_weights_start_at_zero_where_the_gradient_is_largest_and_forget_their_momentum() -> None:
    reference = Reference()
    method = DynamicSparseTraining(0.6, every={"step": 12})
    seed_everything(0, verbose=False)
    Trainer(callbacks=[method, reference], max_epochs=1, **QUIET).fit(Net())
    packed = method.values()["mask:first.weight"]
    alive = torch.from_numpy(np.unpackbits(packed.numpy())[:192]).reshape(16, 12) != 0
    was = reference.before != 0
    grown, gone = alive & ~was, was & ~alive
    assert int(grown.sum()) == int(gone.sum()) > 5
    assert (reference.after[grown] == 0).all()
    assert (reference.momentum[grown] == 0).all()
    assert (reference.momentum[alive & was] != 0).any()
    assert reference.grad[grown].min() >= reference.grad[~alive & ~was].max()


class Unfreeze(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.second)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.second, optimizer)


def test_a_frozen_layer_is_dense_and_named_until_it_is_unfrozen() -> None:
    method = DynamicSparseTraining(0.6, every={"step": 5})
    _, check = train(method, before=[Unfreeze()])
    assert "mask:second.weight" not in check.masks[0]
    assert "mask:second.weight" in check.masks[12]
    assert "dense while frozen, then" in method.plan_text
    assert method.history[-1]["sparsity"] == 1 - 179 / 448


def test_a_checkpoint_of_another_sparsity_is_refused() -> None:
    net, _ = train(method := DynamicSparseTraining(0.6))
    other = DynamicSparseTraining(0.8)

    class Load(Callback):
        def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
            other.load_state_dict(method.state_dict())

    with pytest.raises(
        ConfigurationError, match=r"checkpoint has \d+ connections in 'first.weight', but `sparsity` 0.8"
    ):
        Trainer(max_epochs=1, callbacks=[other, Load()], **QUIET).fit(net)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 90}, "`sparsity` must be a number from 0 to below 1, got 90; 90 % is written 0.9"),
        ({"sparsity": 1.0}, "`sparsity` must be"),
        ({"sparsity": True}, "`sparsity` must be"),
        ({"sparsity": 0.9, "method": "rig"}, "`method` is 'rig': did you mean 'rigl'"),
        ({"sparsity": 0.9, "distribution": "erdos"}, "`distribution` is 'erdos'"),
        ({"sparsity": 0.9, "fraction": -0.1}, "`fraction` must be a number from 0 to 1"),
        ({"sparsity": 0.9, "end": "80"}, "`end` must be an epoch"),
        ({"sparsity": 0.9, "every": 0}, "`every` must be above 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        DynamicSparseTraining(**arguments)


def test_it_is_no_way_to_compress_a_trained_model() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(ConfigurationError, match="DynamicSparseTraining works only while a model trains"):
        compress(net, DynamicSparseTraining(0.5), inplace=True)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_another_method_that_holds_masks_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="change the same weights; remove one of them"):
        train(DynamicSparseTraining(0.5), before=[IterativePruning(0.5)])


def test_an_end_after_the_run_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="`end` of the schedule is optimizer step 400"):
        train(DynamicSparseTraining(0.5, end={"step": 400}))


def test_more_layers_can_be_selected() -> None:
    method = DynamicSparseTraining(0.5, select=Select())
    seed_everything(0, verbose=False)
    Trainer(callbacks=[method], max_epochs=1, **QUIET).fit(net := Net())
    total = sum(int((layer.weight != 0).sum()) for layer in (net.first, net.second, net.head))
    assert total == 248  # of 496


@pytest.mark.filterwarnings("ignore:.*WeightAveraging")
def test_averaged_weights_are_as_sparse() -> None:
    method = DynamicSparseTraining(0.6, every={"step": 2})
    net, _ = train(method, before=[EMAWeightAveraging(decay=0.9)])
    assert int((net.first.weight != 0).sum() + (net.second.weight != 0).sum()) <= 179
    with pytest.raises(ConfigurationError, match="wrong order"):
        Trainer(max_epochs=1, callbacks=[DynamicSparseTraining(0.6), EMAWeightAveraging()], **QUIET).fit(Net())
