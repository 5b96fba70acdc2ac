"""Step by step: rounds of factorizing and training on, their resume, and what may follow them."""

from __future__ import annotations

import itertools
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_rows import Task, dataset
from killing import KILLER, command
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import nn

import lightning_compress as lc
from lightning_compress import ExactResume, LowRank, compress, journal_of
from lightning_compress.data import DigitsDataModule
from lightning_compress.low_rank.layers import Factorized
from lightning_compress.models import DigitsCNN, ImageClassifier

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
}


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def a_round(**more: Any) -> LowRank:
    """A step whose ranks depend on the weights and the data."""
    return LowRank(1.3, when="before", batches=[dataset()[:]], **more)


def fit(task: Any, *callbacks: Any, epochs: int = 1, **more: Any) -> Any:
    Trainer(max_epochs=epochs, callbacks=list(callbacks), enable_checkpointing=False, **QUIET).fit(task, **more)
    return task


def begun(seed: int = 0) -> Task:
    """A task after its first round."""
    torch.manual_seed(seed)
    return fit(Task("MLP"), a_round())


def test_rounds_make_smaller_factors_never_factors_of_factors() -> None:
    task = Task("MLP")
    sizes = [size(task)]
    for _ in range(3):
        sizes.append(size(fit(task, a_round())))
    assert all(later <= earlier / 1.3 for earlier, later in itertools.pairwise(sizes))
    parts = [layer for layer in task.modules() if isinstance(layer, Factorized)]
    assert parts
    assert not any(isinstance(part, Factorized) for layer in parts for part in layer.layers())


def test_rounds_after_fit_work_on_the_copy_of_the_last() -> None:
    module: Any = Task("MLP")
    sizes = [size(module)]
    for _ in range(3):
        method = LowRank(1.3)
        fit(module, method)
        module = method.compressed
        sizes.append(size(module))
    assert all(later <= earlier / 1.3 for earlier, later in itertools.pairwise(sizes))


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_second_round_resumes_bit_for_bit_also_on_a_bare_model(tmp_path: Path) -> None:
    def run(task: Task, folder: Path, **more: Any) -> Task:
        saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        Trainer(max_epochs=2, callbacks=[ExactResume(), a_round(), saver], default_root_dir=folder, **QUIET).fit(
            task, **more
        )
        return task

    whole = run(begun(), tmp_path / "whole")
    place = str(tmp_path / "whole" / "step=6.ckpt")
    torch.manual_seed(9)
    for task in (begun(), Task("MLP")):
        resumed = run(task, tmp_path / "again", ckpt_path=place, weights_only=True)
        assert [str(edit) for edit in journal_of(resumed)] == [str(edit) for edit in journal_of(whole)]
        expected = whole.state_dict()
        assert resumed.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in resumed.state_dict().items())


def test_rounds_are_followed_by_pruning_quantization_and_distillation(tmp_path: Path) -> None:
    task = fit(begun(), a_round())
    fit(task, lc.IterativePruning(0.5))
    zeros = sum(int((parameter == 0).sum()) for parameter in task.parameters())
    assert zeros > 0.3 * size(task)
    fit(task, lc.Distillation(teacher=Task("MLP")))
    fit(task, lc.QuantizationAwareTraining(8, 8))
    lc.save_compressed(task, tmp_path / "m.safetensors")
    again = lc.load_compressed(Task("MLP"), tmp_path / "m.safetensors")
    images = dataset().tensors[0]
    assert torch.equal(again.eval()(images), task.eval()(images))


def test_quantized_factors_are_named_and_left() -> None:
    task = fit(begun(), lc.QuantizationAwareTraining(8, 8))
    with pytest.raises(lc.SelectionError, match="no layer of Task can be factorized"):
        compress(task, LowRank(1.2))


@pytest.mark.slow
def test_digits_in_rounds_from_a_plain_trainer() -> None:
    torch.manual_seed(0)
    data, module = DigitsDataModule(), ImageClassifier(DigitsCNN())
    fit(module, epochs=8, datamodule=data)
    before = size(module)
    for _ in range(3):
        fit(module, LowRank(1.7, factors={"favor": "accuracy"}, when="before", batches=data), epochs=4, datamodule=data)
    assert size(module) <= before / 4.9
    images, labels = (torch.cat(parts) for parts in zip(*data.test_dataloader(), strict=True))
    with torch.no_grad():
        assert (module.eval()(images).argmax(1) == labels).float().mean() > 0.95


RECIPE = """
# @package _global_
# Two rounds of factorizing and training on, with checkpoints inside an epoch.
defaults:
  - override /trainer: quiet
  - override /callbacks/compress: [low_rank]
threads: 1
checkpoint: {every_n_steps: 4}
report: {latency: false}
trainer: {max_epochs: 1, limit_train_batches: 6, limit_val_batches: 1, limit_test_batches: 1}
data: {batch_size: 100}
stages:
  train: {callbacks: [killer]}
  compress: {rounds: 2, callbacks: [low_rank, killer]}
callbacks:
  killer: {_target_: killer.Killer}
  low_rank: {compression_rate: 1.7, when: before}
"""


def start(folder: Path) -> subprocess.CompletedProcess[str]:
    recipes = folder / "conf" / "recipes"
    recipes.mkdir(parents=True)
    (recipes / "rounds.yaml").write_text(RECIPE.lstrip())
    (folder / "killer.py").write_text(KILLER)
    return command(folder, "--config-dir=conf", "recipes=rounds", "hydra.run.dir=run")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    done = start(folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.mark.slow
def test_one_command_compresses_in_rounds(uninterrupted: Path) -> None:
    report = json.loads((uninterrupted / "report.json").read_text())
    assert report["compressed"]["parameters"] <= report["baseline"]["parameters"] / 1.7**2
    assert [entry["stage"] for entry in report["history"]] == ["compress-1", "compress-2"]


@pytest.mark.slow
@pytest.mark.parametrize("batch", [8, 11, 17])  # 6 batches a fit
def test_a_round_that_was_killed_goes_on_bit_for_bit(batch: int, uninterrupted: Path, tmp_path: Path) -> None:
    (tmp_path / "victim").write_text(str(batch))
    assert start(tmp_path).returncode == -9
    resumed = command(tmp_path, "resume=run")
    assert resumed.returncode == 0, resumed.stderr
    expected = load_file(uninterrupted / "compressed.safetensors")
    found = load_file(tmp_path / "run" / "compressed.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
