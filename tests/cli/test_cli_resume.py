"""A run that is killed with SIGKILL and resumed ends exactly where the uninterrupted run ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]

RECIPE = """
# @package _global_
# Three stages, small, with dropout, augmentation, and checkpoints inside an epoch.
defaults:
  - override /trainer: quiet
  - override /callbacks/compress: [prune]

threads: 1
checkpoint: {every_n_steps: 4}
report: {latency: false}
trainer: {limit_val_batches: 2}
data:
  batch_size: 100
  augment: {_target_: lightning_compress.data.CropFlip, padding: 1, flip: false}
stages:
  train:
    trainer: {max_epochs: 2}
    callbacks: [killer]
  prune:
    trainer: {max_epochs: 2}
    optimizer: {_target_: torch.optim.SGD, lr: 0.05, momentum: 0.9}
    scheduler: {_target_: torch.optim.lr_scheduler.CosineAnnealingLR, T_max: 20, interval: step}
    callbacks: [prune, killer]
  tune:
    trainer: {max_epochs: 1}
    callbacks: [prune, killer]
callbacks:
  killer: {_target_: killer.Killer, victim: "${oc.env:VICTIM}"}
"""

KILLER = """
import os, signal
from pathlib import Path
from lightning.pytorch import Callback


class Killer(Callback):
    '''Kill this process after some batch of the process, once; the victim's name holds the number of that batch.'''

    batches = 0

    def __init__(self, victim: str):
        self.victim = Path(victim)

    def on_train_batch_end(self, *_):
        Killer.batches += 1
        if self.victim.exists() and Killer.batches == int(self.victim.read_text()):
            self.victim.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
"""


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "VICTIM": str(folder / "victim"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "lightning_compress", *words],
        cwd=folder,
        env=environment,
        text=True,
        capture_output=True,
    )


def prepare(folder: Path) -> None:
    (folder / "conf" / "recipes").mkdir(parents=True, exist_ok=True)
    (folder / "conf" / "recipes" / "three.yaml").write_text(RECIPE.lstrip())
    (folder / "killer.py").write_text(KILLER)


START = ("--config-dir=conf", "recipes=three", "hydra.run.dir=run")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    prepare(folder)
    done = command(folder, *START)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("batch", [3, 18, 24, 31, 43, 53])  # 12 batches an epoch: 24 + 24 + 12
def test_a_killed_run_resumes_bit_for_bit(batch: int, uninterrupted: Path, tmp_path: Path) -> None:
    prepare(tmp_path)
    (tmp_path / "victim").write_text(str(batch))
    killed = command(tmp_path, *START)
    assert killed.returncode == -9, killed.stderr
    run = tmp_path / "run"
    assert not (run / "compressed.safetensors").exists()
    assert not (run / "report.json").exists()

    resumed = command(tmp_path, "resume=run")
    assert resumed.returncode == 0, resumed.stderr
    expected = load_file(uninterrupted / "compressed.safetensors")
    for key, tensor in load_file(run / "compressed.safetensors").items():
        assert torch.equal(tensor, expected[key]), key
    whole, again = (json.loads((path / "report.json").read_text()) for path in (uninterrupted, run))
    assert again["history"] == whole["history"]
    assert {entry["stage"] for entry in again["history"]} == {"prune", "tune"}
    assert again["compressed"]["metrics"] == whole["compressed"]["metrics"]
    assert again["baseline"]["metrics"] == whole["baseline"]["metrics"]


@pytest.mark.slow
def test_masks_hold_while_a_later_stage_tunes(uninterrupted: Path) -> None:
    report = json.loads((uninterrupted / "report.json").read_text())
    tuned = [entry["amount"] for entry in report["history"] if entry["stage"] == "tune"]
    assert tuned
    assert min(tuned) >= 0.9
    zeros = 1 - report["compressed"]["nonzero_parameters"] / report["compressed"]["parameters"]
    assert zeros > 0.89


@pytest.mark.slow
def test_a_finished_run_resumes_to_the_same_report(uninterrupted: Path) -> None:
    before = json.loads((uninterrupted / "report.json").read_text())
    done = command(uninterrupted.parent, "resume=run")
    assert done.returncode == 0, done.stderr
    after = json.loads((uninterrupted / "report.json").read_text())
    assert {**after, "environment": None} == {**before, "environment": None}
