"""What the command leaves behind, and what its tasks do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from lightning_compress import inspect_compressed, load_compressed
from lightning_compress.models import DigitsCNN, ImageClassifier
from lightning_compress.run.shipped import groups, recipe_files, summary


def test_a_run_leaves_report_artifact_and_configuration(tiny: Callable[..., Any]) -> None:
    result = tiny("seed=3")
    assert result.code == 0, result.err
    report = json.loads(Path("run/report.json").read_text())
    assert (report["recipe"], report["seed"]) == ("tiny", 3)
    assert report["compressed"]["artifact_bytes"] == Path("run/compressed.safetensors").stat().st_size
    assert report["baseline"]["metrics"].keys() == {"accuracy", "loss"}
    assert {entry["stage"] for entry in report["history"]} == {"prune"}
    for name in ("report.md", "report.html", "checkpoints/train.pt", "checkpoints/prune.pt", "state.json"):
        assert Path("run", name).is_file()
    assert not list(Path("run").rglob(".*.part"))
    config = OmegaConf.load("run/config.yaml")
    assert (config.recipe, config.seed, config.data.seed) == ("tiny", 3, 3)
    assert "report.html" in result.out


def test_the_artifact_loads_on_the_bare_architecture(tiny: Callable[..., Any]) -> None:
    assert tiny().code == 0
    module = load_compressed(ImageClassifier(DigitsCNN()), "run/compressed.safetensors")
    pruned = [module.net.conv1.weight, module.net.conv2.weight, module.net.fc1.weight]
    total = sum(weight.numel() for weight in pruned)
    assert sum(int((weight == 0).sum()) for weight in pruned) == round(0.9 * total)
    provenance = inspect_compressed("run/compressed.safetensors").provenance
    assert (provenance["recipe"], provenance["seed"]) == ("tiny", 0)


def test_the_same_seed_gives_the_same_file(tiny: Callable[..., Any]) -> None:
    start = ("--config-dir=conf", "recipes=tiny")
    for name in ("a", "b"):
        assert tiny(f"hydra.run.dir={name}", recipe=start).code == 0
    assert Path("a/compressed.safetensors").read_bytes() == Path("b/compressed.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["lightning", "plain", "artifact", "network"])
def test_a_checkpoint_replaces_the_baseline(kind: str, tiny: Callable[..., Any]) -> None:
    assert tiny().code == 0
    report = json.loads(Path("run/report.json").read_text())
    if kind == "artifact":
        path, expected = "run/compressed.safetensors", report["compressed"]
    elif kind == "lightning":
        (found,) = Path("run/checkpoints/train").glob("*.ckpt")
        path, expected = str(found), report["baseline"]
    else:
        tensors = torch.load("run/checkpoints/train.pt", weights_only=True)["module"]
        if kind == "network":
            tensors = {key.removeprefix("net."): value for key, value in tensors.items()}
        path, expected = "weights.pt", report["baseline"]
        torch.save(tensors, path)
    start = ("--config-dir=conf", "recipes=tiny", "hydra.run.dir=second")
    assert tiny(f"'model.checkpoint={path}'".strip("'").replace("epoch=", "epoch\\="), recipe=start).code == 0
    second = json.loads(Path("second/report.json").read_text())
    assert second["baseline"]["metrics"] == expected["metrics"]
    assert not Path("second/checkpoints/train.pt").exists()


def test_evaluate_measures_a_file(tiny: Callable[..., Any]) -> None:
    assert tiny().code == 0
    first = json.loads(Path("run/report.json").read_text())
    start = ("--config-dir=conf", "recipes=tiny", "hydra.run.dir=second")
    result = tiny("task=evaluate", "model.checkpoint=run/compressed.safetensors", recipe=start)
    assert result.code == 0, result.err
    second = json.loads(Path("second/report.json").read_text())
    assert second["compressed"]["metrics"] == first["compressed"]["metrics"]
    assert second["compressed"]["artifact_bytes"] == first["compressed"]["artifact_bytes"]
    assert second["baseline"]["metrics"] is None


def test_plan_shows_layers_and_trains_nothing(tiny: Callable[..., Any]) -> None:
    result = tiny("task=plan")
    assert result.code == 0, result.err
    assert "net.fc1.weight" in result.out
    assert "stage prune" in result.out
    assert not Path("run/checkpoints").exists()


def test_a_sweep_ends_in_one_table(run: Callable[..., Any]) -> None:
    amounts = ("0.5", "0.9", "7")
    result = run(
        *("-m", "--config-dir=conf", "recipes=tiny", "hydra.sweep.dir=sweep"),
        "callbacks.prune.schedule.final=" + ",".join(amounts),
    )
    assert result.code == 2, "one job is out of range"
    assert "error in job" in result.err
    jobs = json.loads(Path("sweep/sweep.json").read_text())["jobs"]
    assert [job["failed"] for job in jobs] == [False, False, True]
    assert [job["overrides"][-1] for job in jobs] == [f"callbacks.prune.schedule.final={amount}" for amount in amounts]
    assert jobs[0]["sparsity"] < jobs[1]["sparsity"]
    assert jobs[0]["compression_rate"] < jobs[1]["compression_rate"]
    assert "failed" in result.out


def test_help_lists_every_recipe_and_group(run: Callable[..., Any]) -> None:
    result = run("--help")
    assert result.code == 0
    for name, path in recipe_files().items():
        assert f"{name} " in result.out
        assert summary(path) in result.out
    for name in groups():
        assert name in result.out


def test_a_second_run_in_one_folder_starts_anew(tiny: Callable[..., Any]) -> None:
    assert tiny().code == 0
    assert tiny("callbacks.prune.select.include=[nothing]").code == 2
    assert not Path("run/compressed.safetensors").exists(), "what lies there would not be this run's"


def test_a_stage_can_apply_a_method_without_training(tiny: Callable[..., Any]) -> None:
    assert tiny("~stages.prune", "+stages.cut.apply=[prune]").code == 0
    report = json.loads(Path("run/report.json").read_text())
    by_name = {layer["name"]: layer for layer in report["layers"]}
    cut = [by_name[f"net.{name}"] for name in ("conv1", "conv2", "fc1")]
    biases = 32 + 64 + 128
    weights = sum(layer["parameters"][1] for layer in cut) - biases
    assert sum(layer["nonzero"][1] for layer in cut) - biases == weights - round(0.9 * weights)
    assert [entry["stage"] for entry in report["history"]] == ["cut"]


def test_an_interrupted_run_says_how_to_go_on(tiny: Callable[..., Any]) -> None:
    Path("stopping.py").write_text(
        "from lightning.pytorch import Callback\n"
        "class Stop(Callback):\n"
        "    def on_train_batch_end(self, *_):\n"
        "        raise KeyboardInterrupt\n"
    )
    result = tiny("+callbacks.stop._target_=stopping.Stop", "+stages.train.callbacks=[stop]")
    assert result.code == 130
    assert f"resume={Path('run').absolute()}" in result.out + result.err


USER_CODE = """
import torch
from lightning import LightningDataModule, LightningModule
from torch.utils.data import DataLoader, TensorDataset


class Module(LightningModule):
    def __init__(self, width: int = 4):
        super().__init__()
        self.first, self.second = torch.nn.Linear(3, width), torch.nn.Linear(width, 2)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))

    def training_step(self, batch, index):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch, index):
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(LightningDataModule):
    def loader(self):
        x = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=8)

    train_dataloader = test_dataloader = loader
"""


def test_modules_of_the_user_in_the_current_folder(tiny: Callable[..., Any]) -> None:
    Path("users_code.py").write_text(USER_CODE)
    result = tiny(
        *("model=custom", "model.module._target_=users_code.Module", "+model.module.width=16"),
        *("data=custom", "data._target_=users_code.Data"),
    )
    assert result.code == 0, result.err
    report = json.loads(Path("run/report.json").read_text())
    assert report["baseline"]["parameters"] == 3 * 16 + 16 + 16 * 2 + 2
    assert "accuracy" in report["compressed"]["metrics"]


def test_a_trainer_argument_that_stages_set_themselves(tiny: Callable[..., Any]) -> None:
    own = "++stages.train.trainer={max_epochs: 1, accumulate_grad_batches: '${trainer.accumulate_grad_batches}'}"
    partly = tiny(own, "trainer.max_epochs=2", "trainer.accumulate_grad_batches=2", "task=plan")
    assert partly.code == 0
    said = [line for line in (partly.out + partly.err).splitlines() if "does not reach" in line]
    assert said == ["trainer.max_epochs does not reach stages that set their own: `stages.train.trainer.max_epochs`"]
    refused = tiny(own, "++stages.prune.trainer.max_epochs=1", "trainer.max_epochs=2")
    assert refused.code == 2
    assert "`trainer.max_epochs` has no effect" in refused.err
    assert "`stages.prune.trainer.max_epochs`" in refused.err
