"""The whole flow: train with quantization, resume, convert, export, run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from networks import Audio, Words
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import IntegerConversion, QuantizationAwareTraining, convert, export
from lightning_compress.data import DigitsDataModule
from lightning_compress.models import ImageClassifier

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


def run(path: Path, x: Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


def test_onnxruntime_is_as_accurate_on_digits_as_the_fake_quantized_network(tmp_path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip
    module, data = ImageClassifier(net, partial(torch.optim.Adam, lr=5e-3)), DigitsDataModule(batch_size=64)
    qat, integers = QuantizationAwareTraining(), IntegerConversion()
    Trainer(**QUIET, max_epochs=4, callbacks=[qat, integers], enable_checkpointing=False).fit(module, datamodule=data)
    images, labels = (torch.cat(parts) for parts in zip(*data.test_dataloader(), strict=True))
    with torch.no_grad():
        fake = module.eval()(images).argmax(1)
        converted = integers.compressed(images).argmax(1)
    made = export(integers.compressed, tmp_path / "digits", example_inputs=images[:2])
    ran = torch.from_numpy(run(made.path, images)).argmax(1)
    accuracy = [float((found == labels).float().mean()) for found in (fake, converted, ran)]
    assert accuracy[0] > 0.9
    assert accuracy[1] == pytest.approx(accuracy[0], abs=1.1 / len(labels))
    assert accuracy[2] == pytest.approx(accuracy[0], abs=1.1 / len(labels))


def inputs_of(name: str) -> Tensor:
    if name == "words":
        return torch.randint(0, 20, (4, 7))
    return torch.randn(4, 1, 64)


NETWORKS: dict[str, Callable[[], nn.Module]] = {"audio": Audio, "words": Words}


@pytest.mark.parametrize("name", [pytest.param("audio", marks=pytest.mark.slow), "words"])
def test_train_resume_convert_export_run(name: str, tmp_path) -> None:
    torch.manual_seed(0)
    x = inputs_of(name)
    data = DataLoader(TensorDataset(x, torch.arange(4) % 3), batch_size=2)

    def build(seed: int) -> ImageClassifier:
        torch.manual_seed(seed)
        return ImageClassifier(NETWORKS[name](), partial(torch.optim.SGD, lr=1e-3), num_classes=3)

    def fit(module: ImageClassifier, epochs: int, checkpoint: Path | None = None) -> None:
        callbacks = [QuantizationAwareTraining(start={"step": 0}, freeze={}), ModelCheckpoint(tmp_path, save_last=True)]
        trainer = Trainer(**QUIET, max_epochs=epochs, callbacks=callbacks)
        trainer.fit(module, data, data, ckpt_path=checkpoint, weights_only=True)

    fit(build(0), 1)
    module = build(1)
    fit(module, 2, tmp_path / "last.ckpt")
    module.eval()
    converted = convert(module, x)
    with torch.no_grad():
        fake, integers = module(x), converted(x)
    size = float(fake.square().mean().sqrt())
    assert float((integers - fake).square().mean().sqrt()) <= 0.1 * size
    made = export(converted, tmp_path / "net", example_inputs=x)  # runs it, and compares
    assert made.dynamic_batch
    got = run(made.path, x[:3])
    assert got.shape == fake[:3].shape
    assert float(np.sqrt(np.mean((got - fake[:3].numpy()) ** 2))) <= 0.25 * size
