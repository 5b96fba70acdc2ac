"""Steps that a student's own are joined with: those of a plain network, and the comparison with its teacher."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.paths import original
from lightning_compress.distillation.cached_batch import NESTED, CachedBatch, refuse_cached, take_cached
from lightning_compress.distillation.engine import Distiller
from lightning_compress.distillation.supervised import Supervised


class SupervisedStep(LightningModule):
    """The steps of a plain network, by its :class:`Supervised` task."""

    _distill_task: Supervised

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the task's loss of one batch."""
        inputs, target = self._distill_task.split(batch)
        loss = self._distill_task.loss(self(inputs), target)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log loss and metric of the validation data."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log loss and metric of the test data."""
        self._evaluate(batch, "test")

    def configure_optimizers(self) -> Any:
        """Build the task's optimizer and scheduler."""
        optimizer = self._distill_task.optimizer(
            [parameter for parameter in self.parameters() if parameter.requires_grad]
        )
        return (
            optimizer
            if self._distill_task.scheduler is None
            else ([optimizer], [self._distill_task.scheduler(optimizer)])
        )

    def _evaluate(self, batch: Any, stage: str) -> None:
        inputs, target = self._distill_task.split(batch)
        values = self._distill_task.values(self(inputs), target)
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()}, prog_bar=True, sync_dist=True)


class ComparedStep(LightningModule):
    """Lets a student that validates be compared with its teacher on the same batches."""

    _distill_engine: Distiller

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Run the student's own step, and log ``teacher/agreement`` and how good the teacher is."""
        return _compared(self, super().validation_step, batch, batch_idx, dataloader_idx)


class ComparedTest(LightningModule):
    """Lets a student that is tested be compared with its teacher on the same batches."""

    _distill_engine: Distiller

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Run the student's own step, and log ``teacher/agreement`` and how good the teacher is."""
        return _compared(self, super().test_step, batch, batch_idx, dataloader_idx)


def _compared(module: ComparedStep | ComparedTest, step: Callable[..., Any], batch: Any, *numbers: int) -> Any:
    distiller = module._distill_engine
    if distiller.teacher is None or not distiller.teacher.has_validation:
        return call_step(step, batch, *numbers)
    with distiller.watch_output(module) as record:
        result = call_step(step, batch, *numbers)
    values, count = distiller.compare(record, batch, numbers[0])
    for name, value in values.items():
        module.log(f"teacher/{name}", value, batch_size=count, sync_dist=True)
    return result


class OwnBatches(LightningModule):
    """Lets a student that changes its batches on their way see its own, without the teacher's stored outputs."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Run the student's own hook on the student's batch."""
        return _apart(batch, lambda own: super(OwnBatches, self).on_before_batch_transfer(own, dataloader_idx))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Run the student's own hook on the student's batch, and move the rest."""
        moved = _apart(batch, lambda own: super(OwnBatches, self).transfer_batch_to_device(own, device, dataloader_idx))
        return CachedBatch(moved.training_batch, moved.outputs.to(device)) if isinstance(moved, CachedBatch) else moved

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Run the student's own hook on the student's batch."""
        return _apart(batch, lambda own: super(OwnBatches, self).on_after_batch_transfer(own, dataloader_idx))


def _apart(batch: Any, change: Callable[[Any], Any]) -> Any:
    own, stored = take_cached(batch)
    if stored is None:
        refuse_cached(batch, NESTED)
    changed = change(own)
    return changed if stored is None else CachedBatch(changed, stored)


def call_step(step: Callable[..., Any], *arguments: Any) -> Any:
    """Call a step with as many of (batch, batch_idx, dataloader_idx) as it takes."""
    count = _arity(step.__func__) - 1 if inspect.ismethod(step) else _arity.__wrapped__(step)
    return step(*arguments[:count])


@functools.lru_cache(maxsize=128)
def _arity(function: Callable[..., Any]) -> int:
    """Return how many positional arguments a function takes; many if any number."""
    parameters = inspect.signature(function).parameters.values()
    return sys.maxsize if any(p.kind is p.VAR_POSITIONAL for p in parameters) else len(parameters)


def check_student(student: Any) -> None:
    """Refuse what cannot be a student.

    Raises:
        ConfigurationError: If it is no module, compiled from outside, taught already, or cannot train.
    """
    if not isinstance(student, nn.Module):
        raise ConfigurationError(f"`student` must be a torch.nn.Module, got {type(student).__name__}")
    if original(student) is not student:
        raise ConfigurationError(
            "`student` came out of torch.compile; give the module itself and call `module.compile()` on it or on its "
            "network, which is as fast"
        )
    if hasattr(student, "_distill_engine"):
        raise ConfigurationError("`student` is a DistillationModule already; give several losses to one")
    if not isinstance(student, LightningModule):
        return
    if not is_overridden("training_step", student):
        raise ConfigurationError(f"`student`: {type(student).__name__} has no training_step; pass its network instead")
    if "dataloader_iter" in inspect.signature(student.training_step).parameters:
        raise ConfigurationError(
            f"`student`: the training_step of {type(student).__name__} takes batches itself (`dataloader_iter`); let "
            "it take (batch, batch_idx), so that the teacher sees the same ones"
        )
