"""Example inputs come from the data set, as the loader joins them, and disturb neither its position nor randomness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_compress import CompressionReport, ConfigurationError, StructuredPruning
from lightning_compress.core.examples import example_from
from lightning_compress.core.isolation import call
from lightning_compress.data.order import ResumableLoader
from lightning_compress.evaluation.baseline import first_sample


class Drawn(Dataset):
    """Random samples in whole batches."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        raise AssertionError("whole batches are asked for")

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.rand(len(indices), 3), torch.tensor(indices)


class Endless(IterableDataset):
    def __iter__(self):
        yield from [torch.zeros(1)]


def test_two_samples_and_nothing_moves() -> None:
    model, loader = nn.Linear(3, 1), ResumableLoader(Drawn(), batch_size=2, collate_fn=lambda batch: batch)
    position, randomness = loader.state_dict(), torch.get_rng_state()
    assert example_from(model, loader).shape == (2, 3)
    assert loader.state_dict() == position
    assert torch.equal(torch.get_rng_state(), randomness)


def test_the_first_loader_with_positions_is_taken() -> None:
    data = TensorDataset(torch.arange(5.0), torch.zeros(5))
    assert example_from(nn.Linear(1, 1), {"a": DataLoader(Endless()), "b": [DataLoader(data)]}).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("loaders", [None, DataLoader(Endless()), DataLoader([{"x": "text"}]), DataLoader([])])
def test_without_a_tensor_the_error_says_what_to_set(loaders) -> None:
    with pytest.raises(ConfigurationError, match="`example_input_array`"):
        example_from(nn.Linear(1, 1), loaders)


class Two(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Whole(nn.Module):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["x"] + batch["y"]


X, Y = torch.arange(3.0), torch.ones(3)
SAMPLES = {
    "tuple": (Two, [((x, y), 0) for x, y in zip(X, Y, strict=True)]),
    "names": (Two, [({"x": x, "y": y, "id": 7}, 0) for x, y in zip(X, Y, strict=True)]),
    "names and targets": (Two, [{"x": x, "y": y, "label": 0} for x, y in zip(X, Y, strict=True)]),
    "mapping": (Whole, [({"x": x, "y": y}, 0) for x, y in zip(X, Y, strict=True)]),
}


@pytest.mark.parametrize("kind", SAMPLES)
def test_an_example_is_what_forward_takes(kind: str) -> None:
    net, samples = SAMPLES[kind]
    model, loader = net(), DataLoader(samples, 2)
    assert call(model, example_from(model, loader)).tolist() == [1.0, 2.0]
    assert call(model, first_sample(model, next(iter(loader)))).tolist() == [1.0]


def test_inputs_that_forward_cannot_be_called_with_are_an_error_that_says_how_to_give_several() -> None:
    with pytest.raises(ConfigurationError, match=r"forward of Two cannot be called .*\(\(first, second\), targets\)"):
        example_from(Two(), DataLoader(TensorDataset(X, Y, Y), 2))


class Task(LightningModule):
    """Trains a network of two inputs on batches of one kind, whatever its own forward is asked for."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 16), nn.Linear(3, 16), nn.Linear(16, 2)
        self.whole = whole

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(F.relu(self.a(x) + self.b(y)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = (batch, batch["label"]) if self.whole else batch
        given = (inputs["x"], inputs["y"]) if isinstance(inputs, dict) else inputs
        return F.cross_entropy(self(*given), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("kind", ["tuple", "mapping", "names"])
def test_methods_that_run_the_model_take_their_example_from_such_batches(kind: str, tmp_path: Path) -> None:
    x, y = torch.randn(8, 4), torch.randn(8, 3)
    samples = {
        "tuple": [((a, b), 0) for a, b in zip(x, y, strict=True)],
        "mapping": [({"x": a, "y": b, "id": 3}, 0) for a, b in zip(x, y, strict=True)],
        "names": [{"x": a, "y": b, "label": 0} for a, b in zip(x, y, strict=True)],
    }[kind]
    cut, report = StructuredPruning(0.5), CompressionReport(gzip=False, latency=False)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, callbacks=[cut, report],
        enable_model_summary=False, log_every_n_steps=1, **options,
    )  # fmt: skip
    trainer.fit(Task(kind == "names"), DataLoader(samples, 4))
    assert cut.compressed is not None
    assert cut.compressed.a.out_features == 8
    assert report.report is not None
    assert report.report["compressed"]["macs"] == (4 + 3 + 2) * 8


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_examples_take_the_precision_of_the_model(precision: Any) -> None:
    x, y = torch.randn(8, 4), torch.randn(8, 3)
    task = Task(whole=False)
    task.example_input_array = (x, y)
    samples = [((a, b), 0) for a, b in zip(x, y, strict=True)]
    cut = StructuredPruning(0.5)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[cut], precision=precision, enable_model_summary=False, **options
    )  # fmt: skip
    trainer.fit(task, DataLoader(samples, 4))
    assert cut.compressed is not None
    assert cut.compressed.a.out_features == 8
