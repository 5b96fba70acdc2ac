"""What the command can do: compress, evaluate a file, or only plan."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from omegaconf import DictConfig
from torch import nn

from lightning_compress.core.checkpoint import ArtifactInfo, inspect_compressed, save_compressed
from lightning_compress.core.errors import CompressionError, ConfigurationError
from lightning_compress.evaluation.notes import explain_export
from lightning_compress.evaluation.render import print_report, write_report
from lightning_compress.evaluation.report import build_report
from lightning_compress.run.build import build
from lightning_compress.run.exporting import export_model
from lightning_compress.run.folder import ARTIFACT, RunFolder
from lightning_compress.run.quiet import quiet
from lightning_compress.run.settings import Settings, read_settings
from lightning_compress.run.weights import is_artifact, load_weights
from lightning_compress.stages import build_data, build_module, example_inputs, plan_stages, run_stages

log = logging.getLogger(__name__)


@runtime_checkable
class Task(Protocol):
    """What ``task=NAME`` builds."""

    def run(self, settings: Settings, folder: RunFolder) -> None:
        """Do it, and leave the results in ``folder``."""


@dataclass(frozen=True)
class CompressTask:
    """Baseline, stages, evaluation, report, artifact."""

    def run(self, settings: Settings, folder: RunFolder) -> None:
        """Run the stages that are left, then measure and write."""
        data = build_data(settings)
        outcome = run_stages(settings, folder, data)
        baseline = build_module(settings)
        baseline.load_state_dict(outcome.baseline)
        log.info("measuring")
        provenance = {"recipe": settings.recipe, "seed": settings.seed}
        artifact = save_compressed(outcome.module, folder.path / ARTIFACT, provenance)
        _publish(settings, data, folder, baseline, outcome.module, artifact, outcome.history)


@dataclass(frozen=True)
class EvaluateTask:
    """Measure ``model.checkpoint``: a compressed artifact, a Lightning checkpoint or plain weights."""

    def run(self, settings: Settings, folder: RunFolder) -> None:
        """Load, measure, write the report."""
        path = settings.model.get("checkpoint")
        if not path:
            raise ConfigurationError("`model.checkpoint` is null; `task=evaluate` measures a file, give its path")
        module, data = build_module(settings), build_data(settings)
        load_weights(module, str(path))
        artifact = inspect_compressed(path) if is_artifact(Path(path)) else None
        _publish(settings, data, folder, None, module, artifact)


@dataclass(frozen=True)
class PlanTask:
    """Print what every stage would do to which layer, and train nothing."""

    def run(self, settings: Settings, folder: RunFolder) -> None:
        """Check and print the plan."""
        for name, text in plan_stages(settings, folder, build_data(settings)).items():
            print(f"stage {name}\n{text}")


def run_settings(config: DictConfig, path: Path) -> None:
    """Check a composed configuration and run its task in a new folder.

    Args:
        config: What Hydra composed.
        path: The run's folder.
    """
    settings = read_settings(config)
    folder = RunFolder(path)
    folder.start(settings.raw)
    _run(settings, folder)


def resume_run(path: Path) -> None:
    """Continue the run that lives in ``path`` with the configuration it saved.

    Raises:
        ConfigurationError: If there is no run in ``path``.
    """
    if not path.is_dir():
        raise ConfigurationError(f"`resume` must be the folder of an earlier run; there is no folder {str(path)!r}")
    folder = RunFolder(path)
    settings = read_settings(folder.saved_config())
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    _run(settings, folder)


def _run(settings: Settings, folder: RunFolder) -> None:
    before = torch.get_num_threads()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    try:
        with quiet():
            _task(settings).run(settings, folder)
    except (KeyboardInterrupt, SystemExit):  # Lightning turns the first into the second
        log.warning("interrupted; `lightning-compress resume=%s` goes on from the last checkpoint", folder.path)
        raise
    finally:
        torch.set_num_threads(before)


def take(inputs: Any, count: int) -> Any:
    """Return the first ``count`` samples of a batch of any nesting.

    >>> take((torch.zeros(5, 2), {"mask": torch.ones(5)}), 2)[1]["mask"].shape
    torch.Size([2])
    """
    if isinstance(inputs, torch.Tensor):
        return inputs[:count] if inputs.dim() else inputs
    if isinstance(inputs, Mapping):
        return {key: take(value, count) for key, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return type(inputs)(take(value, count) for value in inputs)
    return inputs


def _task(settings: Settings) -> Task:
    task = build("task", settings.task)
    if not isinstance(task, Task):
        raise ConfigurationError(f"`task._target_` must build something with `run`, got {type(task).__name__}")
    return task


def _publish(
    settings: Settings,
    data: Any,
    folder: RunFolder,
    baseline: nn.Module | None,
    module: Any,
    artifact: ArtifactInfo | None,
    history: Sequence[dict[str, Any]] = (),
) -> None:
    """Measure, export if wanted, and write the report; what cannot be exported is an error after that."""
    inputs = take(example_inputs(module, data), settings.report["batch_size"])
    report = build_report(
        baseline,
        module,
        example_inputs=inputs,
        datamodule=data,
        artifact=artifact,
        history=history,
        recipe=settings.recipe,
        seed=settings.seed,
        latency=settings.report["latency"],
        threads=settings.report["threads"],
    )
    exported, failure = _export(settings, folder, baseline, module, inputs, report)
    write_report(report, folder.path)
    print_report(report)
    print(f"report: {folder.path / 'report.html'}")
    if (folder.path / ARTIFACT).is_file():
        print(f"compressed file: {folder.path / ARTIFACT}")
    if exported is not None:
        print(f"exported file: {exported}")
    if failure is not None:
        raise failure


def _export(
    settings: Settings,
    folder: RunFolder,
    baseline: nn.Module | None,
    module: nn.Module,
    inputs: Any,
    report: dict[str, Any],
) -> tuple[Path | None, CompressionError | None]:
    """Write what ``export`` asks for into the report too; return the file, or why there is none."""
    if settings.export is None:
        return None, None
    log.info("exporting")
    threads = settings.report["threads"] if settings.report["latency"] else None
    try:
        report["export"], path = export_model(settings.export, folder.path, baseline, module, inputs, threads)
    except CompressionError as error:
        report["notes"].append(f"Nothing was exported: {error}.")
        return None, type(error)(f"`export`: {error}")
    report["notes"] += explain_export(report["export"])
    return path, None
