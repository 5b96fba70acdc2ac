"""Steps that a student's own are joined with: those of a plain network, and the comparison with its teacher."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.isolation import same_randomness
from lightning_compress.distillation.engine import Distiller
from lightning_compress.distillation.examination import examine_answer
from lightning_compress.distillation.fit import example_of
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
        step = super().validation_step
        distiller = self._distill_engine
        teacher = distiller.teacher
        if teacher is None or not teacher.has_validation or not distiller.ready:
            return call_step(step, batch, batch_idx, dataloader_idx)
        with distiller.watch(self, with_graph=False) as record:
            result = call_step(step, batch, batch_idx, dataloader_idx)
        values, count = distiller.compare(record, batch, batch_idx)
        for name, value in values.items():
            self.log(f"teacher/{name}", value, batch_size=count, sync_dist=True)
        return result


def examine(distiller: Distiller, trainer: Trainer, module: LightningModule) -> None:
    """Look at the teacher's answer to a few samples before the first epoch, where they can be had beforehand.

    Raises:
        ConfigurationError: If the teacher cannot teach this student.
    """
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        return  # the model is in parts: the first batch will tell
    try:
        inputs = example_of(module, [lambda: trainer.train_dataloader])
    except ConfigurationError:
        return
    with same_randomness(), trainer.precision_plugin.forward_context():
        examine_answer(distiller, module, trainer.precision_plugin.convert_input(inputs))


def call_step(step: Callable[..., Any], *arguments: Any) -> Any:
    """Call a step with as many of (batch, batch_idx, dataloader_idx) as it takes."""
    parameters = list(inspect.signature(step).parameters.values())
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return step(*arguments)
    return step(*arguments[: len(parameters)])
