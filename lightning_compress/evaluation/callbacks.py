"""A callback that reports at the end of a fit what compression cost and gained."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_compress.core.callback import CompressionCallback
from lightning_compress.core.checkpoint import ArtifactInfo, save_compressed
from lightning_compress.core.clock import callbacks_of
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.hooks import journal_of
from lightning_compress.core.isolation import same_randomness
from lightning_compress.evaluation.baseline import combine, fill_skeleton, first_sample, load_baseline, take_skeleton
from lightning_compress.evaluation.flips import Flips
from lightning_compress.evaluation.measurement import Measurement, measure
from lightning_compress.evaluation.notes import missed_target
from lightning_compress.evaluation.render import print_report, write_report
from lightning_compress.evaluation.report import (
    add_latencies,
    assemble_report,
    compare_predictions,
    describe_edits,
    try_metrics,
)

_UNREADABLE = "the given baseline could not be loaded; a warning says why"
_STRUCTURE = ("parameters", "nonzero_parameters", "macs", "dense_bytes", "gzip_bytes", "metrics")


class CompressionReport(Callback):
    """Write ``compressed.safetensors`` and a report after fit: size, operations, latency, metrics, before and after.

    Put it first among the callbacks, so that it sees the model before any of them changes the structure. It reports
    after all of them are done, whatever their order. If something cannot be measured, the report says so; if the
    report itself fails, that is a warning and the trained model is unharmed.

    Runs on: rank zero, at fit start (costs of the baseline) and at the end of fit. Nothing happens per step, and
    ``fast_dev_run`` reports nothing.

    Args:
        dirpath: Folder for the files; ``<default_root_dir>/compression`` by default.
        baseline: Where the baseline's metrics come from: ``None`` leaves them unknown, ``"initial"`` tests the weights
            at fit start (for pre-trained models), a path is a Lightning checkpoint of the same class, a module is
            taken as it is.
        example_inputs: One batch for operations and latency; by default the module's ``example_input_array``, else the
            first sample of a loader.
        test_dataloaders: Test data; by default those of the datamodule, else of the module.
        latency: Whether to measure the time of a forward pass.
        gzip: Whether to measure the size under gzip, which takes a second for about 20 MB at both ends of the fit.
        recipe: Name that the report shows.
        seed: Seed that the report shows; by default the one that Lightning's ``seed_everything`` left.

    Raises:
        ConfigurationError: If ``baseline`` is none of these or does not fit, or ``dirpath`` cannot be a folder.

    Attributes:
        report: The report after fit, else ``None``.
        paths: The files written, by name.

    >>> CompressionReport(baseline="initial").report is None
    True
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        baseline: str | Path | nn.Module | None = None,
        example_inputs: Any = None,
        test_dataloaders: Any = None,
        latency: bool = True,
        gzip: bool = True,
        recipe: str | None = None,
        seed: int | None = None,
    ) -> None:
        if baseline is not None and not isinstance(baseline, str | Path | nn.Module):
            raise ConfigurationError(
                "`baseline`: expected None, 'initial', the path of a Lightning checkpoint or a module, got "
                f"{type(baseline).__name__}."
            )
        if dirpath is not None and not isinstance(dirpath, str | Path):
            raise ConfigurationError(f"`dirpath`: expected the name of a folder, got {dirpath!r}.")
        self.dirpath = dirpath
        self.baseline = baseline
        self.example_inputs = example_inputs
        self.test_dataloaders = test_dataloaders
        self.latency = latency
        self.gzip = gzip
        self.recipe = recipe
        self.seed = seed
        self.report: dict[str, Any] | None = None
        self.paths: dict[str, Path] = {}
        self._before: Measurement | None = None
        self._skeleton: nn.Module | None = None
        self._module_ref: weakref.ref[nn.Module] | None = None
        self._finished = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep the structure, without weights, before any callback edits it; check that a baseline file fits it."""
        if stage != "fit":
            return
        self.report, self._finished, self._skeleton = None, False, None
        if self._module_ref is None or self._module_ref() is not pl_module:
            self._before = None
        self._module_ref = weakref.ref(pl_module)
        if isinstance(self.baseline, str | Path) and self.baseline != "initial" and not Path(self.baseline).is_file():
            raise ConfigurationError(
                f"`baseline`: there is no checkpoint file {str(self.baseline)!r}. Expected None, 'initial', the path "
                "of a Lightning checkpoint or a module."
            )
        if (folder := self._folder(trainer)).exists() and not folder.is_dir():
            raise ConfigurationError(f"`dirpath`: {str(folder)!r} is a file; name a folder.")
        if is_overridden("configure_model", pl_module):
            pl_module.configure_model()
        self._skeleton = None if len(journal_of(pl_module)) else take_skeleton(pl_module)
        if self._skeleton is not None and isinstance(self.baseline, str | Path) and self.baseline != "initial":
            load_baseline(self._skeleton, self.baseline, torch.device("cpu"))  # a misfit is an error before training

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the baseline's costs; a resumed run keeps those of its first start."""
        if _is_trial(trainer):
            return
        if trainer.is_global_zero and self._before is None:
            with _as_warning("measuring the baseline"):
                self._before = self._measure_start(trainer, pl_module)
        trainer.strategy.barrier("compression_report_start")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the fit was completed; the report waits until every callback has finished."""
        self._finished = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Report, if the fit was completed."""
        if stage == "fit" and self._finished and not _is_trial(trainer):
            self._finished = False
            if trainer.is_global_zero:
                with _as_warning("the compression report"):
                    self._report(trainer, pl_module)
            trainer.strategy.barrier("compression_report_end")
        self._skeleton = None

    def state_dict(self) -> dict[str, Any]:
        """Return the baseline's figures as builtins."""
        return {"version": 1, "baseline": None if self._before is None else self._before.to_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the baseline's figures of the run that is resumed."""
        state = state_dict.get("baseline")
        self._before = None if state is None else Measurement.from_state(state)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a running fit."""
        return {**self.__dict__, "_skeleton": None, "_module_ref": None}

    # ------------------------------------------------------------------ inside

    def _measure_start(self, trainer: Trainer, pl_module: LightningModule) -> Measurement | None:
        if len(journal_of(pl_module)):
            return None
        before = measure(pl_module, gzip=self.gzip)
        if self.baseline != "initial":
            given = self.baseline is not None  # its own metrics replace these, unless it cannot be loaded
            return before.with_metrics(None, _UNREADABLE if given else "no baseline was given; pass `baseline`")
        return before.with_metrics(*self._test(trainer, pl_module))

    def _report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        callbacks = [callback for callback in callbacks_of(trainer) if isinstance(callback, CompressionCallback)]
        compressed = next((c.compressed for c in reversed(callbacks) if c.compressed is not None), pl_module)
        folder = self._folder(trainer)
        artifact = self._save(compressed, folder)
        inputs, reason = self._inputs(trainer, pl_module)
        after = measure(compressed, inputs, gzip=self.gzip).with_metrics(*self._test(trainer, compressed))
        original = self._original(pl_module)
        measured = self._measure_before(trainer, original, inputs)
        if inputs is None:
            measured, after = measured.with_reason(reason, "macs"), after.with_reason(reason, "macs")
        runner = original
        if runner is None and self.latency and self._skeleton is not None:
            runner = fill_skeleton(self._skeleton, pl_module.device)
        before, after = add_latencies(measured, after, runner, compressed, inputs, enabled=self.latency, missing=reason)
        unknown = "it takes the baseline's weights; pass a checkpoint or a module as `baseline`"
        flips = Flips(reason=unknown if self.baseline in (None, "initial") else _UNREADABLE)
        if original is not None:
            flips = compare_predictions(original, compressed, _datamodule(trainer), self.test_dataloaders)
        self.report = assemble_report(
            before,
            after,
            flips=flips,
            edits=describe_edits(compressed),
            artifact=artifact,
            history=_merged_history(callbacks),
            recipe=self.recipe,
            seed=self._seed(),
        )
        self.report["notes"] = [*filter(None, map(missed_target, callbacks)), *self.report["notes"]]
        print_report(self.report)
        self.paths |= write_report(self.report, folder)

    def _folder(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir, "compression") if self.dirpath is None else Path(self.dirpath)

    def _save(self, compressed: nn.Module, folder: Path) -> ArtifactInfo | None:
        path, provenance = folder / "compressed.safetensors", {"recipe": self.recipe, "seed": self._seed()}
        with _as_warning("saving the compressed model"):
            artifact = save_compressed(
                compressed, path, {key: fact for key, fact in provenance.items() if fact is not None}
            )
            self.paths[path.name] = path
            return artifact
        return None

    def _seed(self) -> int | None:
        left = os.environ.get("PL_GLOBAL_SEED", "")
        return self.seed if self.seed is not None or not left.isdigit() else int(left)

    def _test(self, trainer: Trainer, model: nn.Module) -> tuple[dict[str, float], str]:
        return try_metrics(model, _datamodule(trainer), self.test_dataloaders, trainer.precision)

    def _original(self, pl_module: LightningModule) -> nn.Module | None:
        """Return the baseline with its weights, if there is one."""
        if isinstance(self.baseline, nn.Module):
            return self.baseline
        if self.baseline is None or self.baseline == "initial":
            return None
        with _as_warning("loading the baseline"):
            skeleton = take_skeleton(pl_module) if self._skeleton is None else self._skeleton
            return load_baseline(skeleton, self.baseline, pl_module.device)
        return None

    def _measure_before(self, trainer: Trainer, original: nn.Module | None, inputs: Any) -> Measurement:
        """Return all that is known about the baseline: from its weights, else from fit start and its structure."""
        if original is not None:
            return measure(original, inputs, gzip=self.gzip).with_metrics(*self._test(trainer, original))
        early = "the structure was edited before the report saw it; put CompressionReport first among the callbacks"
        if self._skeleton is None:
            return (self._before or Measurement()).with_reason(early, *(() if self._before else _STRUCTURE))
        structure = measure(self._skeleton, inputs, gzip=False)
        if self._before is None:
            edited = "a callback edited the model before the fit started"
            return structure.with_reason(edited, "nonzero_parameters", "gzip_bytes", "metrics")
        return combine(structure, self._before)

    def _inputs(self, trainer: Trainer, pl_module: LightningModule) -> tuple[Any, str]:
        """Return example inputs, or ``None`` and why there are none."""
        if self.example_inputs is not None:
            return self.example_inputs, ""
        if pl_module.example_input_array is not None:
            return pl_module.example_input_array, ""
        sources = (trainer.val_dataloaders, self.test_dataloaders, trainer.train_dataloader)
        reason = "there are no example inputs; pass `example_inputs`"
        for source in sources:
            loader = source[0] if isinstance(source, list | tuple) and source else source
            if loader is None or loader == []:
                continue
            try:
                with same_randomness():
                    sample = first_sample(pl_module, next(iter(loader)))
                return trainer.precision_plugin.convert_input(sample), ""
            except Exception as error:  # user code runs here; the next source may do
                reason = f"no example inputs could be taken from a loader ({error}); pass `example_inputs`"
        return None, reason


@contextmanager
def _as_warning(what: str) -> Iterator[None]:
    """Turn a failure into one warning: the trained model must not be lost because of a report."""
    try:
        yield
    except Exception as error:
        rank_zero_warn(
            f"{what[0].upper() + what[1:]} failed ({type(error).__name__}: {error}); training is not affected."
        )


def _is_trial(trainer: Trainer) -> bool:
    return bool(getattr(trainer, "fast_dev_run", False))


def _datamodule(trainer: Trainer) -> LightningDataModule | None:
    found = getattr(trainer, "datamodule", None)
    return found if isinstance(found, LightningDataModule) else None


def _merged_history(callbacks: list[CompressionCallback]) -> list[dict[str, Any]]:
    """Return the records of all callbacks in order of their steps; several callbacks are told apart by name."""
    if len(callbacks) == 1:
        return list(callbacks[0].history)
    records = [{**record, "callback": c.name or type(c).__name__} for c in callbacks for record in c.history]
    return sorted(records, key=lambda record: record.get("step", 0))
