"""What the module and the callback do at the same moments of a fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from lightning_compress.core.clock import UpdateClock, callbacks_of, horizon_of, may_be_last_batch
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.isolation import same_randomness
from lightning_compress.distillation.engine import Distiller
from lightning_compress.distillation.examination import examine_answer, run_part
from lightning_compress.distillation.fit import dtype_of, example_of, join_optimizer, share_values


def before_optimizers(
    distiller: Distiller, trainer: Trainer, module: LightningModule, baseline: nn.Module | None = None
) -> None:
    """Settle the teacher, match layers, check shapes and build adapters.

    Raises:
        ConfigurationError: If a layer does not exist, two shapes cannot be matched, or the teacher is the student.
    """
    if is_overridden("configure_model", module):
        module.configure_model()
    distiller.begin(module, trainer.global_step)
    distiller.take_teacher(module, baseline)
    distiller.prepare(module, lambda: example_of(module, run_part(distiller, module), _loaders(trainer, module)))


def after_optimizers(distiller: Distiller, trainer: Trainer, module: LightningModule) -> None:
    """Move what is not the student's own, and let an optimizer train what is learnt."""
    distiller.to(module.device, dtype_of(module))
    share_values(distiller.modules())
    join_optimizer(trainer.optimizers, distiller.parameters())


def before_first_batch(distiller: Distiller, trainer: Trainer, module: LightningModule, title: str) -> str:
    """Resolve ramps against the run, look at the teacher's answer, and print and return the plan."""
    distiller.resolve(horizon_of(trainer), clamp=bool(getattr(trainer, "fast_dev_run", False)))
    _examine(distiller, trainer, module)
    plan = distiller.plan(title)
    rank_zero_info(plan)
    return plan


def started_clock(distiller: Distiller, trainer: Trainer) -> UpdateClock:
    """Return a clock that goes on from the updates that the distiller has seen."""
    clock = UpdateClock(distiller.updates)
    clock.start(trainer)
    return clock


def is_step_logged(trainer: Trainer, module: LightningModule, batch_idx: int, prefix: str) -> bool:
    """Tell, before a step's optimizer runs, whether anybody will look at its values: logging costs more than they do.

    Loggers write every ``log_every_n_steps`` of the Trainer; the first and the last batch of an epoch show in
    ``callback_metrics``. With manual optimization, or where a callback's ``monitor`` begins with ``prefix``, every step
    counts.
    """
    every: int = cast(Any, trainer).log_every_n_steps
    if not module.automatic_optimization or (every and (trainer.global_step + 1) % every == 0):
        return True
    if batch_idx == 0 or trainer.is_last_batch or may_be_last_batch(trainer):
        return True
    return any(str(getattr(callback, "monitor", None)).startswith(prefix) for callback in callbacks_of(trainer))


def log_own_metrics(distiller: Distiller, trainer: Trainer, module: LightningModule, prefix: str) -> None:
    """Log what the teacher's own step says about the data of validation or test, at the end of their epoch."""
    for name, value in distiller.own_metrics.of(distiller.teacher, trainer).items():
        module.log(prefix + name, value, batch_size=1, sync_dist=True, add_dataloader_idx=False)


def count_update(distiller: Distiller, clock: UpdateClock, trainer: Trainer, module: LightningModule) -> None:
    """Count the update of a batch that is over.

    Raises:
        ConfigurationError: If manual optimization updates the student without the teacher ever having had a say.
    """
    updated = clock.tick(trainer)
    distiller.updates = clock.updates
    if updated and not distiller.heard and not module.automatic_optimization:
        raise ConfigurationError(
            f"`training_step` of {type(module).__name__} goes backward by itself, so the teacher had no say before the "
            "optimizer's step; write self.manual_backward(loss) instead of loss.backward()"
        )


def _loaders(trainer: Trainer, module: LightningModule) -> list[Callable[[], Any]]:
    owners = (getattr(trainer, "datamodule", None), module)
    return [o.train_dataloader for o in owners if o is not None and is_overridden("train_dataloader", o)]


def _examine(distiller: Distiller, trainer: Trainer, module: LightningModule) -> None:
    """Look at the teacher's answer to a few samples, where they can be had beforehand.

    Raises:
        ConfigurationError: If the teacher cannot teach this student.
    """
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        return  # the model is in parts: the first batch will tell
    try:
        inputs = example_of(module, run_part(distiller, module), [lambda: trainer.train_dataloader])
    except ConfigurationError:
        return
    with same_randomness(), trainer.precision_plugin.forward_context():
        examine_answer(distiller, module, trainer.precision_plugin.convert_input(inputs))
