"""A compression method apart from any Trainer: where it works, how far it has come, and how to apply it at once."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from typing import Any, final

import torch
from torch import nn

from lightning_compress.core.blanks import Blanks
from lightning_compress.core.clock import UpdateClock
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.examples import beside, example_from, own_example
from lightning_compress.core.hooks import install_hooks
from lightning_compress.core.journal import Edit
from lightning_compress.core.paths import get_layer
from lightning_compress.core.run import Layers, Run
from lightning_compress.core.schedule import Schedule, Timeline
from lightning_compress.core.select import Select
from lightning_compress.core.verbs import apply


class Method(Blanks):
    """The part of a :class:`~lightning_compress.core.callback.CompressionCallback` that knows no Trainer.

    Args:
        schedule: When and how much.
        select: Which layers.
        name: Tells two callbacks of one class apart, in checkpoints and metric names.
    """

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
        self._run: Run | None = None
        self._at_once = False

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
    def at_once(self) -> bool:
        """Whether :meth:`run_once` is compressing a model now."""
        return self._at_once

    @property
    @final
    def selected(self) -> tuple[str, ...]:
        """Paths of the selected layers, as soon as the model is known."""
        return self._paths

    @property
    @final
    def updates(self) -> int:
        """Number of optimizer updates this callback has counted."""
        return self._clock.updates

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
        self._at_once = True
        try:
            self._resolve(model)
            install_hooks(model)
            with torch.no_grad():
                apply_all(model, self.prepare(self.layers(model)))
                self._examine(model, own_example(model) if example_inputs is None else example_inputs, None)
                self._change(self.layers(model), self.schedule.final, epoch=0)
                apply_all(model, self.finalize(self.layers(model)))
        finally:
            self._at_once = False
        return model

    @property
    @final
    def state_key(self) -> str:
        """Key of this callback's state in a checkpoint; Lightning refuses two callbacks with the same key."""
        return type(self).__qualname__ + (f"[{self.name}]" if self.name else "")

    @final
    def state(self) -> dict[str, Any]:
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

    # ------------------------------------------------------------------ for the callback

    def _resolve(self, root: nn.Module) -> None:
        selection = self.choose(root)
        self._paths, self._left = tuple(selection.layers), dict(selection.left)

    def _examine(self, root: nn.Module, example_inputs: Any, loaders: Any) -> None:
        if overrides(self, "examine"):
            inputs = example_inputs
            if inputs is None:
                with nullcontext() if self.needs_example else suppress(ConfigurationError):
                    inputs = example_from(root, loaders)
            selection = self.examine(root, beside(root, inputs))
            self._paths, self._left = tuple(selection.layers), dict(selection.left)

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


_POSITION = ("step", "epoch", "amount")


def overrides(method: Method, blank: str) -> bool:
    """Return whether a method fills in a blank."""
    return getattr(type(method), blank) is not getattr(Method, blank)


def apply_all(root: nn.Module, edits: Iterable[Edit]) -> None:
    """Make edits one after the other."""
    for edit in list(edits):
        apply(root, edit)
