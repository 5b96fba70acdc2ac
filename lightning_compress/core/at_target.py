"""Lightning's checkpointing and early stopping, counting only once compression has reached its target.

A validation loss is lowest while the network is still dense, so a stock ``ModelCheckpoint`` would keep a dense "best"
model, and a stock ``EarlyStopping`` would stop when pruning makes the loss rise.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_compress.core.callback import CompressionCallback
from lightning_compress.core.clock import callbacks_of
from lightning_compress.core.errors import ConfigurationError


def at_target(trainer: Trainer) -> bool:
    """Return whether every compression callback of ``trainer`` has applied its final amount."""
    return all(c.at_target for c in callbacks_of(trainer) if isinstance(c, CompressionCallback))


class _WaitsForTarget(Callback):
    """Passes on to the class beside it what happens once the target is reached."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is a target to wait for."""
        if stage == "fit" and not any(isinstance(c, CompressionCallback) for c in callbacks_of(trainer)):
            user = type(self).__name__
            raise ConfigurationError(
                f"`callbacks` has {user} but no compression callback whose target it could wait for; "
                f"add one, or use Lightning's own class instead of {user}"
            )
        super().setup(trainer, pl_module, stage)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Act if at target."""
        if at_target(trainer):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Act if at target."""
        if at_target(trainer):
            super().on_train_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Act if at target."""
        if at_target(trainer):
            super().on_validation_end(trainer, pl_module)


class ModelCheckpointAtTarget(_WaitsForTarget, ModelCheckpoint):
    """:class:`~lightning.pytorch.callbacks.ModelCheckpoint` that saves nothing before the target is reached.

    Takes the same arguments. Use a second, ordinary ``ModelCheckpoint`` to be able to resume after a crash.
    """


class EarlyStoppingAtTarget(_WaitsForTarget, EarlyStopping):
    """:class:`~lightning.pytorch.callbacks.EarlyStopping` that starts to look once the target is reached.

    Takes the same arguments.
    """
