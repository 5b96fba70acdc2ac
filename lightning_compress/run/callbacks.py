"""Lightning callbacks that the stages of a recipe need beside those of the recipe itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_compress.core.callback import CompressionCallback
from lightning_compress.core.cost import ParameterCount
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.distillation.callbacks import Distillation
from lightning_compress.distillation.teachers import BASELINE

log = logging.getLogger(__name__)


class CarryOver(Callback):
    """Hand the state of compression callbacks from one stage to the next, so that masks hold while fine-tuning.

    Put it after those callbacks: its ``setup`` fills in what theirs left empty. A checkpoint of the stage itself is
    loaded later and wins.

    Args:
        callbacks: The callbacks of this stage, by name.
        states: What :func:`carried_states` returned at the end of earlier stages.
    """

    def __init__(self, callbacks: Mapping[str, Callback], states: Mapping[str, dict[str, Any]]) -> None:
        self._callbacks = dict(callbacks)
        self._states = dict(states)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load the states, with the amount that was reached as the least one of this stage."""
        for name, callback in self._callbacks.items():
            state = self._states.get(name)
            if state is not None and isinstance(callback, CompressionCallback):
                begun: dict[str, Any] = {"updates": 0, "floor": state["amount"] or 0.0, "history": []}
                callback.load_state_dict({**state, **begun})

    def warn_about_the_rest(self, stage: str) -> None:
        """Say which earlier callbacks do not take part in this stage although they kept weights at zero."""
        for name in sorted(set(self._states) - set(self._callbacks)):
            log.warning(
                "stage %s trains without callbacks.%s, so the zeros it made may grow back; list it in "
                "stages.%s.callbacks to keep them",
                *(stage, name, stage),
            )


def warn_of_lost_zeros(stage: str, before: ParameterCount, after: ParameterCount) -> None:
    """Say that a stage lost most of the zeros that it began with, whatever had made them."""
    if before.nonzero is None or after.nonzero is None or before.total != after.total:
        return
    zeros, left = (1 - nonzero / max(1, before.total) for nonzero in (before.nonzero, after.nonzero))
    if zeros >= 0.01 and left < zeros / 2:
        log.warning(
            "stage %s: zeros fell from %.1f %% to %.1f %% of the parameters, as nothing held them; let the stage that "
            "makes them be the last, or prune by a callback that both stages list",
            *(stage, 100 * zeros, 100 * left),
        )


def carried_states(callbacks: Mapping[str, Callback]) -> dict[str, dict[str, Any]]:
    """Return the states, tensors and builtins, of the callbacks that hold weights in place between updates."""
    return {
        name: callback.state_dict()
        for name, callback in callbacks.items()
        if isinstance(callback, CompressionCallback)
        and type(callback).enforce is not CompressionCallback.enforce
        and callback.compressed is None
    }


def give_baseline(callbacks: Mapping[str, Callback], stage: str, make: Callable[[], LightningModule] | None) -> None:
    """Tell callbacks with ``teacher: baseline`` which model that is: the one that the result is compared with.

    Args:
        callbacks: Those of a stage, by name.
        stage: Its name, for the error.
        make: Builds the baseline; ``None`` if there is none yet.

    Raises:
        ConfigurationError: If a callback wants a baseline and there is none.
    """
    for name, callback in callbacks.items():
        if not isinstance(callback, Distillation) or callback.teacher != BASELINE:
            continue
        if make is not None:
            callback.baseline = make()
        else:
            raise ConfigurationError(
                f"`callbacks.{name}.teacher` is 'baseline', but stage {stage!r} runs before there is one; let it come "
                "after the stage that `baseline_after` names, give `model.checkpoint`, or name another teacher"
            )


def warn_about_the_idle(callbacks: Iterable[str], used: Iterable[str]) -> None:
    """Say which callbacks of a configuration take part in no stage, as one chosen for a recipe that lists others.

    Args:
        callbacks: All, by name.
        used: Those of the stages.
    """
    for name in sorted(set(callbacks) - set(used)):
        log.warning(
            "callbacks.%s takes part in no stage and does nothing; name it in the `callbacks` (or `apply`) of a stage, "
            "such as stages.NAME.callbacks=[%s]",
            *(name, name),
        )


def edits_structure(callback: Callback) -> bool:
    """Return whether a callback changes the structure of the module after fit."""
    return isinstance(callback, CompressionCallback) and type(callback).finalize is not CompressionCallback.finalize


class PlanReadyError(Exception):
    """Raised by :class:`StopAfterPlan` once every callback has checked and rendered its plan."""


class StopAfterPlan(Callback):
    """Leave ``fit`` before the first batch. Put it last."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop here."""
        raise PlanReadyError


def newest_checkpoints(place: Path, every_n_epochs: int | None, every_n_steps: int | None) -> list[ModelCheckpoint]:
    """Return the callbacks that keep the newest checkpoint of each kind; a stage resumes from the newest of all.

    Args:
        place: Folder of the checkpoints of one stage.
        every_n_epochs: At the end of every so many epochs, after validation; ``None`` for never.
        every_n_steps: After every so many optimizer steps; ``None`` for never.
    """
    kept: list[ModelCheckpoint] = []
    if every_n_epochs:
        epochs: dict[str, Any] = {"every_n_epochs": every_n_epochs, "save_on_train_epoch_end": True}
        kept.append(ModelCheckpoint(place, filename="{epoch}", **epochs))
    if every_n_steps:
        kept.append(ModelCheckpoint(place, filename="{epoch}-{step}", every_n_train_steps=every_n_steps))
    return kept
