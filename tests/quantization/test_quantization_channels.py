"""Quantized layers that lose channels: what their quantizers hold for each channel goes with the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from networks import Small, Words, calibrate, quantize, randomize
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import (
    ConfigurationError,
    IntegerConversion,
    QuantizationAwareTraining,
    SelectionError,
    StructuredPruning,
    compress,
    load_compressed,
    save_compressed,
)
from lightning_compress.core.companions import companions_of
from lightning_compress.pruning.structured.trace import coupled_groups
from lightning_compress.quantization import convert
from lightning_compress.quantization.layers import quantize_layer
from lightning_compress.quantization.quantizer import Quantizer

IMAGES = torch.randn(16, 1, 16, 16, generator=torch.Generator().manual_seed(2))


class Task(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Small()
        self.example_input_array = IMAGES[:2]

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(IMAGES, torch.arange(16) % 3), batch_size=4)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def trainer(folder: Path, *callbacks: Any) -> Trainer:
    seed_everything(0, verbose=False)
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(max_epochs=3, callbacks=list(callbacks), default_root_dir=folder, accelerator="cpu", **quiet)


def ranges_fit(model: nn.Module) -> bool:
    """Whether every quantizer of a weight has one range, or as many as the weight has channels."""
    sizes = [
        (layer.get_submodule(each.path).get_buffer("zero_point").numel(), getattr(layer, each.weight).shape[each.dim])
        for layer in model.modules()
        for each in companions_of(layer)
    ]
    return bool(sizes) and all(ranges == channels for ranges, channels in sizes)


@pytest.mark.parametrize("kind", ["minmax", "lsq"])
def test_by_hand(kind: str) -> None:
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    net[0].weight.data.copy_(torch.tensor([[4.0, 8.0], [1.0, 0.0], [8.0, 4.0], [0.0, 1.0]]))
    quantize_layer(net[0], {"symmetric": True, "per_channel": True, "range": kind})
    held = net[0].weight_quantizer
    held.set_range(torch.tensor([0.5, 0.25, 1.0, 0.125]))
    held.enabled = True
    smaller = compress(net, StructuredPruning(0.5), example_inputs=torch.zeros(1, 2))
    kept = smaller[0].weight_quantizer
    assert smaller[0].weight.tolist() == [[4.0, 8.0], [8.0, 4.0]]
    assert kept.scale.tolist() == [0.5, 1.0]
    assert kept.zero_point.tolist() == [0, 0]
    assert isinstance(kept.scale, nn.Parameter) == (kind == "lsq")
    assert held.scale.tolist() == [0.5, 0.25, 1.0, 0.125]  # a copy was asked for


@pytest.mark.parametrize("net", [Small, Words])
def test_a_cut_network_becomes_integers_exactly(net: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = randomize(net()).eval()
    x = torch.randint(0, 20, (4, 7)) if net is Words else IMAGES
    quantize(model)
    calibrate(model, x)
    smaller = compress(model, StructuredPruning(0.4), example_inputs=x)
    assert sum(p.numel() for p in smaller.parameters()) < 0.8 * sum(p.numel() for p in model.parameters())
    assert ranges_fit(smaller)
    with torch.no_grad():
        fake, converted = smaller(x), convert(smaller)
        assert torch.allclose(converted(x), fake, atol=2e-2 * float(fake.abs().max()))
        save_compressed(converted, tmp_path / "small.safetensors")
        loaded = load_compressed(net(), tmp_path / "small.safetensors").eval()
        assert torch.equal(loaded(x), converted(x))


@pytest.mark.parametrize("kind", ["minmax", "lsq"])
@pytest.mark.parametrize("first", [True, False])
def test_pruned_and_quantized_in_one_fit(kind: str, first: bool, tmp_path: Path) -> None:
    pair = [StructuredPruning(0.4), QuantizationAwareTraining({"range": kind}, start="50%", freeze={})]
    integers = IntegerConversion()
    model = Task()
    trainer(tmp_path, *(pair if first else pair[::-1]), integers).fit(model)
    for module in model.modules():  # channels that are zero keep a range that divides
        if isinstance(module, Quantizer):
            assert (module.affine()[0] > 0).all()
    pruned = pair[0].compressed.eval()
    assert ranges_fit(pruned)
    assert pruned.net.stem[0].out_channels < 8
    with torch.no_grad():
        fake, found = pruned(IMAGES), integers.compressed.eval()(IMAGES)
    assert torch.allclose(found, fake, atol=3e-2 * float(fake.abs().max()))


def test_quantized_training_goes_on_after_a_cut(tmp_path: Path) -> None:
    model = Task()
    trainer(tmp_path, QuantizationAwareTraining({"range": "lsq"})).fit(model)
    smaller = compress(model, StructuredPruning(0.5))
    trainer(tmp_path, QuantizationAwareTraining({"range": "lsq"})).fit(smaller.train())
    assert ranges_fit(smaller)
    assert ranges_fit(model)
    assert convert(smaller).net.stem[0].out_channels == smaller.net.stem[0].out_channels < 8


def test_integers_come_last(tmp_path: Path) -> None:
    callbacks = [QuantizationAwareTraining(), IntegerConversion(), StructuredPruning(0.4)]
    with pytest.raises(
        ConfigurationError, match="StructuredPruning behind IntegerConversion, which leaves nothing to it"
    ):
        trainer(tmp_path, *callbacks).fit(Task())


def test_scales_are_no_weights_of_a_channel() -> None:
    torch.manual_seed(0)
    model = randomize(Small()).eval()
    quantize(model)
    calibrate(model, IMAGES)
    beside = [touch for group in coupled_groups(model, IMAGES).groups for touch in group.touches if touch.beside]
    assert beside
    assert not any(touch.produces for touch in beside)
    assert {touch.path.rpartition(".")[2] for touch in beside} == {"weight_quantizer"}


def test_integers_are_not_cut() -> None:
    torch.manual_seed(0)
    model = randomize(Small()).eval()
    quantize(model)
    calibrate(model, IMAGES)
    with pytest.raises(SelectionError, match="its weights are integers, which are not cut; prune before"):
        compress(convert(model), StructuredPruning(0.5), example_inputs=IMAGES)
