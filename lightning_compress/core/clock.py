"""Counting optimizer updates of a Lightning run, and how many there will be."""

from __future__ import annotations

import math
from typing import Any, cast

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.optim import Optimizer

from lightning_compress.core.schedule import Horizon


class UpdateClock:
    """Counts training batches after which an optimizer really applied an update.

    ``trainer.global_step`` counts every optimizer's call (two manual optimizers: double) and also the steps that a
    gradient scaler skipped because of infinite gradients; schedules must count neither.

    Args:
        updates: Updates counted so far.
    """

    def __init__(self, updates: int = 0) -> None:
        self.updates = updates
        self._global_step = 0
        self._scale: float | None = None

    def start(self, trainer: Trainer) -> None:
        """Take the trainer's present position as the reference; call when training starts."""
        self._global_step = trainer.global_step
        self._scale = _loss_scale(trainer)

    def tick(self, trainer: Trainer) -> bool:
        """Return whether the batch that just ended applied an update, and count it if so."""
        stepped = trainer.global_step > self._global_step
        if not stepped:
            return False
        self._global_step = trainer.global_step
        before, self._scale = self._scale, _loss_scale(trainer)
        if before is not None and self._scale is not None and self._scale < before:
            return False
        self.updates += 1
        return True


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return the Trainer's callbacks in the order in which it calls them."""
    return list(cast(Any, trainer).callbacks)


def horizon_of(trainer: Trainer) -> Horizon:
    """Return how many optimizer updates the run and one epoch have; the training data must be set up."""
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    scheduler = next((c for c in callbacks_of(trainer) if isinstance(c, GradientAccumulationScheduler)), None)
    per_epoch: int | None = None
    total: int | None = None
    if not math.isinf(batches):
        if scheduler is None:
            per_epoch = math.ceil(batches / trainer.accumulate_grad_batches)
        if epochs is not None and epochs >= 0:
            every = [scheduler.get_accumulate_grad_batches(e) for e in range(epochs)] if scheduler else []
            total = sum(math.ceil(batches / n) for n in every) if scheduler else epochs * (per_epoch or 0)
    if trainer.max_steps is not None and trainer.max_steps >= 0:
        module = trainer.lightning_module
        calls_per_batch = 1 if module.automatic_optimization else max(1, len(trainer.optimizers))
        limit = trainer.max_steps // calls_per_batch
        total = limit if total is None else min(total, limit)
    return Horizon(total, per_epoch)


def is_last_batch(trainer: Trainer) -> bool:
    """Return whether no further batch will be trained on in this run, as far as its limits tell."""
    if trainer.max_steps is not None and 0 <= trainer.max_steps <= trainer.global_step:
        return True
    epochs = trainer.max_epochs
    return bool(trainer.is_last_batch and epochs is not None and 0 <= epochs <= trainer.current_epoch + 1)


def gradient_scale(trainer: Trainer, optimizer: Optimizer) -> float:
    """Return what gradients are multiplied with before a step: 1, unless a fused optimizer unscales them itself."""
    fused = any(group.get("fused") for group in optimizer.param_groups)
    return (_loss_scale(trainer) or 1.0) if fused else 1.0


def may_be_last_batch(trainer: Trainer) -> bool:
    """Return whether the batch that is about to run may be the last one: known before its optimizer steps."""
    return is_last_batch(trainer) or 0 <= trainer.max_steps <= trainer.global_step + len(trainer.optimizers)


def _loss_scale(trainer: Trainer) -> float | None:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return float(scaler.get_scale()) if scaler is not None else None
