"""A latency goal: the search with a known or noisy clock, what is recorded, resume, and a real measurement."""

from __future__ import annotations

import copy
import itertools
import pickle
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import lightning_compress as lc
from lightning_compress import ConfigurationError, Schedule, StructuredPruning
from lightning_compress.core.hooks import journal_of
from lightning_compress.core.latency import LatencyGoal, as_goal, batch_of, relative, time_models
from lightning_compress.pruning.structured.latency_search import LatencySearch

X = torch.zeros(4, 8)


def mlp(width: int = 64) -> nn.Sequential:
    layers = [nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 3))


def fake_clock(monkeypatch: pytest.MonkeyPatch, noise: float = 0.0, tile: int = 1) -> list[int]:
    """Let a model take a fixed part and its operations' time, with widths rounded up to tiles; count measurements."""
    calls: list[int] = []
    drawn = random.Random(0)

    def measure(self: LatencySearch, models: Sequence[nn.Module], seconds: float) -> list[list[float]]:
        calls.append(len(models))

        def cost(model: nn.Module) -> float:
            sizes = [m.weight.shape for m in model.modules() if isinstance(m, nn.Linear)]
            return 1.0 + sum(-(-a // tile) * tile * -(-b // tile) * tile for a, b in sizes) / 2000

        return [[cost(m) * (1 + noise * abs(drawn.gauss(0, 1))) for _ in range(9)] for m in models]

    monkeypatch.setattr(LatencySearch, "measure", measure)
    return calls


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_a_share_is_met_with_as_much_as_possible_left(monkeypatch: pytest.MonkeyPatch, noise: float) -> None:
    torch.manual_seed(0)
    calls = fake_clock(monkeypatch, noise)
    callback = StructuredPruning(latency={"share": 0.6, "batch": 1}, ranking={"scope": "layer"})
    cut = lc.compress(mlp(), callback, example_inputs=X)
    true = 1.0 + sum(m.weight.numel() for m in cut.modules() if isinstance(m, nn.Linear)) / 2000
    whole = 1.0 + (8 * 64 + 2 * 64 * 64 + 64 * 3) / 2000
    assert 0.5 < true / whole <= (0.6 if noise == 0 else 0.63)
    assert len(calls) <= 16
    (first, *_) = journal_of(cut).edits
    measured = first.config["measured"]
    assert measured["met"] is True
    assert measured["batch"] == measured["threads"] == 1
    assert measured["latency_ms"][1] <= 0.6 * measured["latency_ms"][0]
    if noise == 0:
        assert measured["latency_ms"] == pytest.approx([whole, true], abs=1e-3)
        assert callback.history[0]["latency"] == pytest.approx(true / whole)


@pytest.mark.parametrize(("tile", "expected"), [(1, 1), (16, 16), (8, 8)])
def test_multiples_are_used_where_they_are_faster(monkeypatch: pytest.MonkeyPatch, tile: int, expected: int) -> None:
    torch.manual_seed(0)
    fake_clock(monkeypatch, tile=tile)
    callback = StructuredPruning(latency=0.55)
    cut = lc.compress(mlp(72), callback, example_inputs=X)
    widths = [m.out_features for m in list(cut.modules())[:-1] if isinstance(m, nn.Linear)]
    chosen = callback.compressed or cut
    record = journal_of(chosen).edits[0].config["measured"]
    assert record["round_to"] == expected
    assert expected == 1 or all(width % expected == 0 or width == 72 for width in widths)


def test_milliseconds_and_what_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    fake_clock(monkeypatch)  # 5.45 ms now
    callback = StructuredPruning(latency={"ms": 3.0})
    lc.compress(mlp(), callback, example_inputs=X)
    record = callback._search.record()
    assert record["latency_ms"][1] <= 3.0
    assert callback.plan({})[-1].action.startswith("5.45 ms before, ")
    with pytest.raises(ConfigurationError, match=r"`latency` asks for 0.9 ms at batch 1, 1 thread; .* at least 1"):
        lc.compress(mlp(), StructuredPruning(latency={"ms": 0.9}), example_inputs=X)
    fast = StructuredPruning(latency={"ms": 50.0})
    assert lc.compress(mlp(), fast, example_inputs=X)[0].out_features == 64
    assert fast.history[0]["latency"] == 1.0


def test_a_busy_machine_does_not_end_the_search_far_below_the_goal(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    fake_clock(monkeypatch)
    late = itertools.count(step=1000.0)  # each measurement takes longer than the whole search may
    monkeypatch.setattr("lightning_compress.pruning.structured.latency_search.clock_for", lambda *_: lambda: next(late))
    callback = StructuredPruning(latency=0.6)
    lc.compress(mlp(), callback, example_inputs=X)
    assert 0.5 < callback.history[0]["latency"] <= 0.6


def test_a_machine_that_slows_down_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_clock(monkeypatch)
    honest = LatencySearch.measure

    def slower(self: LatencySearch, models: Sequence[nn.Module], seconds: float) -> list[list[float]]:
        before, *after = honest(self, models, seconds)
        return [before, *([[t * len(calls) for t in times] for times in after] if len(calls) > 1 else after)]

    monkeypatch.setattr(LatencySearch, "measure", slower)
    callback = StructuredPruning(latency=0.5)
    with pytest.warns(UserWarning, match=r"which is missed; is the machine busy\?"):
        lc.compress(mlp(), callback, example_inputs=X)
    assert callback._search.record()["met"] is False


class Task(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        generator = torch.Generator().manual_seed(0)
        data = torch.utils.data.TensorDataset(torch.rand(48, 8, generator=generator), torch.arange(48) % 3)
        return torch.utils.data.DataLoader(data, batch_size=8)


def fit(folder: Path, seed: int, ckpt_path: str | None = None) -> tuple[StructuredPruning, nn.Module]:
    torch.manual_seed(seed)
    callback = StructuredPruning(Schedule(1.0, start={"step": 2}, end={"step": 8}, every={"step": 2}), latency=0.7)
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=6, save_top_k=-1)
    trainer = Trainer(
        max_epochs=2, callbacks=[callback, saver], logger=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(Task(), ckpt_path=ckpt_path)
    return callback, callback.compressed


def test_widths_are_decided_once_and_a_resume_does_not_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_clock(monkeypatch)
    whole, expected = fit(tmp_path, 0)
    count = len(calls)
    shares = [entry["channels"] for entry in whole.history]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == 1.0
    assert whole.history[-1]["latency"] <= 0.7
    assert "now 2.2 ms, at least" in whole.plan_text  # printed before training
    assert count > 2

    def forbidden(*args: Any) -> None:
        raise AssertionError("a resume measured")

    monkeypatch.setattr(LatencySearch, "measure", forbidden)
    resumed, got = fit(tmp_path, 7, str(tmp_path / "step=6.ckpt"))
    assert resumed.history == whole.history
    assert all(
        torch.equal(a, b) for a, b in zip(expected.state_dict().values(), got.state_dict().values(), strict=True)
    )
    assert journal_of(got) == journal_of(expected)
    for other in (copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):
        assert other._search.widths == whole._search.widths


@pytest.mark.filterwarnings("ignore:.*which is missed; is the machine busy")
def test_a_real_measurement_is_bounded_in_time_and_roughly_right() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 8))
    start = time.monotonic()
    callback = StructuredPruning(latency={"share": 0.5, "batch": 32, "seconds": 2.0}, ranking={"scope": "layer"})
    cut = lc.compress(net, callback, example_inputs=torch.zeros(2, 64))
    assert time.monotonic() - start < 30  # twice the time that was allowed, and what a busy machine takes
    assert cut[2].in_features < 900
    times = time_models([net, cut], torch.rand(32, 64), 1, 1.0)
    assert relative(times[1], times[0]) < 0.75


def test_batches_keep_their_layout() -> None:
    images = torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last)
    resized = batch_of({"x": images, "n": torch.tensor(3)}, 5)
    assert resized["x"].shape == (5, 3, 4, 4)
    assert resized["x"].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(resized["x"][4], images[0])
    assert int(resized["n"]) == 3
    assert batch_of(images, 1).shape[0] == 1
    assert batch_of(images, None) is images


@pytest.mark.parametrize(
    ("latency", "named"),
    [
        ({"batch": 1}, "one of `ms` and `share`"),
        ({"ms": 1.0, "share": 0.5}, "one of `ms` and `share`"),
        ({"ms": -1.0}, "`ms` of `latency`"),
        (1.5, "`share` of `latency`"),
        ({"share": 0.5, "batch": 0}, "`batch` of `latency`"),
        ({"milliseconds": 5}, "`latency` has no key 'milliseconds'"),
        ("fast", "`latency` must be"),
    ],
)
def test_bad_goals_are_named(latency: Any, named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        StructuredPruning(latency=latency)
    assert str(as_goal({"ms": 5})) == "5 ms at batch 1, 1 thread"
    assert str(LatencyGoal(share=0.5, batch=None, threads=2)) == "0.5 of the latency at the example inputs, 2 threads"
