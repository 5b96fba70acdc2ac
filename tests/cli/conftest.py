from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from lightning_compress.cli import main

TINY = """
# @package _global_
# One batch of training, one of pruning.
defaults:
  - override /trainer: quiet
  - override /callbacks/compress: [prune]
threads: 1
report: {latency: false}
trainer: {accelerator: cpu, max_epochs: 1, limit_train_batches: 2, limit_val_batches: 1, limit_test_batches: 1}
stages:
  train: {}
  prune: {callbacks: [prune]}
"""


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.delenv("LIGHTNING_COMPRESS_TRACEBACK", raising=False)
    (tmp_path / "conf" / "recipes").mkdir(parents=True)
    (tmp_path / "conf" / "recipes" / "tiny.yaml").write_text(TINY.lstrip())
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in set(root.handlers) - set(handlers):  # those of Hydra hold a file in the run's folder
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Call the command in this process."""

    def call(*words: str) -> Result:
        code = main(words)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


@pytest.fixture
def tiny(run: Callable[..., Result]) -> Callable[..., Result]:
    """Call the command with the tiny recipe and a folder of its own."""

    def call(*words: str, recipe: Sequence[str] = ("--config-dir=conf", "recipes=tiny", "hydra.run.dir=run")) -> Result:
        return run(*recipe, *words)

    return call
