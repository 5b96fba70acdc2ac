"""A LightningModule that trains and tests any image classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torchmetrics.classification import MulticlassAccuracy

from lightning_compress.core.errors import ConfigurationError, did_you_mean

Batch = tuple[torch.Tensor, torch.Tensor]
Intervals = Literal["epoch", "step"]


class ImageClassifier(LightningModule):
    """Cross entropy and accuracy around a network.

    Logs ``train/loss``, ``val/loss``, ``val/accuracy``, ``test/loss`` and ``test/accuracy``. The checkpoint holds the
    network's tensors under ``net.`` and plain numbers as hyper-parameters, so it loads with ``weights_only=True``.

    Args:
        net: Maps images (batch, c, h, w) to logits (batch, num_classes).
        optimizer: Called with the parameters, such as ``functools.partial(torch.optim.SGD, lr=0.1)``; Adam with its
            default settings when left out.
        scheduler: Called with the optimizer, such as ``functools.partial(CosineAnnealingLR, T_max=20)``.
        interval: Advance the scheduler once per ``"epoch"`` or per ``"step"``.
        num_classes: Number of classes, at least 2.
        label_smoothing: Share in [0, 1) of the target spread over all classes while training.

    Raises:
        ConfigurationError: If ``interval``, ``num_classes`` or ``label_smoothing`` is outside what is accepted, or
            ``optimizer`` or ``scheduler`` cannot be called.

    >>> classifier = ImageClassifier(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), num_classes=3)
    >>> classifier(torch.zeros(2, 1, 2, 2)).shape
    torch.Size([2, 3])
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        scheduler: Callable[[Optimizer], LRScheduler | ReduceLROnPlateau] | None = None,
        interval: Intervals = "epoch",
        num_classes: int = 10,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        _check(optimizer, scheduler, interval, num_classes, label_smoothing)
        self.save_hyperparameters("interval", "num_classes", "label_smoothing")
        self.net = net
        self.optimizer = Adam if optimizer is None else optimizer
        self.scheduler = scheduler
        self.interval: Intervals = interval
        self.label_smoothing = label_smoothing
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images (batch, c, h, w) to logits (batch, num_classes)."""
        return self.net(images)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Return the cross entropy of one batch."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels, label_smoothing=self.label_smoothing)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and accuracy of the validation data."""
        self._evaluate(batch, "val", self.val_accuracy)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and accuracy of the test data."""
        self._evaluate(batch, "test", self.test_accuracy)

    def predict_step(self, batch: Batch | torch.Tensor, batch_idx: int) -> torch.Tensor:
        """Return the logits of one batch, with or without labels in it."""
        return self(batch if isinstance(batch, torch.Tensor) else batch[0])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer over the parameters that need gradients, and its scheduler."""
        optimizer = self.optimizer([parameter for parameter in self.parameters() if parameter.requires_grad])
        if self.scheduler is None:
            return optimizer
        settings: Any = {"scheduler": self.scheduler(optimizer), "interval": self.interval}
        if isinstance(settings["scheduler"], ReduceLROnPlateau):
            settings["monitor"] = "val/loss"
        return {"optimizer": optimizer, "lr_scheduler": settings}

    def _evaluate(self, batch: Batch, stage: str, accuracy: MulticlassAccuracy) -> None:
        images, labels = batch
        logits = self(images)
        accuracy(logits, labels)
        self.log(f"{stage}/loss", F.cross_entropy(logits, labels), prog_bar=True, sync_dist=True)
        self.log(f"{stage}/accuracy", accuracy, prog_bar=True)


def _check(optimizer: Any, scheduler: Any, interval: str, num_classes: int, label_smoothing: float) -> None:
    for name, value in (("optimizer", optimizer), ("scheduler", scheduler)):
        if value is not None and not callable(value):
            raise ConfigurationError(
                f"`{name}` must be something to call, such as functools.partial(torch.optim.Adam, lr=1e-3) "
                f"(in YAML: `_target_` with `_partial_: true`), got {type(value).__name__}"
            )
    if interval not in ("epoch", "step"):
        raise ConfigurationError(f"`interval` is unknown: {interval!r}; {did_you_mean(interval, ('epoch', 'step'))}")
    if num_classes < 2:
        raise ConfigurationError(f"`num_classes` must be at least 2, got {num_classes}")
    if not 0.0 <= label_smoothing < 1.0:
        raise ConfigurationError(f"`label_smoothing` must be in [0, 1), got {label_smoothing}")
