"""Bad input: one line on stderr that names the argument and the way out, exit code 2, no traceback, no artifact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_compress.cli import main

CASES = [
    ("recipes=digit_prune", "`recipes=digit_prune`", "did you mean 'digits_prune'"),
    ("trainer=defalt", "`trainer=defalt`", "'default'"),
    ("callbacks/compress=[prun]", "`callbacks/compress=prun`", "'prune'"),
    ("callbacks/compres=[prune]", "`callbacks/compres`", "'callbacks/compress'"),
    ("schedule@callbacks.prune.schedule=cosin", "`schedule=cosin`", "'cosine'"),
    ("trainr=x", "`trainr`", "'trainer'"),
    ("foo.bar=3", "`foo.bar`", "expected one of"),
    ("trainer.max_epoch=3", "`trainer.max_epoch`", "'max_epochs'"),
    ("hydra.run.dirr=x", "`hydra.run.dirr`", "'dir'"),
    ("callbacks.prune.schedule.ende=3", "`callbacks.prune.schedule.ende`", "'end'"),
    ("+callbacks.prune.schedule.ende=3", "`callbacks.prune.schedule.ende`", "'end'"),
    ("~callbacks.prun", "`callbacks.prun`", "'prune'"),
    ("stages.trin.trainer.max_epochs=3", "`stages.trin.trainer.max_epochs`", "'train'"),
    ("+trianer.x=1", "`trianer`", "'trainer'"),
    ("+recipes=digits_prune", "`recipes`", "without the plus"),
    ("digits_prune", "`digits_prune`", "recipes=NAME"),
    ("a=[1,", "`a=[1,`", "quote"),
    ("trainer.max_epochs=1,2", "`trainer.max_epochs=1,2`", "-m"),
    ("--multirunn", "`--multirunn`", "'--multirun'"),
    ("--config-name=nope", "`--config-name`", "'nope'"),
    ("seed=${nope}", "`data.seed`", "must name an existing key"),
    ("seed=-1", "`seed`", "got -1"),
    ("threads=0", "`threads`", "got 0"),
    ("checkpoint.every_n_steps=0", "`checkpoint.every_n_steps`", "got 0"),
    ("trainer.max_epochs=many", "`trainer.max_epochs`", "must be int or null, got 'many'"),
    ("trainer.accelerator=tpuu", "`stages.train.trainer`", "tpuu"),
    ("+stages.train.trainer.max_epoch=3", "`stages.train.trainer.max_epoch`", "'max_epochs'"),
    ("+stages.train.trainer.max_epochs=many", "`stages.train.trainer.max_epochs`", "got 'many'"),
    ("+stages.train.callbacks=[prun]", "`stages.train.callbacks`", "'prune'"),
    ("trainer.devices=2", "`trainer.devices`", "torchrun"),
    ("+stages.train.epochs=3", "`stages.train.epochs`", "expected one of"),
    ("+stages.train.optimizer._target_=torch.optim.SDG", "`stages.train.optimizer._target_`", "'SGD'"),
    ("+stages.train.optimizer.lr=0.1", "`stages.train.optimizer`", "_target_"),
    ("+stages.prune.apply=[prune]", "`stages.prune`", "two stages"),
    ("baseline_after=trian", "`baseline_after`", "'train'"),
    ("model=custom", "`model.module._target_`", "no value yet"),
    ("model.module._target_=my_missing_file.Module", "`model.module._target_`", "cannot be imported"),
    ("+model.module.net.width=wide", "`model.module.net.width`", "must be int"),
    ("model.checkpoint=nowhere.ckpt", "`model.checkpoint`", "no file 'nowhere.ckpt'"),
    ("model.checkpoint=broken.ckpt", "`model.checkpoint`", "damaged"),
    ("model.checkpoint=broken.safetensors", "`model.checkpoint`", "broken.safetensors"),
    ("model.checkpoint=other.pt", "`model.checkpoint`", "Choose the `model`"),
    ("model.pretrained=nowhere/weights.pt", "`model.pretrained`", "LIGHTNING_COMPRESS_DATA"),
    ("model.pretrained=other.pt", "`model.pretrained`", "Choose the `model`"),
    ("data.batch_size=0", "`batch_size`", "got 0"),
    ("callbacks.prune.schedule.final=1.5", "`final`", "1.5"),
    ("callbacks.prune.schedule.final=high", "`callbacks.prune.schedule.final`", "got 'high'"),
    ("callbacks.prune.schedule.shape=cubik", "`shape`", "cubik"),
    ("callbacks.prune.schedule.end=9999", "`end`", "9999"),
    ("callbacks.prune.select.include=[net.conv9]", "net.conv9", "did you mean"),
    ("+callbacks.prune.rules.stem={_target_:lightning_compress.Rule,include:net.konv1,amount:0.5}", "konv1", "conv1"),
    ("task=evaluate", "`model.checkpoint`", "give its path"),
    ("report.threads=0", "`report.threads`", "got 0"),
    ("resume=nowhere", "`resume`", "'nowhere'"),
]


@pytest.mark.parametrize(("word", "named", "hint"), CASES, ids=[case[0] for case in CASES])
def test_bad_input_gives_one_line(word: str, named: str, hint: str, tiny: Callable[..., Any], run: Any) -> None:
    Path("broken.ckpt").write_bytes(b"PK\x03\x04 not a checkpoint")
    Path("broken.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    torch.save({"weight": torch.zeros(2)}, "other.pt")
    result = run(word) if word.startswith("resume=") else tiny(word)
    assert result.code == 2
    lines = result.err.splitlines()
    assert len(lines) == 1, result.err
    assert lines[0].startswith("lightning-compress: error: ")
    assert named in lines[0]
    assert hint in lines[0]
    assert "Traceback" not in result.out + result.err
    assert not Path("run/compressed.safetensors").exists()
    assert not Path("run/report.json").exists()


def test_a_callback_whose_group_was_replaced_is_named(tiny: Callable[..., Any]) -> None:
    result = tiny("callbacks/compress=[binary]", "+callbacks.prune.schedule.final=0.5")
    assert result.code == 2
    assert "error: `callbacks.prune` has no `_target_`" in result.err
    assert "callbacks/compress=[...,prune] too" in result.err


def test_apply_takes_methods_only(tiny: Callable[..., Any]) -> None:
    result = tiny(
        *("+stages.last.apply=[timer]", "+callbacks.timer._target_=lightning.pytorch.callbacks.Timer"),
        "+callbacks.timer.interval=step",
    )
    assert result.code == 2
    assert "`stages.last.apply` names 'timer', a Timer" in result.err


def test_missing_data_name_the_argument(tiny: Callable[..., Any]) -> None:
    result = tiny("data=mnist", "data.root=nowhere", "model=lenet300")
    assert result.code == 2
    assert len(result.err.splitlines()) == 1
    assert "`data`" in result.err
    assert "`root`" in result.err


def test_a_traceback_comes_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_COMPRESS_TRACEBACK", "1")
    with pytest.raises(Exception, match="nowhere"):
        main(["resume=nowhere"])


def test_resume_takes_nothing_else(run: Callable[..., Any]) -> None:
    result = run("resume=somewhere", "seed=1")
    assert result.code == 2
    assert "takes no other argument" in result.err


def test_a_failure_after_training_leaves_no_artifact(tiny: Callable[..., Any]) -> None:
    Path("failing.py").write_text(
        "from lightning_compress.models import ImageClassifier\n"
        "class Module(ImageClassifier):\n"
        "    def training_step(self, batch, index):\n"
        "        raise ValueError('broken on purpose')\n"
    )
    result = tiny("model.module._target_=failing.Module")
    assert result.code == 2
    assert "broken on purpose" in result.err.splitlines()[-1]
    assert not Path("run/compressed.safetensors").exists()
