"""A LightningModule that trains any student under any teacher."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.core.clock import UpdateClock
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.distillation.cached_batch import take_cached
from lightning_compress.distillation.engine import Distiller
from lightning_compress.distillation.faces import (
    Fallback,
    blank,
    check_names,
    joint_class,
    lend_defaults,
    share,
)
from lightning_compress.distillation.fit import lacking, reduce_gradients
from lightning_compress.distillation.injection import depends_on
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
from lightning_compress.distillation.own_metrics import TRANSFERS
from lightning_compress.distillation.schedule import Value
from lightning_compress.distillation.steps import (
    ComparedStep,
    ComparedTest,
    OwnBatches,
    SupervisedStep,
    call_step,
    check_student,
)
from lightning_compress.distillation.supervised import Supervised
from lightning_compress.distillation.teachers import TeacherLike
from lightning_compress.distillation.terms import Losses

ENTRY = "distillation"
"""Key of what is learnt beside the student in a Lightning checkpoint."""

_HARMLESS = frozenset({"device", "dtype", "forward", "example_input_array", "hparams"})


class DistillationModule(LightningModule):
    r"""Train a student under a teacher, as a LightningModule for any Trainer (Hinton et al. 2015, arXiv 1503.02531).

    .. math:: L = w_{task}\, L_{task} + \sum_i w_i\, L_i(\text{student}, \text{teacher}; T)

    The result *is* the student with a second face: an object of a class that inherits from the student's and shares
    everything it holds. Its ``training_step``, metrics, hyper-parameters, optimizers, hooks and manual optimization run
    as they are; layer names, ``state_dict`` and checkpoints are the student's own, so ``Student.load_from_checkpoint``
    and compression callbacks see an ordinary student. What it returns is found by a forward hook during its own
    ``training_step``, and the teacher is asked with the very same inputs, augmented and mixed as they are.

    The teacher is frozen, in evaluation mode, under ``no_grad`` and the step's autocast, on the student's device, and
    in no checkpoint, optimizer, ``parameters()`` or DDP bucket. Adapters that losses on features need are made from one
    batch before optimizers exist, join the first group of the first optimizer, and lie in an entry of their own in
    checkpoints; exported students never had them. With manual optimization the objective is added to the first
    ``manual_backward`` of a loss that comes from the student's output.

    In validation and test, ``teacher/agreement`` and the teacher's accuracy (or squared error) are logged beside the
    student's metrics. Where the teacher is a LightningModule, what its own ``validation_step`` or ``test_step`` logs
    about the same data appears too, as ``teacher/<its name>``; as it is frozen, a copy with the same weights runs over
    the data once, in a Trainer of its own on each process, whose means are averaged. Lists, functions, caches and plain
    modules have no such step, and one that fails is left out with a warning. While training, ``distill/<loss>`` and
    their sum ``distill/loss`` are values of single steps, logged when the Trainer's ``log_every_n_steps`` says so, and
    in the first and last step of an epoch; in every one where a callback monitors them.

    The student is trained in place: ``module.student`` is the object that was given, unless that has a ``student`` of
    its own. It does not help where the teacher is no better than the student, or where the student cannot fit the task
    itself.

    Args:
        student: A LightningModule, or a plain module (then ``task`` says how it is trained).
        teacher: A module, a checkpoint's path, ``"baseline"`` (a frozen copy of the student as it is now), a
            function of (batch, batch_idx), a :class:`Teacher`, or a list, whose mean counts; ``None`` if no loss looks
            at one.
        losses: Losses or :class:`Term` s: one, a list, or a mapping by name. Default: soft targets.
        temperature: Of losses that soften, above 0; a :class:`Ramp` changes it.
        task_weight: Of the student's own loss, at least 0; a :class:`Ramp` changes it.
        student_output: The submodule whose output is compared, such as ``"net"``, for a student that has no ``forward``
            or does not call itself; ``":1"`` or ``"net:1"`` for one of several outputs.
        target: Position or key of the labels in a batch, for losses that look at them; found by itself in
            ``(inputs, labels)`` and under usual keys.
        task: Loss, optimizer and metric of a plain module; default cross entropy and Adam.

    Raises:
        ConfigurationError: For values out of range; before the first epoch for layers that do not exist or fit.

    >>> module = DistillationModule(nn.Linear(4, 3), nn.Linear(4, 3))
    >>> list(module.state_dict()), sum(p.numel() for p in module.parameters())
    (['weight', 'bias'], 15)
    """

    __slots__ = ("_distill_clock", "_distill_engine", "_distill_pending", "_distill_student")
    student = Fallback("_distill_student")
    distiller = Fallback("_distill_engine")
    _distill_student: nn.Module
    _distill_engine: Distiller
    _distill_clock: UpdateClock
    _distill_pending: tuple[Any, ...] | None

    def __new__(
        cls,
        student: nn.Module,
        teacher: TeacherLike = None,
        losses: Losses | None = None,
        temperature: Value = 4.0,
        task_weight: Value = 1.0,
        student_output: str = "",
        target: int | str | None = None,
        task: Supervised | None = None,
    ) -> Self:
        """Return an object of the class that joins this one and the student's; parameters are those of `__init__`."""
        check_student(student)
        front: tuple[type, ...] = (cls,)
        if not isinstance(student, LightningModule):
            check_names(student, LightningModule, _HARMLESS)
            lend_defaults(student, LightningModule())
            front = (cls, ComparedStep, ComparedTest, SupervisedStep)
        else:
            compared = (("validation_step", ComparedStep), ("test_step", ComparedTest))
            front = (cls, *(part for step, part in compared if is_overridden(step, student)))
        if isinstance(student, LightningModule) and any(is_overridden(name, student) for name in TRANSFERS):
            front = (*front, OwnBatches)
        made: Self = blank(joint_class(*front, type(student)))
        share(made, student)
        return made

    def __init__(
        self,
        student: nn.Module,
        teacher: TeacherLike = None,
        losses: Losses | None = None,
        temperature: Value = 4.0,
        task_weight: Value = 1.0,
        student_output: str = "",
        target: int | str | None = None,
        task: Supervised | None = None,
    ) -> None:
        given = KnowledgeDistillation() if losses is None else losses
        distiller = Distiller(teacher, given, temperature, task_weight, student_output, target)
        if task is not None and not isinstance(self, SupervisedStep):
            raise ConfigurationError("`task` is for a plain module; this student is a LightningModule with its own")
        if isinstance(self, SupervisedStep):
            self._distill_task = Supervised() if task is None else task
        if isinstance(teacher, str | Path) and is_overridden("configure_model", self):
            self.configure_model()
        distiller.take_teacher(student)
        self._begin(student, distiller)

    def _begin(self, student: nn.Module, distiller: Distiller) -> None:
        slots = (student, distiller, UpdateClock(), None)
        for name, value in zip(("student", "engine", "clock", "pending"), slots, strict=True):
            object.__setattr__(self, f"_distill_{name}", value)  # the student is no submodule: it is this one

    # ------------------------------------------------------------------ steps

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Run the student's own step and add what the teacher has to say."""
        own, extra = self._distill_engine.split(batch)
        try:
            with self._distill_engine.watch(self) as record:
                self._distill_pending = (record, own, batch_idx, extra)
                output = call_step(super().training_step, own, batch_idx)
            if not self.automatic_optimization or output is None:
                return output
            if isinstance(output, Mapping):
                return {**output, "loss": self._with_objective(output["loss"])}
            return self._with_objective(output)
        finally:
            self._distill_pending = None

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Add what the teacher has to say to the first loss that comes from the student's output; go backward."""
        self._distill_engine.heard = True
        record = {} if self._distill_pending is None else self._distill_pending[0]
        if depends_on(loss, (call.output for call in record.get(self._distill_engine.student_output, ()))):
            loss = self._with_objective(loss)
        super().manual_backward(loss, *args, **kwargs)

    def _with_objective(self, loss: Tensor) -> Tensor:
        record, batch, batch_idx, extra = self._distill_pending or ({}, None, 0, None)
        objective = self._distill_engine.objective_of(record, batch, batch_idx, extra)
        for calls in record.values():
            calls.clear()
        if objective is None:
            return loss
        if is_step_logged(self.trainer, self, batch_idx, "distill/"):
            values = {f"distill/{name}": value for name, value in objective.parts.items()}
            self.log_dict({**values, "distill/loss": objective.total.detach()})
        weight = self._distill_engine.now(self._distill_engine.task_weight)
        return (loss if weight == 1 else weight * loss) + objective.total

    # ------------------------------------------------------------------ the run

    def setup(self, stage: str) -> None:
        """Match layers, check shapes and build adapters, before optimizers exist."""
        super().setup(stage)
        if stage == "fit":
            before_optimizers(self._distill_engine, self.trainer, self)

    def on_fit_start(self) -> None:
        """Move what is not the student's own, and let an optimizer train what is learnt."""
        super().on_fit_start()
        after_optimizers(self._distill_engine, self.trainer, self)

    def on_train_start(self) -> None:
        """Resolve ramps against the run."""
        super().on_train_start()
        self._distill_clock = started_clock(self._distill_engine, self.trainer)
        before_first_batch(self._distill_engine, self.trainer, self, "DistillationModule")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        """Run the student's own hook on the student's batch."""
        return super().on_train_batch_start(take_cached(batch)[0], batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count updates."""
        super().on_train_batch_end(outputs, take_cached(batch)[0], batch_idx)
        self._tick()

    def on_validation_epoch_end(self) -> None:
        """Log what the teacher's own step says about the data."""
        super().on_validation_epoch_end()
        self._log_own_metrics()

    def on_test_epoch_end(self) -> None:
        """Log what the teacher's own step says about the data."""
        super().on_test_epoch_end()
        self._log_own_metrics()

    def _log_own_metrics(self) -> None:
        log_own_metrics(self._distill_engine, self.trainer, self, "teacher/")

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Average gradients of adapters over processes."""
        reduce_gradients(optimizer, self._distill_engine.parameters)
        super().on_before_optimizer_step(optimizer)

    def teardown(self, stage: str) -> None:
        """Let go of the run."""
        super().teardown(stage)
        self._distill_engine.rest()
        if isinstance(self, SupervisedStep):
            self.trainer = None  # a plain network must not keep one: it would be copied along

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put what is learnt beside the student into an entry of its own."""
        super().on_save_checkpoint(checkpoint)
        self._tick()  # callbacks save before this module learns that the batch is over
        checkpoint[ENTRY] = self._distill_engine.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it back, when a fit is resumed."""
        super().on_load_checkpoint(checkpoint)
        if not self._distill_engine.ready:
            return
        if ENTRY in checkpoint:
            self._distill_engine.load_state_dict(checkpoint[ENTRY])
        elif self._distill_engine.parameters():
            raise ConfigurationError(lacking("DistillationModule"))

    def _tick(self) -> None:
        if self._distill_engine.ready:
            count_update(self._distill_engine, self._distill_clock, self.trainer, self)

    # ------------------------------------------------------------------ copies

    def __deepcopy__(self, memo: dict[int, Any]) -> DistillationModule:
        """Return a copy with tensors of its own and the same teacher."""
        twin, student = blank(type(self)), blank(type(self._distill_student))
        memo |= {id(self): twin, id(self._distill_student): student}
        student.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        share(twin, student)
        twin._begin(student, copy.deepcopy(self._distill_engine, memo))
        return twin

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle the joint class as the classes it is made of."""
        return _revive, type(self).__bases__, (self.__getstate__(), self._distill_engine)

    def __setstate__(self, state: Any) -> None:
        """Take back what was pickled."""
        held, distiller = state
        student = blank(type(self).__bases__[-1])
        student.__setstate__(held)
        share(self, student)
        self._begin(student, distiller)


def _revive(*bases: type) -> Any:
    return blank(joint_class(*bases))
