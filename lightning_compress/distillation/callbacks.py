"""Distillation for training code that cannot be wrapped: a callback that changes gradients, not the training step."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.core.callback import CompressionCallback
from lightning_compress.core.clock import UpdateClock, callbacks_of
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.distillation.cached_batch import refuse_cached
from lightning_compress.distillation.engine import Distiller
from lightning_compress.distillation.fit import lacking, reduce_gradients
from lightning_compress.distillation.injection import Injector
from lightning_compress.distillation.losses import KnowledgeDistillation
from lightning_compress.distillation.moments import (
    after_optimizers,
    before_first_batch,
    before_optimizers,
    count_update,
    is_step_logged,
    log_own_metrics,
    started_clock,
)
from lightning_compress.distillation.schedule import Value
from lightning_compress.distillation.taps import Record
from lightning_compress.distillation.teachers import BASELINE, TeacherLike, reads_batches
from lightning_compress.distillation.terms import Losses


class Distillation(Callback):
    r"""Train under a teacher without touching ``training_step`` (Hinton et al. 2015, arXiv 1503.02531).

    Forward hooks see what the student's layers return. Right before each backward pass the teacher is asked with the
    same inputs, the losses are computed on detached copies z' of what was seen, and their gradients are added where the
    task's own backward pass goes through z:

    .. math:: \frac{\partial L}{\partial z} = w_{task} \frac{\partial L_{task}}{\partial z} +
        \sum_i w_i \frac{\partial L_i}{\partial z'}

    Parameters get exactly the gradients of :class:`DistillationModule`, in one backward pass of the student, also with
    gradient accumulation, gradient scaling, several optimizers, manual optimization and DDP.

    What it cannot do, and the module can:

    - the loss that ``training_step`` returns and logs stays the task's own; ``distill/*`` is logged beside it;
    - a layer counts only if the task's loss depends on what it returned; an error says so if not. Inside a
      ``torch.compile``-d part a tapped layer breaks the graph, which the module's taps do not;
    - ``task_weight`` scales what flows back through the student's output; penalties that ``training_step`` adds for
      other tensors keep their weight;
    - gradients that ``training_step`` takes itself (``autograd.grad``) know nothing of the teacher;
    - with manual optimization the loss must not have been divided for accumulation, or divide the weights too;
    - stored teacher outputs need batches that it cannot take apart: use the module for a teacher cache.

    In validation and test it logs what :class:`DistillationModule` does, and ``distill/*`` in the same steps.

    Put it before callbacks that edit the structure (replaced layers), so that ``"baseline"`` is the model as it was.

    Runs on: any device, ``ddp``; refuses nothing that the student's own training does.

    Args:
        teacher: As for :class:`DistillationModule`; default ``"baseline"``, a frozen copy of the student made when
            training starts, for a student that is compressed.
        losses: Losses or :class:`Term` s: one, a list, or a mapping by name. Default: soft targets.
        temperature: Of losses that soften, above 0, or a :class:`Ramp`.
        task_weight: Of the student's own loss, at least 0, or a :class:`Ramp`; see above.
        student_output: The submodule whose output is compared; default the module itself. ``":1"`` or ``"net:1"`` for
            one of several outputs.
        target: Position or key of the labels in a batch, for losses that look at them.
        name: Tells two of these callbacks apart.

    Attributes:
        baseline: Set it before ``fit`` to make ``"baseline"`` mean another model than the student as it is then.
        plan_text: The plan as it was printed.

    Raises:
        ConfigurationError: For values out of range; before the first epoch for layers that do not exist or fit.

    >>> Distillation(teacher="baseline", temperature=2.0).distiller.temperature
    2.0
    """

    def __init__(
        self,
        teacher: TeacherLike = BASELINE,
        losses: Losses | None = None,
        temperature: Value = 4.0,
        task_weight: Value = 1.0,
        student_output: str = "",
        target: int | str | None = None,
        name: str | None = None,
    ) -> None:
        given = KnowledgeDistillation() if losses is None else losses
        self.distiller = Distiller(teacher, given, temperature, task_weight, student_output, target)
        if reads_batches(teacher):
            raise ConfigurationError(
                "`teacher` reads stored outputs out of the batches, which a callback cannot take apart; use "
                "DistillationModule(student, teacher)"
            )
        self.name = name
        self.teacher = teacher
        self.baseline: nn.Module | None = None
        self.plan_text = ""
        self._clock = UpdateClock()
        self._live: _Batch | None = None
        self._logged: dict[str, Tensor] = {}

    # ------------------------------------------------------------------ before training

    @property
    def state_key(self) -> str:
        """Key of this callback's state in a checkpoint."""
        return type(self).__qualname__ + (f"[{self.name}]" if self.name else "")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Settle the teacher, match layers, check shapes and build adapters, before optimizers exist."""
        if stage != "fit":
            return
        callbacks = callbacks_of(trainer)
        early = [c for c in callbacks[: callbacks.index(self)] if _edits_before_fit(c)]
        if early and self.teacher == BASELINE and self.baseline is None:
            raise ConfigurationError(
                f"`callbacks` has {type(early[0]).__name__} before Distillation(teacher='baseline'), so the baseline "
                "would be edited already; put Distillation before it"
            )
        before_optimizers(self.distiller, trainer, pl_module, self.baseline)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move what is not the student's own, and let an optimizer train what is learnt."""
        after_optimizers(self.distiller, trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resolve ramps against the run."""
        self._clock = started_clock(self.distiller, trainer)
        self.plan_text = before_first_batch(self.distiller, trainer, pl_module, self.state_key)

    # ------------------------------------------------------------------ while training

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin to watch the student."""
        self._close()
        refuse_cached(batch, "the callback cannot take a batch apart; use DistillationModule")
        self._live = _Batch(self.distiller, pl_module, batch, batch_idx)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Compute the losses and lay their gradients ready."""
        live = self._live
        if live is None:
            return
        self.distiller.heard = True
        if not live.record[self.distiller.student_output] and not pl_module.automatic_optimization:
            return  # a backward pass of something else
        with trainer.precision_plugin.train_step_context(), torch.enable_grad():
            objective = self.distiller.objective_of(live.record, live.batch, live.batch_idx, None)
        live.clear()
        if objective is not None:
            if is_step_logged(trainer, pl_module, live.batch_idx, self._prefix("distill")):
                self._logged = {**objective.parts, "loss": objective.total.detach()}
            weight = self.distiller.now(self.distiller.task_weight)
            live.injector.provide(objective.total * _loss_scale(trainer, pl_module), weight)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make sure that the gradients went where they belong."""
        if self._live is not None and pl_module.automatic_optimization:
            self._live.injector.check()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Average gradients of adapters over processes."""
        reduce_gradients(optimizer, self.distiller.parameters)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the update and log."""
        if self._live is not None:
            self._live.injector.check()
        self._close()
        count_update(self.distiller, self._clock, trainer, pl_module)
        if self._logged:
            prefix = self._prefix("distill")
            values: dict[str, Any] = {prefix + name: value for name, value in self._logged.items()}
            self._logged = {}
            pl_module.log_dict(values, on_step=True, on_epoch=False)

    # ------------------------------------------------------------------ while validating or testing

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Begin to watch the student."""
        teacher = self.distiller.teacher
        if teacher is not None and teacher.has_validation:
            self._close()
            self._live = _Batch(self.distiller, pl_module, batch, batch_idx, learns=False)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Log how student and teacher compare."""
        if self._live is None:
            return
        with trainer.precision_plugin.val_step_context():
            values, count = self.distiller.compare(self._live.record, batch, batch_idx)
        self._close()
        for name, value in values.items():
            pl_module.log(self._prefix("teacher") + name, value, batch_size=count, sync_dist=True)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what the teacher's own step says about the data."""
        log_own_metrics(self.distiller, trainer, pl_module, self._prefix("teacher"))

    on_test_batch_start = on_validation_batch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    # ------------------------------------------------------------------ afterwards

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the run."""
        self._close()
        self.distiller.rest()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the run."""
        self._close()

    def state_dict(self) -> dict[str, Any]:
        """Return position, adapters and buffers of losses: tensors and builtins only."""
        return self.distiller.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back, when a fit is resumed."""
        if self.distiller.ready:
            self.distiller.load_state_dict(state_dict)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume from a checkpoint that this callback did not write."""
        if self.distiller.ready and self.state_key not in checkpoint.get("callbacks", {}):
            raise ConfigurationError(lacking(f"the {self.state_key} callback"))

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a batch."""
        state = {**self.__dict__, "_live": None, "_logged": {}}
        return {key: value for key, value in state.items() if key not in ("log", "log_dict")}  # the module's, lent

    def _prefix(self, word: str) -> str:
        return f"{word}/{self.name}/" if self.name else f"{word}/"

    def _close(self) -> None:
        if self._live is not None:
            self._live.close()
        self._live = None


class _Batch:
    """The taps of one batch, and the gradients on their way into it."""

    def __init__(
        self, distiller: Distiller, module: nn.Module, batch: Any, batch_idx: int, learns: bool = True
    ) -> None:
        self.batch, self.batch_idx = batch, batch_idx
        self.injector = Injector(distiller.student_output)
        self._stack = ExitStack()
        watch = distiller.watch(module, keep=self.injector.leaf) if learns else distiller.watch_output(module)
        self.record: Record = self._stack.enter_context(watch)

    def clear(self) -> None:
        for calls in self.record.values():
            calls.clear()

    def close(self) -> None:
        self.clear()
        self._stack.close()


def _edits_before_fit(callback: Callback) -> bool:
    return isinstance(callback, CompressionCallback) and type(callback).prepare is not CompressionCallback.prepare


def _loss_scale(trainer: Trainer, module: LightningModule) -> float:
    """Return what the loss has been multiplied with on its way from ``training_step`` to the backward pass."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    scale = float(scaler.get_scale()) if scaler is not None else 1.0
    return scale / trainer.accumulate_grad_batches if module.automatic_optimization else scale
