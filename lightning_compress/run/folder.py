"""A run's folder: configuration, checkpoints, and which stages are done. Files are written aside and renamed."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from lightning_compress.core.errors import ArtifactError, ConfigurationError
from lightning_compress.core.files import load_tensors

CONFIG = "config.yaml"
STATE = "state.json"
ARTIFACT = "compressed.safetensors"
REPORTS = ("report.json", "report.md", "report.html")
CHECKPOINTS = "checkpoints"
STATE_VERSION = 1


class RunFolder:
    """The files of one run.

    Args:
        path: The folder; made if it is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.path.mkdir(parents=True, exist_ok=True)

    def start(self, settings: Mapping[str, Any]) -> None:
        """Begin anew: remove what an earlier run left here and write the resolved configuration."""
        written = self.path.glob(f"{Path(ARTIFACT).stem}.*")  # an exported file has the same name
        for path in (*(self.path / name for name in (STATE, *REPORTS)), *written):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.path / CHECKPOINTS, ignore_errors=True)
        self.write(CONFIG, lambda aside: OmegaConf.save(OmegaConf.create(dict(settings)), aside))

    def saved_config(self) -> DictConfig:
        """Return the configuration of the run that is to be resumed.

        Raises:
            ConfigurationError: If this is not the folder of a run.
        """
        path = self.path / CONFIG
        if not path.is_file():
            raise ConfigurationError(f"`resume` must be the folder of an earlier run; {path} does not exist")
        config = OmegaConf.load(path)
        if not isinstance(config, DictConfig):
            raise ConfigurationError(f"`resume`: {path} does not hold a mapping; it is damaged")
        return config

    def write(self, name: str, writer: Callable[[Path], object]) -> Path:
        """Let ``writer`` write a file aside, then put it in place in one step.

        Args:
            name: The file's name in this folder.
            writer: Writes to the path it is given.

        Returns:
            The final path.
        """
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            writer(aside)
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
        return path

    def completed(self) -> list[dict[str, Any]]:
        """Return a record per completed stage, in order: ``name``, ``history``, ``seconds``.

        Raises:
            ArtifactError: If the state file is damaged or of a newer version.
        """
        path = self.path / STATE
        if not path.is_file():
            return []
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            version, records = state["version"], list(state["completed"])
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{path} is damaged ({error}); start the run anew") from error
        if version != STATE_VERSION:
            raise ArtifactError(f"{path} has version {version}, this package reads {STATE_VERSION}")
        return records

    def complete(self, record: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Record a stage as done, its tensors first, so that a record always has its tensors.

        Args:
            record: ``name``, ``history`` and ``seconds``; JSON.
            result: ``module`` (a state_dict) and ``carried`` (states of callbacks); tensors and builtins.
        """
        self.write(_result_name(record["name"]), lambda aside: torch.save(dict(result), aside))
        state = {"version": STATE_VERSION, "completed": [*self.completed(), dict(record)]}
        self.write(STATE, lambda aside: aside.write_text(json.dumps(state, indent=1), encoding="utf-8"))

    def result(self, stage: str) -> dict[str, Any]:
        """Return what a completed stage left: ``module`` and ``carried``.

        Raises:
            ArtifactError: If the file is missing or damaged.
        """
        return load_tensors(self.path / _result_name(stage))

    def checkpoint_folder(self, stage: str) -> Path:
        """Return where Lightning's checkpoints of a stage lie."""
        return self.path / CHECKPOINTS / _safe(stage)

    def last_checkpoint(self, stage: str) -> Path | None:
        """Return the newest checkpoint of a stage that reads back whole, or ``None``.

        A process that is killed while it writes may leave a truncated file; the one before it is still there.
        """
        found = list(self.checkpoint_folder(stage).glob("*.ckpt"))
        for path in sorted(found, key=lambda one: one.stat().st_mtime_ns, reverse=True):
            try:
                load_tensors(path)
            except ArtifactError:
                continue
            return path
        return None


def _result_name(stage: str) -> str:
    return f"{CHECKPOINTS}/{_safe(stage)}.pt"


def _safe(stage: str) -> str:
    return re.sub(r"[^\w.-]", "_", stage)
