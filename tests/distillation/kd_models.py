"""Small students, teachers and data for the tests of distillation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_compress.data.order import ResumableLoader

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
}


def images() -> TensorDataset:
    """Return 24 fixed images of 6 x 6 in three classes."""
    generator = torch.Generator().manual_seed(5)
    pictures = torch.rand(24, 1, 6, 6, generator=generator)
    return TensorDataset(pictures, pictures.mean((1, 2, 3)).argsort().argsort() // 8)


class Net(nn.Module):
    """Two named layers with batch norm, an in-place ReLU, dropout, and a head."""

    def __init__(self, width: int = 4, dropout: float = 0.2) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.layer2 = nn.Sequential(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU())
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(2 * width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.layer2(self.layer1(x)).mean((2, 3))))


class Classifier(LightningModule):
    """An ordinary task: logs, a metric, hyper-parameters, a scheduler; it knows nothing of teachers."""

    def __init__(self, width: int = 4, dropout: float = 0.2, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.example_input_array = images().tensors[0][:2]
        self.net = Net(width, dropout)
        self.accuracy = MulticlassAccuracy(3, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        self.log("val/loss", F.cross_entropy(logits, batch[1]), sync_dist=True)
        self.log("val/accuracy", self.accuracy)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams["lr"], momentum=0.9, weight_decay=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    def train_dataloader(self) -> ResumableLoader:
        return ResumableLoader(images(), batch_size=6, seed=3)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(images(), batch_size=12, generator=torch.Generator())


class Manual(Classifier):
    """The same with manual optimization and two optimizers."""

    def __init__(self, width: int = 4) -> None:
        super().__init__(width)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> Any:
        body = [*self.net.layer1.parameters(), *self.net.layer2.parameters()]
        return torch.optim.SGD(body, lr=0.05), torch.optim.Adam(self.net.head.parameters(), lr=0.01)


def fit(module: LightningModule, callbacks: Any = (), epochs: int = 1, **kwargs: Any) -> Trainer:
    """Train quietly and return the trainer."""
    ckpt_path = kwargs.pop("ckpt_path", None)
    trainer = Trainer(max_epochs=epochs, callbacks=list(callbacks), **{**QUIET, **kwargs})
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer


def copied(module: nn.Module) -> dict[str, Tensor]:
    """Return the module's tensors, cloned."""
    return {key: value.clone() for key, value in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Tell whether two state_dicts are equal, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
