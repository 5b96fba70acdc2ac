"""The task of a plain network: a loss, an optimizer, and what to log."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.distillation.taps import pick


@dataclass(frozen=True)
class Supervised:
    """How to train a network that is no LightningModule, on batches ``(inputs, target)``.

    Args:
        loss: Called as ``loss(output, target)``.
        optimizer: Called with the parameters that need gradients, such as ``functools.partial(SGD, lr=0.1)``.
        scheduler: Called with the optimizer; stepped once an epoch.
        metric: Called as ``metric(output, target)``, logged as ``val/metric`` and ``test/metric``.

    Raises:
        ConfigurationError: If one of them cannot be called.
    """

    loss: Callable[[Any, Any], Tensor] = F.cross_entropy
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = Adam
    scheduler: Callable[[Optimizer], Any] | None = None
    metric: Callable[[Any, Any], Any] | None = None

    def __post_init__(self) -> None:
        for name in ("loss", "optimizer", "scheduler", "metric"):
            value = getattr(self, name)
            if not callable(value) and not (value is None and name in ("scheduler", "metric")):
                raise ConfigurationError(f"`{name}` of Supervised must be something to call, got {value!r}")

    def split(self, batch: Any) -> tuple[Any, Any]:
        """Return inputs and target.

        Raises:
            ConfigurationError: If a batch is no pair.
        """
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise ConfigurationError(
                f"`student` is a plain network, so a batch must be (inputs, target), got a {type(batch).__name__}; put "
                "the network into a LightningModule with a training_step of its own"
            )
        return batch[0], batch[1]

    def values(self, output: Any, target: Any) -> dict[str, Any]:
        """Return what is logged about one batch of other data than the training data."""
        found = {"loss": self.loss(pick(output), target)}
        return found if self.metric is None else {**found, "metric": self.metric(pick(output), target)}
