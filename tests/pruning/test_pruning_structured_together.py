"""Several callbacks that cut channels after one fit: each finds the indices that the others have left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_compress import NeuronMerging, Select, StructuredPruning, load_compressed, save_compressed

X = torch.rand(8, 1, 9, generator=torch.Generator().manual_seed(0))


class Task(LightningModule):
    """Two branches that are joined, a batch norm, a depthwise convolution, attention, and two Linears."""

    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = X
        self.a, self.b = nn.Conv1d(1, 8, 1), nn.Conv1d(1, 8, 3, padding=1)
        self.mix, self.norm, self.depth = nn.Conv1d(16, 12, 1), nn.BatchNorm1d(12), nn.Conv1d(12, 12, 3, groups=12)
        self.inner, self.attend = nn.Linear(12, 16), nn.MultiheadAttention(16, 4, batch_first=True)
        self.fc, self.head = nn.Linear(16, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([torch.relu(self.a(x)), torch.relu(self.b(x))], 1)
        x = self.inner(torch.relu(self.depth(self.norm(self.mix(x)))).transpose(1, 2))
        return self.head(torch.relu(self.fc(self.attend(x, x, x)[0].mean(1))))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch), torch.arange(len(batch)) % 3)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.01)


PAIRS: dict[str, list[Callback]] = {
    "branches": [
        StructuredPruning(0.5, select=Select(include="a"), name="a"),
        StructuredPruning(0.4, select=Select(include=("b", "mix")), name="b"),
    ],
    "everything": [StructuredPruning(0.3, name="a"), StructuredPruning(0.4, ranking="random", name="b")],
    "merged": [NeuronMerging(0.5, pairs=[["fc", "head"]]), StructuredPruning(0.4)],
}


@pytest.mark.parametrize("name", PAIRS)
def test_all_cuts_of_one_fit_are_made(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    task, (first, second) = Task(), PAIRS[name]
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=4, callbacks=[first, second], accelerator="cpu", enable_model_summary=False, **options)
    trainer.fit(task, torch.utils.data.DataLoader(X, 4))
    once, twice = first.compressed, second.compressed
    counts = [sum(p.numel() for p in net.parameters()) for net in (task, once, twice)]
    assert counts[0] > counts[1] > counts[2]
    assert twice.fc.weight.shape == (twice.fc.out_features, twice.fc.in_features)
    assert twice.mix.weight.shape[:2] == (twice.mix.out_channels, twice.mix.in_channels)
    with torch.no_grad():
        expected, found = task.eval()(X), twice.eval()(X)
        if name != "merged":  # merging says what the neurons that go had said, cutting does not
            assert float((expected - found).abs().max()) <= 1e-5 * float(expected.abs().max())
        save_compressed(twice, tmp_path / "cut")
        assert torch.equal(load_compressed(Task(), tmp_path / "cut").eval()(X), found)
