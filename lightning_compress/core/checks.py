"""What a Trainer must and must not be for compression callbacks; refused before anything changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from lightning_compress.core.chain import CHAIN
from lightning_compress.core.clock import callbacks_of
from lightning_compress.core.errors import CompressionError, ConfigurationError
from lightning_compress.core.method import Method, overrides
from lightning_compress.core.pairs import check_pairs
from lightning_compress.core.schedule import Horizon, Schedule, parse_time

if TYPE_CHECKING:
    from lightning_compress.core.callback import CompressionCallback

_SHARDED = (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)


def check_times(schedule: Schedule, trainer: Trainer) -> None:
    """Refuse what is known to be wrong with a schedule before the length of the data is known.

    Raises:
        ConfigurationError: For an epoch that the run does not have, or a share of a run without end.
    """
    epochs, steps = trainer.max_epochs, trainer.max_steps
    for name, time in schedule.times():
        kind, number = parse_time(time, name)
        endless = (epochs is None or epochs < 0) and steps < 0
        if kind == "percent" and endless:
            Horizon(None, 1).steps(time, name)
        beyond = kind == "epoch" and epochs is not None and 0 <= epochs < number + (name == "start")
        if beyond and not getattr(trainer, "fast_dev_run", False):
            raise ConfigurationError(
                f"`{name}`{schedule.belongs} is epoch {time}, but `max_epochs` is {epochs}; train longer, or give "
                "an earlier time"
            )


def check_trainer(callback: CompressionCallback, trainer: Trainer) -> None:
    """Raise if ``callback`` cannot work with this Trainer's strategy or its other callbacks.

    Raises:
        ConfigurationError: For a sharded strategy, a callback that conflicts or cannot be told from this one, or one on
            the wrong side of this one, or a Trainer that is at its end where each fit counts.
    """
    if isinstance(trainer.strategy, _SHARDED):
        raise ConfigurationError(
            f"{callback.state_key} needs whole weights on every process, but `strategy` is "
            f"{type(trainer.strategy).__name__}, which shards them; use strategy='ddp' or a single device"
        )
    _check_unused(callback, trainer)
    callbacks = callbacks_of(trainer)
    _check_name(callback, callbacks)
    check_pairs(callback, callbacks, "callbacks")
    _check_after_fit(callback, callbacks)


def after_fit(callback: CompressionCallback, error: CompressionError) -> CompressionError:
    """Return an error of the edits after fit which also says that the training is not lost, and how to go on."""
    kind = type(callback).__name__
    said = f"{error}. The training is not lost: the module and its checkpoints are as it left them"
    again = f"; once this is settled, go on from there by compress(module, {kind}(...))"
    return type(error)(said if callback.needs_training else said + again)


def _check_name(callback: CompressionCallback, callbacks: list[Callback]) -> None:
    """Refuse two callbacks whose states a checkpoint could not tell apart."""
    same = [other for other in callbacks if other.state_key == callback.state_key]
    if len(same) > 1:
        kind = type(callback).__name__
        named = f"named {callback.name!r}" if callback.name else "without a name"
        raise ConfigurationError(
            f"`callbacks` has {len(same)} {kind} {named}, which checkpoints and metrics cannot tell apart; give each "
            f"a name of its own: {kind}(..., name='first')"
        )


def _check_after_fit(callback: CompressionCallback, callbacks: list[Callback]) -> None:
    """Refuse values that are held while training, where another method writes new ones after the fit."""
    if not callback.link or overrides(callback, "finalize"):
        return
    for other in callbacks:
        if not isinstance(other, Method) or not other.link or not overrides(other, "finalize"):
            continue
        if CHAIN.index(other.link) < CHAIN.index(callback.link):
            raise ConfigurationError(
                f"{type(other).__name__} changes weights after fit, which would undo what {type(callback).__name__} "
                f"did in it; give {type(other).__name__} a fit of its own, before"
            )


def _check_unused(callback: CompressionCallback, trainer: Trainer) -> None:
    if callback.counts_fits and trainer.ckpt_path is None and trainer.global_step > 0:
        epochs, steps = trainer.max_epochs, trainer.max_steps
        if (epochs is not None and 0 <= epochs <= trainer.current_epoch) or 0 <= steps <= trainer.global_step:
            raise ConfigurationError(
                f"{callback.state_key} counts fits, but this Trainer has trained already, to `max_epochs` {epochs} and "
                f"`max_steps` {steps}, so another fit would do nothing; make a new Trainer for each round"
            )
