"""Stages with rounds, and stages that begin anew: lottery tickets and sparse training from one command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import KILLER, command
from safetensors.torch import load_file

from lightning_compress.run.folder import RunFolder

LOTTERY = """
# @package _global_
# Three rounds of two epochs, with checkpoints inside an epoch.
defaults:
  - override /trainer: quiet
  - override /callbacks/compress: [lottery]
threads: 1
checkpoint: {every_n_steps: 4}
report: {latency: false}
trainer: {limit_train_batches: 6, limit_val_batches: 1, limit_test_batches: 1}
data:
  batch_size: 100
  augment: {_target_: lightning_compress.data.CropFlip, padding: 1, flip: false}
stages:
  search:
    rounds: 3
    trainer: {max_epochs: 2}
    optimizer: {_target_: torch.optim.SGD, lr: 0.05, momentum: 0.9}
    callbacks: [lottery]
callbacks:
  lottery: {fraction: 0.5, rewind: {step: 3}}
"""


SPARSE = """
# @package _global_
# A dense network, then one that is sparse from its first step on.
defaults:
  - override /trainer: quiet
  - override /callbacks/compress: [set]
threads: 1
report: {latency: false}
trainer: {max_epochs: 1, limit_train_batches: 4, limit_val_batches: 1, limit_test_batches: 1}
stages:
  train: {}
  sparse: {fresh: true, callbacks: [set]}
"""


def write(text: str, name: str) -> tuple[str, ...]:
    folder = Path("conf") / "recipes"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.yaml").write_text(text.lstrip())
    return "--config-dir=conf", f"recipes={name}", "hydra.run.dir=run"


def test_zeros_that_a_later_stage_loses_are_told(run: Any) -> None:
    stages = "  train: {}\n  cut: {apply: [prune]}\n  tune: {}\n"
    text = SPARSE.replace("[set]", "[prune]", 1).replace(
        "  train: {}\n  sparse: {fresh: true, callbacks: [set]}\n", stages
    )
    done = run(*write(text, "lost"), "hydra.job_logging.root.level=WARNING")
    assert done.code == 0, done.err
    assert "stage tune: zeros fell from 8" in done.out + done.err
    assert "stage train: zeros fell" not in done.out + done.err


def test_rounds_of_one_stage_prune_and_rewind(run: Any) -> None:
    done = run(*write(LOTTERY, "lottery"))
    assert done.code == 0, done.err
    report = json.loads(Path("run/report.json").read_text())
    first = [entry for entry in report["history"] if entry["step"] == 1]
    assert [(entry["stage"], entry["round"]) for entry in first] == [("search-1", 0), ("search-2", 1), ("search-3", 2)]
    assert [entry["sparsity"] for entry in first] == pytest.approx([0, 0.5, 0.75], abs=1e-4)
    assert report["baseline"]["nonzero_parameters"] > 0.99 * report["baseline"]["parameters"]
    assert report["compressed"]["nonzero_parameters"] < 0.3 * report["compressed"]["parameters"]
    results = [RunFolder(Path("run")).result(f"search-{number}") for number in (1, 2, 3)]
    copies = [
        {k: v for k, v in one["carried"]["lottery"]["values"].items() if k.startswith("copy:")} for one in results
    ]
    assert copies[0]
    for copy in copies[1:]:
        assert all(torch.equal(value, copy[key]) for key, value in copies[0].items())


def test_the_plan_shows_the_first_round(run: Any) -> None:
    done = run(*write(LOTTERY, "lottery"), "task=plan")
    assert done.code == 0, done.err
    assert done.out.count("stage search, 3 rounds of which this is the first") == 1
    assert "a copy is taken at step 3" in done.out


def test_a_fresh_stage_begins_with_new_weights(run: Any) -> None:
    done = run(*write(SPARSE, "sparse"))
    assert done.code == 0, done.err
    report = json.loads(Path("run/report.json").read_text())
    assert {entry["stage"] for entry in report["history"]} == {"sparse"}
    assert report["compressed"]["nonzero_parameters"] < 0.2 * report["compressed"]["parameters"]
    dense, sparse = (RunFolder(Path("run")).result(name)["module"] for name in ("train", "sparse"))
    weight = next(key for key, value in sparse.items() if value.dim() == 2 and key.endswith("weight"))
    alive = sparse[weight] != 0
    assert not torch.allclose(dense[weight][alive], sparse[weight][alive], atol=1e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("stages.search.rounds=0",), "`stages.search.rounds` must be a whole number of at least 1"),
        (("+stages.search.fresh=true",), "`stages.search.fresh` must be true or false, and true only for a single fit"),
        (("+stages.search-2={}",), "`stages.search-2` has the name of a round of another stage"),
        (("+stages.end={apply: [lottery]}",), "`stages.end.apply` names 'lottery', a LotteryTicket, which works only"),
        (("callbacks.lottery.rewind={step: 12}",), "`rewind` is optimizer step 12, but a round has 12"),
        (("baseline_after=search-1",), "`baseline_after` must be a stage, got 'search-1'"),
    ],
)
def test_mistakes_are_one_line(words: tuple[str, ...], message: str, run: Any) -> None:
    done = run(*write(LOTTERY, "lottery"), *words)
    assert done.code != 0
    assert message in done.err
    assert not Path("run/checkpoints").exists() or not list(Path("run/checkpoints").glob("*.pt"))


def prepare(folder: Path) -> None:
    recipes = folder / "conf" / "recipes"
    recipes.mkdir(parents=True, exist_ok=True)
    recipe = LOTTERY.lstrip().replace("    callbacks: [lottery]", "    callbacks: [lottery, killer]")
    (recipes / "lottery.yaml").write_text(recipe + "  killer: {_target_: killer.Killer}\n")
    (folder / "killer.py").write_text(KILLER)


START = ("--config-dir=conf", "recipes=lottery", "hydra.run.dir=run")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    prepare(folder)
    done = command(folder, *START)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("batch", [2, 18, 31])  # 12 batches a round
def test_a_round_that_was_killed_goes_on_bit_for_bit(batch: int, uninterrupted: Path, tmp_path: Path) -> None:
    prepare(tmp_path)
    (tmp_path / "victim").write_text(str(batch))
    assert command(tmp_path, *START).returncode == -9
    resumed = command(tmp_path, "resume=run")
    assert resumed.returncode == 0, resumed.stderr
    expected = load_file(uninterrupted / "compressed.safetensors")
    for key, tensor in load_file(tmp_path / "run" / "compressed.safetensors").items():
        assert torch.equal(tensor, expected[key]), key
    whole, again = (json.loads((folder / "report.json").read_text()) for folder in (uninterrupted, tmp_path / "run"))
    assert whole["history"] == again["history"]
    assert whole["baseline"]["metrics"] == again["baseline"]["metrics"]
