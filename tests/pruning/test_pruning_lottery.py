"""Lottery tickets: hand-worked prunings, rounds of fits, exact rewinding, and rounds that were cut off."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_compress import ConfigurationError, ExactResume, IterativePruning, LotteryTicket, Select, compress
from lightning_compress.core.schedule import Horizon
from lightning_compress.data.order import ResumableLoader
from lightning_compress.pruning.lottery.rewinding import (
    RewindSchedule,
    prune_remaining,
    put_back,
    remaining_share,
    shuffled,
    take_copy,
)

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
}


def mask_of(*active: int) -> Tensor:
    return torch.tensor(active, dtype=torch.int8).neg()


def test_what_is_left_by_hand() -> None:
    assert remaining_share(0.2, 0) == 1
    assert remaining_share(0.5, 3) == 0.125
    assert remaining_share(0.2, 7) == pytest.approx(0.2097152)


@pytest.mark.parametrize(
    ("scope", "sparsity", "a", "b"),
    [
        ("global", 0.5, (0, 0, 0, 1), (1, 1)),  # 0.1, 1 and 2 of [0.1, 1, 2, 4] and [3, 5]
        ("layer", 0.5, (0, 0, 1, 1), (0, 1)),
        ("global", 0.0, (1, 1, 1, 1), (1, 1)),
    ],
)
def test_four_and_two_weights_by_hand(scope: str, sparsity: float, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    weights = {"a": torch.tensor([0.1, -1.0, 2.0, 4.0]), "b": torch.tensor([3.0, -5.0])}
    masks = prune_remaining(weights, {}, sparsity, scope, 0.0)
    assert torch.equal(masks["a"], mask_of(*a))
    assert torch.equal(masks["b"], mask_of(*b))


def test_what_is_pruned_stays_pruned_beside_weights_that_are_zero() -> None:
    weights = {"a": torch.tensor([0.0, 0.0, 0.0, 0.0, 7.0])}
    before = {"a": mask_of(1, 1, 0, 0, 1)}
    after = prune_remaining(weights, before, 0.6, "global", 0.0)["a"]
    assert torch.equal(after, mask_of(0, 1, 0, 0, 1))


def test_the_floor_keeps_a_share_of_each_weight() -> None:
    weights = {"small": torch.full((10,), 0.1), "large": torch.full((10,), 1.0)}
    masks = prune_remaining(weights, {}, 0.5, "global", floor=0.2)
    assert int(masks["small"].count_nonzero()) == 2
    assert int(masks["large"].count_nonzero()) == 8


def test_the_copy_is_taken_where_it_says() -> None:
    schedule = RewindSchedule(0.2, initial=0.2, shape="linear", rewind="10%")
    timeline = schedule.resolve(Horizon(100, 10))
    assert [t for t in range(100) if timeline.due(t)] == [0, 9]
    assert "a copy is taken at step 10" in str(timeline)
    assert [t for t in range(9) if RewindSchedule(0.2, shape="linear").resolve(Horizon(9, 3)).due(t)] == [0]
    with pytest.raises(ConfigurationError, match="`rewind` is optimizer step 9, but a round has 9"):
        RewindSchedule(0.2, shape="linear", rewind=3).resolve(Horizon(9, 3))
    assert RewindSchedule(0.2, shape="linear", rewind=3).resolve(Horizon(1, 1), clamp=True).due(0)


def test_a_copy_holds_parameters_and_saved_buffers_each_once() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    net[2].weight = net[0].weight
    net.register_buffer("scratch", torch.ones(1), persistent=False)
    copy = take_copy(net)
    assert set(copy) == {"0.weight", "0.bias", "1.weight", "1.bias", "2.bias"} | {
        f"1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    net(torch.randn(8, 3))
    assert int(net[1].num_batches_tracked) == 1
    put_back(net, copy)
    assert int(net[1].num_batches_tracked) == 0
    with pytest.raises(ConfigurationError, match=r"'0.weight' of shape \(3, 3\), the module \(4, 3\)"):
        put_back(nn.Sequential(nn.Linear(3, 4)), copy)


def test_new_values_are_the_old_ones_in_another_order() -> None:
    copy = {"a": torch.arange(50.0).reshape(5, 10), "b": torch.arange(50.0).reshape(5, 10)}
    mixed, other = shuffled(copy, 3, 1), shuffled(copy, 3, 2)
    for key in copy:
        assert torch.equal(mixed[key].flatten().sort().values, copy[key].flatten())
    assert not torch.equal(mixed["a"], mixed["b"])
    assert not torch.equal(mixed["a"], other["a"])
    assert torch.equal(mixed["a"], shuffled(copy, 3, 1)["a"])


# --- rounds


class Net(LightningModule):
    """Two layers with batch norm and dropout between, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Dropout(0.1)
        self.second, self.head = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(self.drop(F.relu(self.norm(self.first(x)))))))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 0.01, weight_decay=0.1)

    def train_dataloader(self) -> ResumableLoader:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(96, 12, generator=generator)
        return ResumableLoader(torch.utils.data.TensorDataset(x, x[:, :3].argmax(1)), batch_size=8, seed=1)


class Watch(Callback):
    """Keep what the module and its optimizer hold before the first batch, and after some number of batches."""

    def __init__(self, step: int = 0) -> None:
        self.step, self.begins, self.at_step, self.states = step, {}, {}, None

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        copied = {key: value.clone() for key, value in pl_module.state_dict().items()}
        if not self.begins:
            self.begins, self.states = copied, len(trainer.optimizers[0].state)
        if trainer.global_step == self.step:
            self.at_step = copied


def run(net: Net, ticket: LotteryTicket, watch: Watch | None = None, folder: Path | None = None, **kw: Any) -> Watch:
    watch = Watch() if watch is None else watch
    saver = [ModelCheckpoint(folder, filename="{step}", every_n_train_steps=5, save_top_k=-1)] if folder else []
    trainer = Trainer(
        callbacks=[ExactResume(), ticket, watch, *saver], enable_checkpointing=bool(folder), max_epochs=2, **QUIET
    )
    trainer.fit(net, **kw)
    return watch


def seeded() -> Net:
    seed_everything(0, verbose=False)
    return Net()


@pytest.mark.parametrize("rewind", [0, {"step": 3}, "25%", 1])
def test_each_round_begins_at_the_copy_with_fewer_weights(rewind: Any) -> None:
    step = {"0": 0, "1": 12, "25%": 6}.get(str(rewind), 3)
    net, ticket = seeded(), LotteryTicket(0.5, rewind=rewind, floor=0.0)
    first = run(net, ticket, Watch(step))
    assert first.at_step
    assert (net.first.weight != 0).all()
    zeros: dict[str, Tensor] = {}
    for round_ in (1, 2, 3):
        trained = {key: value.clone() for key, value in net.state_dict().items()}
        watch = run(net, ticket)
        assert watch.states == 0  # a new optimizer
        pruned = torch.cat([(watch.begins[f"{name}.weight"] == 0).flatten() for name in ("first", "second")])
        assert int(pruned.sum()) == 448 - round(448 * 0.5**round_)
        cut = torch.cat([trained[f"{name}.weight"].abs().flatten() for name in ("first", "second")])
        assert cut[pruned].max() <= cut[~pruned].min()
        for key, value in watch.begins.items():
            alive = value != 0 if key in ("first.weight", "second.weight") else torch.ones_like(value, dtype=torch.bool)
            assert torch.equal(value[alive], first.at_step[key][alive]), key
            if key in zeros:
                assert not (alive & zeros[key]).any()
            if key in ("first.weight", "second.weight"):
                zeros[key] = ~alive
                assert (net.get_parameter(key)[~alive] == 0).all()
        assert ticket.round == round_
        assert ticket.at_target
    assert [entry["round"] for entry in ticket.history if entry["step"] == 1] == [0, 1, 2, 3]
    assert ticket.history[-1]["sparsity"] == ticket.history[-1]["amount"] == 0.875


def test_without_reset_a_round_goes_on_from_trained_weights() -> None:
    net, ticket = seeded(), LotteryTicket(0.5, reset="none", scope="layer")
    run(net, ticket)
    trained = {key: value.clone() for key, value in net.state_dict().items()}
    begins = run(net, ticket).begins
    for key, value in begins.items():
        alive = value != 0
        assert torch.equal(value[alive], trained[key][alive])
    assert int((begins["first.weight"] == 0).sum()) == 96
    assert not any(key.startswith("copy:") for key in ticket.values())


def test_the_control_has_other_weights_of_the_same_distribution() -> None:
    net, ticket = seeded(), LotteryTicket(0.5, reset="random", scope="layer")
    initial = run(net, ticket).begins
    begins = run(net, ticket).begins
    alive = begins["first.weight"] != 0
    assert int(alive.sum()) == 96
    assert not torch.equal(begins["first.weight"][alive], initial["first.weight"][alive])
    known = set(initial["first.weight"].flatten().tolist())
    assert set(begins["first.weight"][alive].tolist()) <= known


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(("round_", "step"), [(0, 5), (0, 15), (1, 5), (1, 20), (2, 10)])
def test_a_round_that_was_cut_off_goes_on_exactly(round_: int, step: int, tmp_path: Path) -> None:
    net, ticket = seeded(), LotteryTicket(0.4, rewind={"step": 7})
    for number in range(3):
        seed_everything(number, verbose=False)
        run(net, ticket, folder=tmp_path / str(number))
    again, other = Net(), LotteryTicket(0.4, rewind={"step": 7})
    seed_everything(99, verbose=False)
    run(again, other, ckpt_path=tmp_path / str(round_) / f"step={step}.ckpt", weights_only=True)
    assert other.round == round_
    for number in range(round_ + 1, 3):
        seed_everything(number, verbose=False)
        run(again, other)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in net.state_dict().items())
    assert other.history == ticket.history
    values, expected = other.values(), ticket.values()
    assert values.keys() == expected.keys()
    assert all(torch.equal(value, values[key]) for key, value in expected.items())


def test_the_first_round_must_reach_the_point_to_rewind_to() -> None:
    net, ticket = seeded(), LotteryTicket(0.2, rewind={"step": 8})
    stopped = Trainer(
        max_epochs=2, limit_train_batches=12, callbacks=[ticket, Stop()], enable_checkpointing=False, **QUIET
    )
    stopped.fit(net)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(ConfigurationError, match="the first round ended before that and took no copy"):
        run(net, ticket)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


class Stop(Callback):
    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= 4


def test_a_point_after_the_round_is_refused_before_training() -> None:
    with pytest.raises(ConfigurationError, match="`rewind` is optimizer step 24, but a round has 24"):
        run(seeded(), LotteryTicket(rewind=2))


def test_too_many_rounds_are_refused() -> None:
    net, ticket = seeded(), LotteryTicket(0.9, floor=0.05)
    run(net, ticket)
    run(net, ticket)
    with pytest.raises(ConfigurationError, match=r"round 2 would leave 1.00% of the weights, but `floor` keeps 5.00%"):
        run(net, ticket)


def test_frozen_and_tied_weights_are_named_and_left_dense() -> None:
    net = seeded()
    net.second.requires_grad_(False)
    net.head.weight = nn.Parameter(net.first.weight[:3, :1].repeat(1, 16).detach())
    net.other = nn.Embedding(12, 16)
    net.first.weight = net.other.weight = nn.Parameter(torch.randn(16, 12))
    ticket = LotteryTicket(0.5, select=Select(types=("Linear",)))
    run(net, ticket)
    run(net, ticket)
    assert (net.second.weight != 0).all()
    assert (net.first.weight != 0).all()
    assert int((net.head.weight == 0).sum()) == 24
    assert "not pruned while frozen" in ticket.plan_text
    assert "tied with other.weight, which is not selected" in ticket.plan_text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fraction": 0}, "`fraction` must be a number above 0 to below 1, got 0"),
        ({"fraction": 20}, "got 20; 20 % is written 0.2"),
        ({"floor": 1.0}, "`floor` must be a number from 0 to below 1"),
        ({"reset": "rewnd"}, "`reset` is 'rewnd': did you mean 'rewind'"),
        ({"scope": "globl"}, "`scope` is 'globl'"),
        ({"rewind": "5"}, "`rewind` must be an epoch"),
        ({"rewind": "5%", "reset": "random"}, "`rewind` is '5%', but `reset` 'random' rewinds to no step"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        LotteryTicket(**arguments)


def test_it_is_no_way_to_compress_a_trained_model() -> None:
    with pytest.raises(ConfigurationError, match="LotteryTicket works only while a model trains: it prunes between"):
        compress(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), LotteryTicket())


def test_another_method_that_holds_masks_is_refused() -> None:
    trainer = Trainer(
        max_epochs=1, callbacks=[LotteryTicket(), IterativePruning(0.5)], enable_checkpointing=False, **QUIET
    )
    with pytest.raises(ConfigurationError, match="change the same weights; remove one of them"):
        trainer.fit(Net())


@pytest.mark.slow
def test_two_processes_prune_and_rewind_the_same(tmp_path: Path) -> None:
    worker = Path(__file__).with_name("lottery_ddp_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", worker, tmp_path]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    for reset, held in first.items():
        for part in ("state", "values"):
            for key, value in held[part].items():
                assert torch.equal(value, second[reset][part][key]), (reset, key)
        assert held["history"] == second[reset]["history"]
        assert int(held["values"]["round:"]) == 2
        zeros = sum(int((held["state"][f"net.{name}.weight"] == 0).sum()) for name in ("stem", "depthwise", "grouped"))
        assert zeros == round((1 - 0.6**2) * 176)


def test_a_trainer_that_is_at_its_end_trains_no_second_round() -> None:
    net, ticket = seeded(), LotteryTicket(0.5)
    trainer = Trainer(callbacks=[ticket], enable_checkpointing=False, max_epochs=1, **QUIET)
    trainer.fit(net)
    with pytest.raises(ConfigurationError, match="make a new Trainer for each round"):
        trainer.fit(net)
    assert ticket.round == 0
    run(net, ticket)
    assert ticket.round == 1
