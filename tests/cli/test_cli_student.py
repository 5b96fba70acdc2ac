"""A stage may begin with another module, the student of the baseline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lightning_compress import load_compressed
from lightning_compress.cli import main
from lightning_compress.models import DigitsCNN, ImageClassifier

RECIPE = """# @package _global_
# A narrow network learns from a wide one
defaults:
  - override /callbacks/compress: [distill]

stages:
  train: {trainer: {max_epochs: 1}}
  distill:
    student:
      _target_: lightning_compress.models.ImageClassifier
      net: {_target_: lightning_compress.models.DigitsCNN, width: 4}
    trainer: {max_epochs: 1}
    callbacks: [distill]
  finetune: {trainer: {max_epochs: 1}}
"""


def run(folder: Path, *words: str) -> int:
    (folder / "recipes").mkdir(exist_ok=True)
    (folder / "recipes" / "own.yaml").write_text(RECIPE, encoding="utf-8")
    few = [f"trainer.limit_{part}_batches=2" for part in ("train", "val", "test")]
    common = ["trainer=quiet", "report.latency=false", "threads=1", "data=digits", *few]
    return main(["--config-dir", str(folder), "recipes=own", f"hydra.run.dir={folder}/run", *common, *words])


def test_the_student_goes_on_and_the_teacher_is_the_baseline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "task=plan") == 0
    assert "teacher ImageClassifier" in capsys.readouterr().out
    assert run(tmp_path) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))
    assert report["baseline"]["parameters"] == 151_306
    student = load_compressed(ImageClassifier(DigitsCNN(width=4)), tmp_path / "run" / "compressed.safetensors")
    assert report["compressed"]["parameters"] == sum(parameter.numel() for parameter in student.parameters())
    assert report["compression_rate"] > 20
    (tmp_path / "run" / "compressed.safetensors").rename(tmp_path / "first.safetensors")
    state = json.loads((tmp_path / "run" / "state.json").read_text(encoding="utf-8"))
    for done in (2, 1):  # as if killed in the last stage, and in the one with the student
        state["completed"] = state["completed"][:done]
        (tmp_path / "run" / "state.json").write_text(json.dumps(state), encoding="utf-8")
        assert main([f"resume={tmp_path}/run"]) == 0
        again = load_compressed(ImageClassifier(DigitsCNN(width=4)), tmp_path / "run" / "compressed.safetensors")
        assert all(torch.equal(value, again.state_dict()[key]) for key, value in student.state_dict().items())


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (
            ["+stages.train.student={_target_: torch.nn.Identity}"],
            "comes before there is a baseline to compare it with",
        ),
        (["+stages.distill.fresh=true"], "`stages.distill.student` begins a single fit with another module"),
        (
            ["stages.distill.student={_target_: torch.nn.Identity}"],
            "`stages.distill.student._target_` must build a Light",
        ),
        (["stages.distill.student=resnet"], "`stages.distill.student` must be a mapping with a `_target_`"),
    ],
)
def test_students_that_mean_nothing_are_refused(
    words: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, *words) != 0
    assert reason in capsys.readouterr().err
