"""The base of every compression callback: it owns the Trainer's hooks, a method fills in blanks."""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar, cast, final

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_compress.core.averaging import copy_again
from lightning_compress.core.checks import after_fit, check_times, check_trainer
from lightning_compress.core.clock import (
    UpdateClock,
    callbacks_of,
    gradient_scale,
    horizon_of,
    is_last_batch,
    may_be_last_batch,
)
from lightning_compress.core.copies import full_copy
from lightning_compress.core.errors import CompressionError, ConfigurationError, JournalMismatchError
from lightning_compress.core.examples import own_example
from lightning_compress.core.hooks import forget_undo, install_hooks, journal_of, keep_undo
from lightning_compress.core.method import Method, apply_all, overrides
from lightning_compress.core.pairs import check_layers, check_places
from lightning_compress.core.plan import PlanRow, render_plan
from lightning_compress.core.run import Layers, Run
from lightning_compress.core.schedule import Schedule
from lightning_compress.core.select import Select

_FunctionT = TypeVar("_FunctionT", bound=Callable[..., Any])


def _like_the_base(state_dict: _FunctionT) -> _FunctionT:
    """Mark it so that Lightning leaves it to us (``check_trainer``) to ask callbacks for keys of their own."""
    return cast(_FunctionT, functools.wraps(Callback.state_dict, assigned=(), updated=())(state_dict))


class CompressionCallback(Method, Callback):
    """A compression method on a Lightning Trainer: *where* (:class:`Select`), *when and how much* (:class:`Schedule`).

    The hooks are final; a method fills in the blanks of :class:`~lightning_compress.core.blanks.Blanks`. Inside
    ``fit`` only values change; structure changes in ``prepare`` (before optimizers exist) and ``finalize`` (after fit,
    on a copy).

    Args:
        schedule: When and how much.
        select: Which layers.
        name: Tells two callbacks of one class apart, in checkpoints and metric names.

    Attributes:
        history: One mapping per update: ``step`` (updates applied), ``epoch``, ``amount`` and the method's metrics.
        compressed: After fit, a copy of the module with the final edits, if the method has any; else ``None``.
        plan_text: The plan as it was printed.
    """

    counts_fits: ClassVar[bool] = False
    """Whether each fit is a round, so that one of a Trainer that is at its end already is refused."""

    def __init__(self, schedule: Schedule, select: Select, name: str | None = None) -> None:
        super().__init__(schedule, select, name)
        self._created_in = os.getpid()
        self._module_ref: weakref.ref[nn.Module] | None = None
        self._edited = False

    @property
    @final
    def module(self) -> nn.Module:
        """The whole module that a Trainer is given, from ``setup`` on."""
        module = self._module_ref() if self._module_ref is not None else None
        if module is None:
            raise ConfigurationError(f"{self.state_key} has met no module yet; give it to a Trainer and call fit")
        return module

    # ------------------------------------------------------------------ hooks

    @final
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Select the layers and make the first edits, before optimizers exist."""
        install_hooks(pl_module)
        if stage != "fit":
            return
        check_trainer(self, trainer)
        check_times(self.schedule, trainer)
        if overrides(self, "finalize") and os.getpid() != self._created_in:
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
        edits = list(self.prepare(self.layers(pl_module)))
        if edits and not journal_of(pl_module):
            copy_again(trainer, pl_module, self)  # with hooks, so that a checkpoint replays its own edits on the copy
        self._edited = bool(edits)
        apply_all(pl_module, edits)

    @final
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that lacks the edits of this callback; by now the journal has been replayed."""
        if not overrides(self, "prepare") or trainer.state.fn != "fit" or not self._paths:
            return
        missing = next(iter(self.prepare(self.layers(pl_module))), None)
        if missing is not None:
            raise JournalMismatchError(
                f"the checkpoint was written without {missing!s}, which {self.state_key} makes before training. "
                "Resume with the callbacks it was written with, or load its weights first and start a new fit"
            )

    @final
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the edits final: a checkpoint would have been loaded by now, and all callbacks know their layers."""
        check_layers(self, callbacks_of(trainer))
        check_places(self, callbacks_of(trainer), self.layers(pl_module))
        forget_undo(pl_module)
        if self._edited and trainer.ckpt_path is None:
            copy_again(trainer, pl_module, self)
        self._edited = False

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
        if overrides(self, "enforce"):
            self._enforce()
        if overrides(self, "enforce") or overrides(self, "after_step"):
            run.after_each_step(trainer.optimizers, self._after_step)

    @final
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Let the method look at the batch that comes before an update."""
        if self._run is None or not overrides(self, "anticipate"):
            return
        timeline, t = self._run.timeline, self._clock.updates
        last = may_be_last_batch(trainer)
        late = (timeline.reached(t) or last) and not self.at_target
        if timeline.due(t) or late or ((batch_idx == 0 or last) and self.at_target and self.pending(self._run.layers)):
            self.anticipate(self._run.layers)

    @final
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Let the method see the gradients, and change them."""
        if self._run is None:
            return
        with torch.no_grad():
            if overrides(self, "observe"):
                self.observe(self._run.layers)
            if overrides(self, "before_step"):
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
        if applied and amount is None and (batch_idx == 0 or last) and self.at_target:
            amount = self._amount if self.pending(self._run.layers) else None
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
        if overrides(self, "enforce_state"):
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
        if not overrides(self, "finalize"):
            return
        callbacks = callbacks_of(trainer)
        earlier = [c for c in callbacks[: callbacks.index(self)] if isinstance(c, CompressionCallback)]
        source = next((c.compressed for c in reversed(earlier) if c.compressed is not None), pl_module)
        with torch.no_grad():
            compressed = full_copy(source)
            try:
                apply_all(compressed, self.finalize(self.layers(compressed)))
            except CompressionError as error:
                raise after_fit(self, error) from error
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
    @_like_the_base
    def state_dict(self) -> dict[str, Any]:
        """Return position, history and the method's values: tensors and builtins only."""
        return self.state()

    @final
    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a running fit, so that callbacks pickle and deepcopy at any time."""
        state = {**self.__dict__, "_run": None, "_module_ref": None}
        return {key: value for key, value in state.items() if key not in ("log", "log_dict")}  # the module's, lent

    # ------------------------------------------------------------------ inside

    def _forget_run(self, pl_module: LightningModule) -> None:
        forget_undo(pl_module)
        if self._run is not None:
            self._run.release()
            self.release()
        self._run = None

    def _after_step(self, layers: Layers, optimizer: Optimizer) -> None:
        self.after_step(layers, optimizer)
        self.enforce(layers)

    def _enforce(self) -> None:
        if self._run is not None and overrides(self, "enforce"):
            with torch.no_grad():
                self.enforce(self._run.layers)

    def _log(self, trainer: Trainer, pl_module: LightningModule, force: bool) -> None:
        every = getattr(trainer, "log_every_n_steps", 50) or 1
        if force or trainer.global_step % every == 0:
            prefix = f"compress/{self.name}/" if self.name else "compress/"
            logged: dict[str, Any] = {prefix + key: value for key, value in self._logged.items()}
            pl_module.log_dict({**logged, prefix + "at_target": float(self.at_target)}, on_step=True, on_epoch=False)
