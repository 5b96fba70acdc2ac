"""A copy stands on its own: it logs its own metrics, and merges its own parametrizations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
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


@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
def test_merging_in_a_copy_leaves_the_parametrized_original_alone(norm) -> None:
    net = nn.Sequential(norm(nn.Linear(4, 3)), nn.Linear(3, 2)).eval()
    x = torch.randn(5, 4)
    with torch.no_grad():
        expected = net(x)
        copied = full_copy(net)
        parametrize.remove_parametrizations(copied[0], "weight")
        assert torch.allclose(copied(x), expected, atol=1e-6)
        assert torch.equal(net(x), expected)
        parametrize.remove_parametrizations(net[0], "weight")
        assert torch.allclose(copied(x), expected, atol=1e-6)
        assert torch.allclose(net(x), expected, atol=1e-6)
