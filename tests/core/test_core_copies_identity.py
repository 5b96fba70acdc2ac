"""A copy that was made after metrics were logged can log them too."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from lightning_compress.core.copies import full_copy


class Logging(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.mean = nn.Linear(2, 1), MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.net(batch[0]).square().mean()
        self.mean(loss)
        self.log("mean", self.mean)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_copy_logs_its_own_metrics() -> None:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    }
    data = DataLoader(TensorDataset(torch.ones(4, 2)), batch_size=2)
    module = Logging()
    Trainer(**quiet).fit(module, data)
    copied = full_copy(module)
    trainer = Trainer(**quiet)
    trainer.fit(copied, data)
    assert float(trainer.callback_metrics["mean"]) > 0
    assert copied.mean is not module.mean
