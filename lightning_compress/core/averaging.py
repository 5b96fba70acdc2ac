"""Callbacks that average weights: they copy the module in ``setup``, before later callbacks have edited it."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging

from lightning_compress.core.clock import callbacks_of

AVERAGING = (WeightAveraging, StochasticWeightAveraging)


def copy_again(trainer: Trainer, pl_module: LightningModule, callback: Callback) -> None:
    """Let the averaging callbacks that stand before ``callback`` copy the module as it is now.

    An average of another structure would mix up parameters, since it goes by their order.
    """
    callbacks = callbacks_of(trainer)
    for other in callbacks[: callbacks.index(callback)]:
        if isinstance(other, AVERAGING):
            other.setup(trainer, pl_module, "fit")
