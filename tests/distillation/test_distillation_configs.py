"""Every file in conf/distill builds, and a recipe says `teacher: baseline` in one line."""

from __future__ import annotations

import json
from pathlib import Path

import hydra
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from lightning_compress import Distillation
from lightning_compress.cli import main
from lightning_compress.distillation import ModuleTeacher, Term

CONF = Path(__file__).resolve().parents[2] / "conf"
NAMES = sorted(path.stem for path in (CONF / "distill").glob("*.yaml"))
RECIPE = """# @package _global_
# A short run that prunes under the dense network as teacher
defaults:
  - override /callbacks/compress: [distill, prune]

stages:
  train: {trainer: {max_epochs: 1}}
  prune: {trainer: {max_epochs: 2}, callbacks: [distill, prune]}
  finetune: {trainer: {max_epochs: 1}, callbacks: [distill, prune]}

callbacks:
  distill: {teacher: baseline}
"""


def compose(*words: str) -> Distillation:
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose(overrides=["+callbacks/compress=[distill]", *words])
    return hydra.utils.instantiate(config.callbacks.distill)


def test_no_config_is_forgotten() -> None:
    assert set(NAMES) == {
        *("attention", "decoupled", "hints", "logits", "relational", "similarity", "soft_targets"),
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_choice_of_losses_builds(name: str) -> None:
    text = (CONF / "distill" / f"{name}.yaml").read_text(encoding="utf-8")
    key = text.split("\n")[1].removesuffix(":")
    words = [f"distill@callbacks.distill.losses={name}"]
    words += [f"callbacks.distill.losses.{key}.pairs='layer*'"] if "???" in text else []
    callback = compose(*words)
    ((found, term),) = callback.distiller.terms.items()
    assert found == key
    assert isinstance(term, Term)


def test_several_losses_and_a_teacher_from_a_file(tmp_path: Path) -> None:
    net = torch.nn.Linear(2, 3)
    torch.save(net.state_dict(), tmp_path / "teacher.pt")
    callback = compose(
        "distill@callbacks.distill.losses=[soft_targets,hints]",
        "callbacks.distill.losses.hint.pairs={net.layer1: layer1}",
        "callbacks.distill.teacher={_target_: lightning_compress.distillation.load_teacher, "
        f"path: {tmp_path}/teacher.pt, "
        "model: {_target_: torch.nn.Linear, in_features: 2, out_features: 3}}",
    )
    assert list(callback.distiller.terms) == ["kd", "hint"]
    assert callback.distiller.terms["hint"].pairs == {"net.layer1": "layer1"}
    assert isinstance(callback.teacher, ModuleTeacher)
    assert torch.equal(callback.teacher.module.weight, net.weight)


def run(folder: Path, *words: str) -> int:
    (folder / "recipes").mkdir(exist_ok=True)
    (folder / "recipes" / "own.yaml").write_text(RECIPE, encoding="utf-8")
    few = [f"trainer.limit_{part}_batches=3" for part in ("train", "val", "test")]
    common = ["trainer=quiet", "report.latency=false", "threads=1", "data=digits", *few]
    return main(["--config-dir", str(folder), "recipes=own", f"hydra.run.dir={folder}/run", *common, *words])


def test_a_recipe_prunes_under_its_own_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))
    assert report["compression_rate"] > 1.5
    assert (tmp_path / "run" / "compressed.safetensors").is_file()
    assert run(tmp_path, "task=plan") == 0
    assert "kd" in capsys.readouterr().out


def test_a_teacher_that_no_stage_names_is_not_idle_in_silence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "stages.prune.callbacks=[prune]", "stages.finetune.callbacks=[prune]", "task=plan") == 0
    shown = capsys.readouterr()
    assert "callbacks.distill takes part in no stage and does nothing" in shown.out + shown.err
    assert "callbacks.prune takes part in no stage" not in shown.out + shown.err


def test_a_baseline_before_there_is_one_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "+stages.train.callbacks=[distill]") != 0
    assert "`callbacks.distill.teacher` is 'baseline', but stage 'train' runs before" in capsys.readouterr().err
