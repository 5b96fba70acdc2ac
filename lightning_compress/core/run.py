"""What belongs to one running fit and must not outlive it: live layers, the resolved schedule, optimizer hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_compress.core.schedule import Timeline

Layers = Mapping[str, nn.Module]


class Run:
    """The part of a callback that is neither pickled nor saved.

    Args:
        layers: The selected layers of the module in training.
        timeline: The schedule in optimizer updates.

    Attributes:
        optimizers: Those of the fit, once something is to happen after each of their steps.
    """

    def __init__(self, layers: Layers, timeline: Timeline) -> None:
        self.layers = layers
        self.timeline = timeline
        self.optimizers: tuple[Optimizer, ...] = ()
        self._handles: list[Any] = []
        self._owned: dict[int, tuple[int, Layers]] = {}

    def after_each_step(self, optimizers: Iterable[Optimizer], action: Callable[[Layers, Optimizer], None]) -> None:
        """Call ``action`` under ``no_grad`` right after every step of each optimizer, with the layers it trains."""

        def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            with torch.no_grad():
                action(self.trained_by(optimizer), optimizer)

        self.optimizers = tuple(optimizers)
        self._handles.extend(optimizer.register_step_post_hook(hook) for optimizer in self.optimizers)

    def release(self) -> None:
        """Remove the hooks."""
        while self._handles:
            self._handles.pop().remove()

    def trained_by(self, optimizer: Optimizer) -> Layers:
        """Return the selected layers of which ``optimizer`` holds a parameter."""
        size = sum(len(group["params"]) for group in optimizer.param_groups)
        known = self._owned.get(id(optimizer))
        if known is None or known[0] != size:  # groups can grow while layers are unfrozen
            held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            mine = {
                path: layer
                for path, layer in self.layers.items()
                if any(id(parameter) in held for parameter in layer.parameters())
            }
            known = self._owned[id(optimizer)] = (size, mine)
        return known[1]

    def trained_by_none(self, optimizer: Optimizer) -> Layers:
        """Return the selected layers that no optimizer trains, if this is the first one; else nothing."""
        if not self.optimizers or optimizer is not self.optimizers[0]:
            return {}
        trained = {path for each in self.optimizers for path in self.trained_by(each)}
        return {path: layer for path, layer in self.layers.items() if path not in trained}
