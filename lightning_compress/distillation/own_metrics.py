"""How good a teacher is by its own account: what its own validation or test step logs about the student's data."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from logging import ERROR, getLogger
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_compress.core.copies import structure_copy
from lightning_compress.core.isolation import same_randomness
from lightning_compress.distillation.teacher import Teacher

STEPS = {"validate": "validation_step", "test": "test_step"}
TRANSFERS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
"""Hooks in which a student or a data module may change its batches."""


class OwnMetrics:
    """Runs a teacher's own step over the data once, and remembers what it logged: the teacher is frozen.

    They are asked for again only where the Trainer has made new loaders.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[Any, dict[str, float]]] = {}

    def of(self, teacher: Teacher | None, trainer: Trainer) -> dict[str, float]:
        """Return what ``teacher`` logs about the data that ``trainer`` has just looked through, under its own names.

        Args:
            teacher: One whose :meth:`Teacher.judge` is a LightningModule with a ``validation_step`` (``test_step``);
                for any other the result is empty.
            trainer: At the end of an epoch of validation or test.
        """
        model = None if teacher is None else teacher.judge()
        stage = "test" if trainer.testing else "validate"
        loaders = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
        if not isinstance(model, LightningModule) or not is_overridden(STEPS[stage], model) or trainer.sanity_checking:
            return {}
        if stage not in self._known or self._known[stage][0] is not loaders:
            self._known[stage] = (loaders, _run(model, trainer, stage, loaders, str(teacher)))
        return self._known[stage][1]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out loaders, which belong to a run."""
        return {"_known": {}}

    def forget(self) -> None:
        """Let go of loaders and values."""
        self._known = {}


def _run(model: LightningModule, trainer: Trainer, stage: str, loaders: Any, name: str) -> dict[str, float]:
    """Return what a copy of the model, with the same weights, logs in a run of its own on this process's device."""
    try:
        with _unheard(), same_randomness(), torch.inference_mode(False), torch.no_grad():
            copied = _copy_of(model, trainer)
            runner = _runner(trainer)
            (runner.test if stage == "test" else runner.validate)(copied, dataloaders=loaders, verbose=False)
    except Exception as error:  # of any type: it is somebody else's step
        rank_zero_warn(
            f"`teacher`: the {STEPS[stage]} of {name} failed on the student's data ({type(error).__name__}: {error}), "
            "so its own metrics are left out; ModuleTeacher(module, metrics=False) does not ask for them"
        )
        return {}
    return {key: float(value) for key, value in runner.callback_metrics.items()}


def _runner(trainer: Trainer) -> Trainer:
    """Return a Trainer that writes nothing, for one process on the device that ``trainer`` uses."""
    device = trainer.strategy.root_device
    on_gpu = device.type == "cuda"
    limit = trainer.limit_test_batches if trainer.testing else trainer.limit_val_batches
    limits: dict[str, Any] = {"limit_test_batches" if trainer.testing else "limit_val_batches": limit}
    return Trainer(
        accelerator="gpu" if on_gpu else device.type,
        devices=[device.index or 0] if on_gpu else 1,
        plugins=[LightningEnvironment()],
        precision=trainer.precision,
        inference_mode=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **limits,
    )


def _copy_of(model: LightningModule, trainer: Trainer) -> LightningModule:
    """Return a copy that shares the memory of Parameters and has hooks and metrics of its own, for these batches."""

    def keep(tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, nn.Parameter) else tensor.clone()

    copied: Any = structure_copy(model, keep)
    data = getattr(trainer, "datamodule", None)
    for hook in TRANSFERS if data is not None else ():
        if is_overridden(hook, data):
            setattr(copied, hook, getattr(data, hook))
    return copied


@contextmanager
def _unheard() -> Iterator[None]:
    """Let nobody hear what the framework has to say about a run that the user did not start."""
    loggers = [getLogger(name) for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
