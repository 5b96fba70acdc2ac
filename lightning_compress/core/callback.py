"""The base of every compression callback: it owns the Trainer's hooks, a method fills in blanks."""

from __future__ import annotations

import copy
import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, final

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_compress.core.checks import check_times, check_trainer
from lightning_compress.core.clock import UpdateClock, callbacks_of, gradient_scale, horizon_of, is_last_batch
from lightning_compress.core.copies import full_copy
from lightning_compress.core.errors import ConfigurationError, JournalMismatchError
from lightning_compress.core.examples import example_from, own_example
from lightning_compress.core.hooks import forget_undo, install_hooks, keep_undo
from lightning_compress.core.journal import Edit
from lightning_compress.core.paths import get_layer
from lightning_compress.core.plan import PlanRow, render_plan
from lightning_compress.core.run import Layers, Run
from lightning_compress.core.schedule import Schedule, Timeline
from lightning_compress.core.select import Select, Selection
from lightning_compress.core.verbs import apply


class CompressionCallback(Callback, ABC):
    """A compression method on a Lightning Trainer: *where* (:class:`Select`), *when and how much* (:class:`Schedule`).

    The hooks are final; a method fills in the blanks below, most of which get the selected layers by path. Inside
    ``fit`` only values change; structure changes in ``prepare`` (before optimizers exist) and ``finalize`` (after
    fit, on a copy).

    Args:
        schedule: When and how much.
        select: Which layers.
        name: Tells two callbacks of one class apart, in checkpoints and metric names.

    Attributes:
        history: One mapping per update: ``step`` (updates applied), ``epoch``, ``amount`` and the method's metrics.
        compressed: After fit, a copy of the module with the final edits, if the method has any; else ``None``.
        plan_text: The plan as it was printed.
    """

    supported: ClassVar[tuple[type[nn.Module], ...]] = ()
    """Layer types the method can work on."""
    runs_after: ClassVar[tuple[type[Callback], ...]] = ()
    """Callbacks that must stand before this one in the Trainer's list."""
    runs_before: ClassVar[tuple[type[Callback], ...]] = ()
    """Callbacks that must stand after this one."""
    conflicts_with: ClassVar[tuple[type[Callback], ...]] = ()
    """Callbacks that cannot be used together with this one."""
    needs_training: ClassVar[str] = ""
    """Why the method is no way to compress a trained model at once; empty if it is one."""

    def __init__(self, schedule: Schedule, select: Select, name: str | None = None) -> None:
        if not isinstance(schedule, Schedule):
            raise ConfigurationError(f"`schedule` must be a Schedule, got {schedule!r}")
        if not isinstance(select, Select):
            raise ConfigurationError(f"`select` must be a Select, got {select!r}")
        self.schedule = schedule
        self.select = select
        self.name = name
        self.history: list[dict[str, Any]] = []
        self.compressed: nn.Module | None = None
        self.plan_text = ""
        self._clock = UpdateClock()
        self._amount: float | None = None
        self._floor = 0.0
        self._paths: tuple[str, ...] = ()
        self._left: dict[str, str] = {}
        self._logged: dict[str, float] = {}
        self._created_in = os.getpid()
        self._module_ref: weakref.ref[nn.Module] | None = None
        self._run: Run | None = None

    # ------------------------------------------------------------------ blanks

    def choose(self, root: nn.Module) -> Selection:
        """Return the layers to work on; by default what ``select`` means among the supported types."""
        return self.select.resolve(root, self.supported)

    def prepare(self, layers: Layers) -> Iterable[Edit]:
        """Return the edits to make before optimizers exist; none for layers that have them already."""
        return ()

    def examine(self, root: nn.Module, example_inputs: Any) -> Selection:
        """Look at the whole model with one batch, and return the layers to work on; after ``prepare``, before training.

        For methods that must run the model to know it. ``example_inputs`` are those of ``compress``, the module's
        ``example_input_array``, or the first samples of the training data.
        """
        return self.choose(root)

    def observe(self, layers: Layers) -> None:
        """Look at gradients, unscaled but not clipped, right before an optimizer step."""

    def before_step(self, layers: Layers, optimizer: Optimizer, scale: float) -> None:
        """Change gradients, not clipped yet, of the layers that ``optimizer`` trains, right before it steps.

        ``scale`` is what they are multiplied with: 1, unless a fused optimizer unscales them itself.
        """

    def after_step(self, layers: Layers, optimizer: Optimizer) -> None:
        """Change values as a part of every optimizer step; called under ``no_grad``, before :meth:`enforce`."""

    @abstractmethod
    def update(self, layers: Layers, amount: float) -> None:
        """Change values to the given amount; called under ``no_grad`` after an optimizer step, when due."""

    def enforce(self, layers: Layers) -> None:
        """Re-impose what holds between updates (zeros); called under ``no_grad`` after every optimizer step."""

    def pending(self, layers: Layers) -> bool:
        """Return whether a layer that could not be changed at the last update (it was frozen) can be changed now."""
        return False

    def enforce_state(self, state_dict: dict[str, Any]) -> None:
        """Re-impose the same on a ``state_dict`` that is about to be saved, which may hold averaged weights."""

    def finalize(self, layers: Layers) -> Iterable[Edit]:
        """Return the edits to make after fit, on a copy of the module; may look at values."""
        return ()

    def metrics(self, layers: Layers) -> Mapping[str, float]:
        """Return what to log as ``compress/<name>``; computed after each update."""
        return {}

    def values(self) -> dict[str, Any]:
        """Return the method's own state for a checkpoint: tensors and builtins only."""
        return {}

    def load_values(self, values: Mapping[str, Any]) -> None:
        """Take back what :meth:`values` returned."""

    def attach_values(self, layers: Layers) -> None:
        """Fit the loaded values to the model, before training starts; raise if they do not fit."""

    def reset_values(self) -> None:
        """Forget the method's own state; called when the callback meets another model."""

    def plan(self, layers: Layers) -> list[PlanRow]:
        """Return what will happen to each layer. Raises for settings that do not fit the model."""
        return [PlanRow("select", path, type(layer).__name__, "compress") for path, layer in layers.items()]

    # ------------------------------------------------------------------ what others may ask

    @property
    @final
    def at_target(self) -> bool:
        """Whether the schedule's final amount has been applied."""
        return self._amount is not None and self._amount >= self.schedule.final

    @property
    @final
    def in_fit(self) -> bool:
        """Whether a Trainer is training the model now, as opposed to :meth:`run_once`."""
        return self._run is not None

    @property
    @final
    def updates(self) -> int:
        """Number of optimizer updates this callback has counted."""
        return self._clock.updates

    @property
    @final
    def module(self) -> nn.Module:
        """The whole module that a Trainer is given, from ``setup`` on."""
        module = self._module_ref() if self._module_ref is not None else None
        if module is None:
            raise ConfigurationError(f"{self.state_key} has met no module yet; give it to a Trainer and call fit")
        return module

    @final
    def layers(self, root: nn.Module) -> dict[str, nn.Module]:
        """Return the selected layers of ``root``, which may be a copy of the module that was trained."""
        return {path: get_layer(root, path) for path in self._paths}

    @final
    def run_once(self, model: nn.Module, example_inputs: Any = None) -> nn.Module:
        """Compress a trained ``model`` in place, straight to the final amount, without a Trainer.

        Args:
            model: Any module; its weights are used as they are.
            example_inputs: One batch, for methods that run the model; by default its ``example_input_array``.

        Returns:
            The same object.

        Raises:
            SelectionError: If no layer is selected.
            ConfigurationError: If the method works only while a model trains, or if it runs the model and there are
                no example inputs.
        """
        if self.needs_training:
            raise ConfigurationError(
                f"{self.state_key} works only while a model trains: {self.needs_training}. Give it to a Trainer"
            )
        self._forget_model()
        self._resolve(model)
        install_hooks(model)
        with torch.no_grad():
            _apply_all(model, self.prepare(self.layers(model)))
            self._examine(model, own_example(model) if example_inputs is None else example_inputs, None)
            self._change(self.layers(model), self.schedule.final, epoch=0)
            _apply_all(model, self.finalize(self.layers(model)))
        return model

    # ------------------------------------------------------------------ hooks

    @property
    @final
    def state_key(self) -> str:
        """Key of this callback's state in a checkpoint; Lightning refuses two callbacks with the same key."""
        return type(self).__qualname__ + (f"[{self.name}]" if self.name else "")

    @final
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Select the layers and make the first edits, before optimizers exist."""
        install_hooks(pl_module)
        if stage != "fit":
            return
        check_trainer(self, trainer)
        check_times(self.schedule, trainer)
        if _overrides(self, "finalize") and os.getpid() != self._created_in:
            raise ConfigurationError(
                f"{type(self).__name__} edits the model after fit, and a strategy that spawns or forks processes loses "
                "that edit; use strategy='ddp', or run without a spawning strategy"
            )
        if is_overridden("configure_model", pl_module):
            pl_module.configure_model()
        known = self._module_ref() if self._module_ref is not None else None
        if known is not pl_module:
            self._forget_model()
            self._resolve(pl_module)
        elif trainer.global_step == 0:
            self._floor, self._clock = self._amount or 0.0, UpdateClock()
        self._module_ref = weakref.ref(pl_module)
        self.compressed = None
        keep_undo(pl_module)
        _apply_all(pl_module, self.prepare(self.layers(pl_module)))

    @final
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that lacks the edits of this callback; by now the journal has been replayed."""
        if not _overrides(self, "prepare") or trainer.state.fn != "fit" or not self._paths:
            return
        missing = next(iter(self.prepare(self.layers(pl_module))), None)
        if missing is not None:
            raise JournalMismatchError(
                f"the checkpoint was written without {missing!s}, which {self.state_key} makes before training. "
                "Resume with the callbacks it was written with, or load its weights first and start a new fit"
            )

    @final
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the edits final: a checkpoint would have been loaded by now."""
        forget_undo(pl_module)

    @final
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resolve the schedule against the run, check and print the plan, and hook into the optimizers.

        Not earlier: asking for the length of the training data before Lightning has restored its loops would keep a
        loader's saved position from being restored.
        """
        horizon, clamp = horizon_of(trainer), bool(getattr(trainer, "fast_dev_run", False))
        self.schedule.resolve(horizon, clamp)  # wrong times are an error before values are touched
        self._examine(pl_module, own_example(pl_module), trainer.train_dataloader)
        layers = self.layers(pl_module)
        self.attach_values(layers)
        timeline = self.schedule.resolve(horizon, clamp)  # the values may say how far a schedule over fits has come
        run = Run(layers, timeline)
        rows = [*self.plan(run.layers), *(PlanRow("kept", path, "", why) for path, why in self._left.items())]
        self.plan_text = render_plan(f"{self.state_key}: {timeline}", rows)
        rank_zero_info(self.plan_text)
        self._run = run
        self._clock.start(trainer)
        if _overrides(self, "enforce"):
            self._enforce()
        if _overrides(self, "enforce") or _overrides(self, "after_step"):
            run.after_each_step(trainer.optimizers, self._after_step)

    @final
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Let the method see the gradients, and change them."""
        if self._run is None:
            return
        with torch.no_grad():
            if _overrides(self, "observe"):
                self.observe(self._run.layers)
            if _overrides(self, "before_step"):
                self.before_step(self._run.trained_by(optimizer), optimizer, gradient_scale(trainer, optimizer))

    @final
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the update and, when the schedule says so, let the method change values; before any validation."""
        if self._run is None:
            return
        applied, t = self._clock.tick(trainer), self._clock.updates - 1
        last = is_last_batch(trainer)
        amount = self._due_amount(self._run.timeline, t, last) if applied or last else None
        if applied and amount is None and batch_idx == 0 and self.at_target and self.pending(self._run.layers):
            amount = self._amount
        if amount is not None:
            with torch.no_grad():
                self._change(self._run.layers, amount, trainer.current_epoch)
        self._log(trainer, pl_module, force=amount is not None or t == 0)

    @final
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Enforce values after callbacks that put other weights into the module (stochastic weight averaging)."""
        self._enforce()

    @final
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Enforce values on averaged weights, so that what is validated is what is saved."""
        self._enforce()

    @final
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Enforce values on the weights in the file, which may be averaged ones."""
        if _overrides(self, "enforce_state"):
            with torch.no_grad():
                self.enforce_state(checkpoint["state_dict"])

    @final
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Enforce values once more and say so if the run ended before the target."""
        self._enforce()
        if self._run is not None and not self.at_target:
            rank_zero_warn(
                f"{self.state_key}: training ended after {self._clock.updates} optimizer updates at amount "
                f"{self._amount or 0.0:.4g}; the target {self.schedule.final:.4g} was due at update "
                f"{self._run.timeline.end + 1}. Train longer, or let the schedule end earlier"
            )

    @final
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the final edits on a copy, so that the checkpoints of this fit still fit the module."""
        if not _overrides(self, "finalize"):
            return
        callbacks = callbacks_of(trainer)
        earlier = [c for c in callbacks[: callbacks.index(self)] if isinstance(c, CompressionCallback)]
        source = next((c.compressed for c in reversed(earlier) if c.compressed is not None), pl_module)
        with torch.no_grad():
            compressed = full_copy(source)
            _apply_all(compressed, self.finalize(self.layers(compressed)))
        self.compressed = compressed

    @final
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the run."""
        self._forget_run(pl_module)

    @final
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the run."""
        self._forget_run(pl_module)

    @final
    def state_dict(self) -> dict[str, Any]:
        """Return position, history and the method's values: tensors and builtins only."""
        return {
            "version": 1,
            "updates": self._clock.updates,
            "amount": self._amount,
            "floor": self._floor,
            "history": copy.deepcopy(self.history),
            "values": self.values(),
        }

    @final
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the position, history and values of a checkpoint."""
        if state_dict.get("version") != 1:
            raise ConfigurationError(
                f"the checkpoint's state of {self.state_key} has version {state_dict.get('version')!r}, this release "
                "reads version 1; install the lightning-compress that wrote it"
            )
        self._clock = UpdateClock(state_dict["updates"])
        self._amount = state_dict["amount"]
        self._floor = state_dict["floor"]
        self.history = copy.deepcopy(state_dict["history"])
        self._logged = {k: v for k, v in (self.history[-1] if self.history else {}).items() if k not in _POSITION}
        self.load_values(state_dict["values"])

    @final
    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a running fit, so that callbacks pickle and deepcopy at any time."""
        state = {**self.__dict__, "_run": None, "_module_ref": None}
        return {key: value for key, value in state.items() if key not in ("log", "log_dict")}  # the module's, lent

    # ------------------------------------------------------------------ inside

    def _resolve(self, root: nn.Module) -> None:
        selection = self.choose(root)
        self._paths, self._left = tuple(selection.layers), dict(selection.left)

    def _examine(self, root: nn.Module, example_inputs: Any, loaders: Any) -> None:
        if _overrides(self, "examine"):
            inputs = example_from(loaders) if example_inputs is None else example_inputs
            selection = self.examine(root, inputs)
            self._paths, self._left = tuple(selection.layers), dict(selection.left)

    def _forget_run(self, pl_module: LightningModule) -> None:
        forget_undo(pl_module)
        if self._run is not None:
            self._run.release()
        self._run = None

    def _forget_model(self) -> None:
        self._clock, self._amount, self._floor = UpdateClock(), None, 0.0
        self.history, self._logged, self.compressed = [], {}, None
        self.reset_values()

    def _due_amount(self, timeline: Timeline, t: int, last: bool) -> float | None:
        """Return the amount to apply after update ``t``, or ``None``; catches up where a schedule time was skipped.

        It never falls, also when a run is resumed under another schedule: what was taken would come back untrained.
        """
        least = max(self._floor, self._amount or 0.0)
        if (timeline.reached(t) or last) and not self.at_target:
            return max(self.schedule.final, least)
        return max(timeline.amount(t), least) if timeline.due(t) else None

    def _change(self, layers: Layers, amount: float, epoch: int) -> None:
        self.update(layers, amount)
        self._amount = amount
        self._logged = {key: float(value) for key, value in self.metrics(layers).items()}
        self.history.append({"step": self._clock.updates, "epoch": epoch, "amount": amount, **self._logged})

    def _after_step(self, layers: Layers, optimizer: Optimizer) -> None:
        self.after_step(layers, optimizer)
        self.enforce(layers)

    def _enforce(self) -> None:
        if self._run is not None and _overrides(self, "enforce"):
            with torch.no_grad():
                self.enforce(self._run.layers)

    def _log(self, trainer: Trainer, pl_module: LightningModule, force: bool) -> None:
        every = getattr(trainer, "log_every_n_steps", 50) or 1
        if force or trainer.global_step % every == 0:
            prefix = f"compress/{self.name}/" if self.name else "compress/"
            logged: dict[str, Any] = {prefix + key: value for key, value in self._logged.items()}
            pl_module.log_dict({**logged, prefix + "at_target": float(self.at_target)}, on_step=True, on_epoch=False)


_POSITION = ("step", "epoch", "amount")


def _overrides(callback: CompressionCallback, blank: str) -> bool:
    return getattr(type(callback), blank) is not getattr(CompressionCallback, blank)


def _apply_all(root: nn.Module, edits: Iterable[Edit]) -> None:
    for edit in list(edits):
        apply(root, edit)
