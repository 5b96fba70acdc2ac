"""A recipe's stages: each one a ``Trainer.fit`` with an optimizer of its own, or a post-training step, resumable."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_compress.core.callback import CompressionCallback
from lightning_compress.core.compress import compress
from lightning_compress.core.cost import count_parameters
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.hooks import install_hooks
from lightning_compress.core.inputs import example_in
from lightning_compress.data.resume import ExactResume
from lightning_compress.run.build import build
from lightning_compress.run.callbacks import (
    CarryOver,
    PlanReadyError,
    StopAfterPlan,
    carried_states,
    edits_structure,
    give_baseline,
    newest_checkpoints,
    warn_about_the_idle,
    warn_of_lost_zeros,
)
from lightning_compress.run.folder import RunFolder
from lightning_compress.run.optimizer import own_optimizer
from lightning_compress.run.quiet import quiet
from lightning_compress.run.settings import Settings, Stage
from lightning_compress.run.weights import load_pretrained, load_weights

log = logging.getLogger(__name__)

UNKNOWN = "on the layers that earlier stages leave"


@dataclass
class Outcome:
    """What the stages left.

    Args:
        module: The module after the last stage.
        baseline: The ``state_dict`` of the module that the result is compared with.
        history: An entry per compression step, with the stage it happened in.
        carried: States of callbacks (masks), by name, for a later stage that uses them again.
    """

    module: LightningModule
    baseline: Mapping[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    carried: dict[str, dict[str, Any]] = field(default_factory=dict)


def build_module(settings: Settings, stage: Stage | None = None) -> LightningModule:
    """Build the module of a configuration from its seed, with the ``state_dict`` hooks that let it take edits.

    Args:
        settings: The checked configuration.
        stage: One with a ``student``, which is built then, in place of ``model.module``.
    """
    seed_everything(settings.seed, workers=True, verbose=False)
    where, node = "model.module", settings.model["module"]
    if stage is not None and stage.student is not None:
        where, node = f"stages.{stage.key}.student", stage.student
    module = build(where, node)
    if not isinstance(module, LightningModule):
        raise ConfigurationError(
            f"`{where}._target_` must build a LightningModule, got {type(module).__name__}; for a plain network "
            "use lightning_compress.models.ImageClassifier with the network as `net`"
        )
    if is_overridden("configure_model", module):
        module.configure_model()
    install_hooks(module)
    return module


def build_data(settings: Settings) -> LightningDataModule:
    """Build the data module of a configuration and let it load, so that missing data are an error at once."""
    data = build("data", settings.data)
    if not isinstance(data, LightningDataModule):
        raise ConfigurationError(f"`data._target_` must build a LightningDataModule, got {type(data).__name__}")
    try:
        data.prepare_data()
        data.setup("fit")
    except ConfigurationError as error:
        raise ConfigurationError(f"`data`: {error}") from error
    return data


def run_stages(settings: Settings, folder: RunFolder, data: LightningDataModule) -> Outcome:
    """Run what is left of a recipe's stages.

    Args:
        settings: The checked configuration.
        folder: Where the run lives; stages it records as completed are loaded, not run.
        data: Used by every stage.

    Returns:
        The module after the last stage, the baseline's tensors, and what happened.
    """
    outcome = Outcome(build_module(settings))
    stages = _begin(settings, outcome)
    records = folder.completed()
    if records:
        _restore(settings, folder, records, outcome)
    elif not list(folder.path.glob("checkpoints/*/*.ckpt")):
        plan_stages(settings, folder, data)
    done = {record["name"] for record in records}
    for stage in stages:
        if stage.name not in done:
            _run_stage(settings, stage, folder, data, outcome)
            if stage.name == settings.baseline_after:
                outcome.baseline = _tensors(outcome.module)
    return outcome


def plan_stages(settings: Settings, folder: RunFolder, data: LightningDataModule) -> dict[str, str]:
    """Return what the callbacks of each stage would do, as text, without training; every check is made.

    A stage that changes the structure after its fit decides what later stages see, so their layers are not known yet.

    Args:
        settings: The checked configuration.
        folder: Where Lightning may put its files.
        data: Its training loader tells how long an epoch is.

    Returns:
        A plan per stage.
    """
    warn_about_the_idle(
        settings.callbacks, (name for stage in settings.stages for name in (*stage.callbacks, *stage.apply))
    )
    outcome = Outcome(build_module(settings))
    plans: dict[str, str] = {}
    known, has_baseline = True, False
    for stage in (one for one in _begin(settings, outcome) if one.round == 1):  # later ones depend on what is left
        callbacks = {name: build_callback(settings, name) for name in (*stage.callbacks, *stage.apply)}
        untrained = (
            partial(build_module, settings) if has_baseline else None
        )  # its layers are known, if not its weights
        give_baseline(callbacks, stage.name, partial(_baseline, settings, outcome) if outcome.baseline else untrained)
        has_baseline = has_baseline or stage.name == settings.baseline_after
        if stage.student is not None:
            outcome.module, known = build_module(settings, stage), True
        if stage.apply:
            _methods(stage, callbacks)
            known = False
        if known:
            trainer = build_trainer(settings, stage, folder, [*callbacks.values(), StopAfterPlan()], writes=False)
            with own_optimizer(outcome.module, stage), quiet(logging.WARNING), suppress(PlanReadyError):
                trainer.fit(outcome.module, datamodule=data)
        texts = [getattr(callback, "plan_text", "") or f"{name}: {UNKNOWN}" for name, callback in callbacks.items()]
        epochs = {**settings.trainer, **stage.trainer}.get("max_epochs")
        plans[stage.title] = "\n".join(texts) or f"train {epochs} epochs"
        known = known and not any(map(edits_structure, callbacks.values()))
    return plans


def _begin(settings: Settings, outcome: Outcome) -> list[Stage]:
    """Load the trained weights if there are any, and return the stages that this leaves to run."""
    stages = list(settings.stages)
    if not settings.model.get("checkpoint"):
        if not stages:
            raise ConfigurationError("`stages` is empty and `model.checkpoint` is null: nothing to do; give either")
        load_pretrained(outcome.module, settings.model.get("pretrained"))
        return stages
    load_weights(outcome.module, str(settings.model["checkpoint"]))
    outcome.baseline = _tensors(outcome.module)
    done = (i + 1 for i, one in enumerate(stages) if one.name == settings.baseline_after and one.rounds == 1)
    return stages[next(done, 0) :]


def _restore(settings: Settings, folder: RunFolder, records: list[dict[str, Any]], outcome: Outcome) -> None:
    """Take over what completed stages left."""
    name = records[-1]["name"]
    saved = folder.result(name)
    done = {record["name"] for record in records}
    begun = [stage for stage in settings.stages if stage.name in done and (stage.fresh or stage.student is not None)]
    outcome.module = build_module(settings, begun[-1] if begun else None)
    outcome.module.load_state_dict(saved["module"])
    outcome.carried = saved["carried"]
    outcome.history = [entry for record in records for entry in record["history"]]
    if settings.baseline_after in done:
        outcome.baseline = folder.result(str(settings.baseline_after))["module"]
    log.info("stage %s is done already", name)


def _baseline(settings: Settings, outcome: Outcome) -> LightningModule:
    module = build_module(settings)
    module.load_state_dict(dict(outcome.baseline))
    return module


def _tensors(module: LightningModule) -> dict[str, Any]:
    return {key: value.detach().cpu().clone() for key, value in module.state_dict().items()}


def _run_stage(
    settings: Settings, stage: Stage, folder: RunFolder, data: LightningDataModule, outcome: Outcome
) -> None:
    """Run one stage, put its result into ``outcome``, and record it as completed."""
    if stage.fresh or stage.student is not None:
        outcome.module, outcome.carried = build_module(settings, stage), {}
    index = [other.name for other in settings.stages].index(stage.name)
    callbacks = {name: build_callback(settings, name) for name in (*stage.callbacks, *stage.apply)}
    give_baseline(callbacks, stage.name, partial(_baseline, settings, outcome) if outcome.baseline else None)
    seed_everything(settings.seed + index, workers=True, verbose=False)
    started = time.monotonic()
    if stage.apply:
        inputs = example_inputs(outcome.module, data)
        outcome.module = compress(outcome.module, *_methods(stage, callbacks), example_inputs=inputs)
        outcome.carried, summary = {}, ", ".join(stage.apply)
    else:
        summary = _fit(settings, stage, folder, data, callbacks, outcome)
    history = [
        {"stage": stage.name, **entry}
        for callback in callbacks.values()
        if isinstance(callback, CompressionCallback)
        for entry in callback.history
    ]
    seconds = round(time.monotonic() - started, 3)
    record = {"name": stage.name, "history": history, "seconds": seconds}
    folder.complete(record, {"module": _tensors(outcome.module), "carried": outcome.carried})
    outcome.history += history
    log.info("stage %s: done in %.1f s; %s", stage.name, seconds, summary)


def _methods(stage: Stage, callbacks: Mapping[str, Callback]) -> list[CompressionCallback]:
    for name, callback in callbacks.items():
        if not isinstance(callback, CompressionCallback) or callback.needs_training:
            raise ConfigurationError(
                f"`stages.{stage.key}.apply` names {name!r}, a {type(callback).__name__}, which works only while "
                f"training; use `stages.{stage.key}.callbacks`"
            )
    return [callback for callback in callbacks.values() if isinstance(callback, CompressionCallback)]


def _fit(
    settings: Settings,
    stage: Stage,
    folder: RunFolder,
    data: LightningDataModule,
    callbacks: Mapping[str, Callback],
    outcome: Outcome,
) -> str:
    carry_over = CarryOver(callbacks, outcome.carried)
    carry_over.warn_about_the_rest(stage.key)
    last = folder.last_checkpoint(stage.name)
    trainer = build_trainer(settings, stage, folder, [ExactResume(), *callbacks.values(), carry_over])
    log.info("stage %s: %s", stage.name, f"goes on from {last.name}" if last else f"up to {trainer.max_epochs} epochs")
    before = count_parameters(outcome.module)
    with own_optimizer(outcome.module, stage):
        trainer.fit(outcome.module, datamodule=data, ckpt_path=last, weights_only=True)
    if outcome.history:
        warn_of_lost_zeros(stage.key, before, count_parameters(outcome.module))
    outcome.carried |= carried_states(callbacks)
    for callback in callbacks.values():
        if isinstance(callback, CompressionCallback) and isinstance(callback.compressed, LightningModule):
            outcome.module, outcome.carried = callback.compressed, {}
    return ", ".join(f"{name} {float(value):.4g}" for name, value in sorted(trainer.callback_metrics.items()))


def build_callback(settings: Settings, name: str) -> Callback:
    """Build one of the named callbacks."""
    given = settings.callbacks[name]
    if isinstance(given, Mapping) and "_target_" not in given:
        raise ConfigurationError(
            f"`callbacks.{name}` has no `_target_`, so nothing can be built of it: none of the chosen groups gives "
            f"one; choose callbacks/compress=[...,{name}] too, or take {name!r} out of the `callbacks` of the stages"
        )
    callback = build(f"callbacks.{name}", given)
    if not isinstance(callback, Callback):
        raise ConfigurationError(f"`callbacks.{name}._target_` must build a Callback, got {type(callback).__name__}")
    return callback


def build_trainer(
    settings: Settings, stage: Stage, folder: RunFolder, callbacks: list[Callback], writes: bool = True
) -> Trainer:
    """Build the Trainer of a stage: the common arguments, the stage's own, its log and its checkpoints.

    Args:
        settings: The checked configuration.
        stage: Its own arguments win.
        folder: Where logs and checkpoints go.
        callbacks: Those of the stage.
        writes: ``False`` for a Trainer without log and checkpoints.
    """
    where = f"stages.{stage.key}.trainer"
    arguments = {**settings.trainer, **stage.trainer, "_partial_": True}
    if arguments.get("enable_progress_bar") is None:
        arguments["enable_progress_bar"] = sys.stderr.isatty()
    configured = arguments.pop("logger", False)
    logger = _logger(configured, stage, folder) if writes else False
    if writes:
        callbacks = [*callbacks, *newest_checkpoints(folder.checkpoint_folder(stage.name), **settings.checkpoint)]
    make = build(where, arguments)
    try:
        trainer = make(logger=logger, callbacks=callbacks, enable_checkpointing=writes, default_root_dir=folder.path)
    except Exception as error:  # Lightning has several types for a wrong argument
        raise ConfigurationError(f"`{where}` (or `trainer`): {error}") from error
    if not isinstance(trainer, Trainer):
        raise ConfigurationError(f"`trainer._target_` must build a lightning Trainer, got {type(trainer).__name__}")
    if trainer.world_size > 1:
        raise ConfigurationError(
            f"`trainer.devices` gives {trainer.world_size} processes, but the command trains stage after stage in one; "
            "use one device here, or the callbacks in a script of your own under torchrun"
        )
    return trainer


def _logger(node: Any, stage: Stage, folder: RunFolder) -> Any:
    if not isinstance(node, Mapping):
        return node
    if not node.get("_partial_"):
        return build("trainer.logger", node)
    logs = folder.path / "logs"
    attempt = len(list((logs / stage.name).glob("*")))  # a resumed stage must not overwrite its first log
    place = {"save_dir": str(logs), "name": stage.name, "version": str(attempt)}
    return build("trainer.logger", {**node, **place, "_partial_": False})


def example_inputs(module: LightningModule, data: LightningDataModule) -> Any:
    """Return the module's ``example_input_array``, or the inputs of one batch of the data module."""
    if module.example_input_array is not None:
        return module.example_input_array
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.val_dataloader() if is_overridden("val_dataloader", data) else data.train_dataloader()))
    return example_in(module, batch)
