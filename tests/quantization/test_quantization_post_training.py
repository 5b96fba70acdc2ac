"""Post-training quantization of whole models: against plain rounding, in integers, with zeros, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from networks import Audio, Branching, Small, Words, randomize
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import (
    ConfigurationError,
    IterativePruning,
    PostTrainingQuantization,
    PostTrainingSteps,
    QuantizationAwareTraining,
    Select,
    SelectionError,
    compress,
    journal_of,
    load_compressed,
    save_compressed,
)
from lightning_compress.data import DigitsDataModule
from lightning_compress.quantization import ActivationQuantizer, QuantizedLayer, Quantizer, convert, quantizers_of
from lightning_compress.quantization.affine import affine_parameters

PLAIN = {"rounding": "nearest", "correct_bias": False, "equalize": False}
NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "small": (Small, lambda: torch.randn(24, 1, 16, 16)),
    "audio": (Audio, lambda: torch.randn(24, 1, 64)),
    "words": (Words, lambda: torch.randint(0, 20, (24, 7))),
    "branching": (Branching, lambda: torch.randn(24, 1, 16, 16)),
}


def quantize(net: nn.Module, x: Any, **arguments: Any) -> nn.Module:
    return compress(net, PostTrainingQuantization(x, **arguments))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("bits", [8, 4])
def test_is_close_to_float_and_the_same_in_integers(name: str, bits: int) -> None:
    torch.manual_seed(1)
    build, batch = NETS[name]
    net, x = randomize(build()).eval(), batch()
    quantized = quantize(net, x, weights=bits, ends=None)
    assert not any(q.observing for q in quantizers_of(quantized))
    assert all(q.active for q in quantizers_of(quantized))
    with torch.no_grad():
        wanted, found, integers = net(x), quantized(x), convert(quantized, x)(x)
    size = float(wanted.std())
    assert float((found - wanted).square().mean().sqrt()) < (0.05 if bits == 8 else 0.5) * size
    assert float((integers - found).abs().max()) < 0.15 * size  # a step of a quantizer here and there
    assert float((integers - found).abs().median()) < 1e-4 * size


class Net(nn.Module):
    """Convolutions with batch norm, one of them depthwise, and a Linear head."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.depth, self.norm2 = nn.Conv2d(width, width, 3, padding=1, groups=width), nn.BatchNorm2d(width)
        self.point, self.norm3 = nn.Conv2d(width, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width)
        self.fc = nn.Linear(2 * width * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.depth(x)))
        return self.fc(F.max_pool2d(F.relu(self.norm3(self.point(x))), 2).flatten(1))


@pytest.fixture(scope="module")
def digits() -> tuple[list[nn.Module], Tensor, tuple[Tensor, Tensor]]:
    """Four networks trained from different seeds, calibration images, and the test set."""
    data = DigitsDataModule(batch_size=64)
    data.prepare_data()
    data.setup("fit")
    batches = [(batch[0], batch[1]) for batch in data.train_dataloader()]
    data.setup("test")
    test = [torch.cat(part) for part in zip(*((b[0], b[1]) for b in data.test_dataloader()), strict=True)]
    nets = []
    for seed in range(4):
        torch.manual_seed(seed)
        net = Net()
        optimizer = torch.optim.Adam(net.parameters(), 4e-3)
        for x, y in batches * 6:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
        nets.append(net.eval())
    return nets, torch.cat([x for x, _ in batches[:6]]), (test[0], test[1])


def accuracy(net: nn.Module, test: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        return float((net.eval()(test[0]).argmax(1) == test[1]).float().mean())


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_beats_plain_rounding_on_digits(digits, bits: int) -> None:
    nets, images, test = digits
    errors: dict[str, list[float]] = {}
    scores: dict[str, list[float]] = {}
    for net in nets:
        for name, steps in (("plain", PLAIN), ("gptq", {})):
            found = quantize(net, images, weights=bits, ends=None, steps=steps)
            with torch.no_grad():
                errors.setdefault(name, []).append(float((found(test[0]) - net(test[0])).square().mean()))
            scores.setdefault(name, []).append(accuracy(found, test))
    assert sum(errors["gptq"]) < 0.8 * sum(errors["plain"])
    assert sum(scores["gptq"]) >= sum(scores["plain"]) - 0.01
    if bits == 2:
        gained = round(sum(scores["gptq"]) * len(test[1])) - round(sum(scores["plain"]) * len(test[1]))
        assert gained >= 0.05 * len(test[1]) * len(nets)


def test_each_step_alone_lowers_the_error(digits) -> None:
    nets, images, test = digits

    def error(steps: dict[str, Any]) -> float:
        found = quantize(nets[0], images[:128], weights=3, ends=None, steps={**PLAIN, **steps})
        with torch.no_grad():
            return float((found(test[0]) - nets[0](test[0])).square().mean())

    plain = error({})
    assert error({"correct_bias": True}) < plain
    assert error({"rounding": "gptq"}) < plain
    assert error({"rounding": "adaround", "iterations": 100}) < plain


def test_equalization_saves_a_net_whose_channels_differ_in_size(digits) -> None:
    nets, images, test = digits
    net = copy.deepcopy(nets[0])
    sizes = torch.exp(torch.linspace(-3, 3, 8))
    with torch.no_grad():  # the same function with channels of very different sizes
        net.norm1.weight.mul_(sizes)
        net.norm1.bias.mul_(sizes)
        net.depth.weight.div_(sizes.view(-1, 1, 1, 1))
    assert accuracy(net, test) == pytest.approx(accuracy(nets[0], test), abs=0.005)
    weights = {"bits": 6, "per_channel": False}
    without = accuracy(quantize(net, images, weights=weights, steps=PLAIN), test)
    equalized = accuracy(quantize(net, images, weights=weights, steps={**PLAIN, "equalize": True}), test)
    assert equalized > without + 0.1
    assert equalized > accuracy(net, test) - 0.03


def test_pruned_zeros_stay_and_files_reload(digits, tmp_path) -> None:
    nets, images, test = digits
    pruned = compress(nets[0], IterativePruning(0.6))
    zeros = {path: layer.weight == 0 for path, layer in pruned.named_modules() if isinstance(layer, nn.Conv2d)}
    quantized = quantize(pruned, images, weights=4)
    for path, mask in zeros.items():
        layer = quantized.get_submodule(path)
        assert isinstance(layer, QuantizedLayer)
        assert (layer.quantized_weight()[mask] == 0).all()
        assert torch.equal(layer.quantized_weight(), layer.weight)  # on its grid
    save_compressed(quantized, tmp_path / "net.safetensors")
    again = load_compressed(Net(), tmp_path / "net.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(again(test[0]), quantized(test[0]))
    assert journal_of(again) == journal_of(quantized)


def test_rules_and_mixed_precision_reach_the_layers() -> None:
    net, x = Small(), torch.randn(8, 1, 16, 16)
    rules = {"head": {"include": "head", "weights": None}, "right": {"include": "right", "weights": 3}}
    quantized = quantize(net, x, weights=4, rules=rules)
    assert quantized.head.weight_quantizer is None
    assert quantized.right.weight_quantizer.spec.bits == 3
    assert quantized.stem[0].weight_quantizer.spec.bits == 8
    assert quantized.block[0].conv1.weight_quantizer.spec.bits == 4


def test_says_what_is_left_out() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.silent = nn.Linear(4, 4, bias=False), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.silent(self.used(x) * 0)

    callback = PostTrainingQuantization(torch.randn(8, 4), ends=None)
    found = compress(Odd(), callback)
    assert torch.isfinite(found(torch.randn(2, 4))).all()
    assert "neither it nor a batch norm" in callback.left["used"]
    assert "does not call it" in callback.left["unused"]
    assert "all zero" in callback.left["silent"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    net, x = Small().to(dtype).eval(), torch.randn(16, 1, 16, 16, dtype=dtype)
    found = quantize(net, x, weights={"bits": 4, "per_channel": False})
    assert found(x).dtype == dtype
    assert float((found(x) - net(x)).detach().float().std() / net(x).detach().float().std()) < 0.7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": None}, "`batches` is missing"),
        ({"batches": []}, "`batches` is empty"),
        ({"weights": {"range": "lsq"}}, "is learned by training"),
        ({"activations": {"range": "pact"}}, "is learned by training"),
        ({"weights": 9}, "`weights`: `bits` must be an int from 2 to 8"),
        ({"steps": {"rounding": "gptp"}}, "'gptq'"),
        ({"steps": {"round": 1}}, "`steps` has no 'round'"),
        ({"steps": {"damping": 0}}, "`damping` must be a number above 0"),
        ({"steps": {"samples": 0}}, "`samples` must be an int >= 1"),
        ({"steps": {"iterations": 0.5}}, "`iterations` must be an int"),
        ({"steps": {"equalize": 1}}, "`equalize` must be true or false"),
        ({"steps": 3}, "`steps` must be a mapping"),
    ],
)
def test_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        compress(Small(), PostTrainingQuantization(**{"batches": torch.randn(4, 1, 16, 16), **arguments}))


def test_refuses_what_is_quantized_already_and_an_empty_selection() -> None:
    net, x = nn.Sequential(nn.Linear(3, 2)), torch.randn(4, 3)
    with pytest.raises(ConfigurationError, match="quantized already"):
        quantize(quantize(net, x), x)
    with pytest.raises(SelectionError, match="Conv3d"):
        quantize(net, x, select=Select(types="Conv3d"))
    assert QuantizationAwareTraining.supported == PostTrainingQuantization.supported
    assert PostTrainingSteps() == PostTrainingQuantization(x).steps


def test_nothing_that_observes_outlives_calibration(tmp_path) -> None:
    net, x = Small(), torch.randn(16, 1, 16, 16)
    quantized = quantize(net, x, weights=4)
    parts = [part for part in quantizers_of(quantized) if isinstance(part, ActivationQuantizer)]
    assert len(parts) > 5
    assert {part.spec.range for part in parts} == {"fixed"}
    assert max(buffer.numel() for part in parts for buffer in part.buffers()) == 1
    for part in parts:  # the range that was found is the range that is kept
        low, high = part.observer.range()
        scale, zero_point = affine_parameters(low, high, part.bounds)
        assert torch.equal(part.scale, scale)
        assert torch.equal(part.zero_point, zero_point)
    with_x = [quantized(x * factor) for factor in (1.0, 5.0)]  # neither moves it
    assert torch.equal(quantized(x), with_x[0])
    size = save_compressed(convert(quantized), tmp_path / "net.safetensors").bytes
    assert size < 40_000  # one histogram takes 32,768 bytes


class Task(LightningModule):
    """Trains a network to be positive."""

    def __init__(self, net: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.net, self.x = net, x

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.softplus(-self.net(batch[0])).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(self.x), batch_size=16)


def test_calibrated_ranges_stay_where_they_are_in_training() -> None:
    net, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(64, 6)
    quantized = quantize(net, x)
    scales = {path: part.scale.clone() for path, part in quantized.named_modules() if isinstance(part, Quantizer)}
    callback = QuantizationAwareTraining({"range": "mse"}, {"range": "mse"}, start=0)
    task = Task(quantized, x)
    Trainer(
        max_epochs=2, callbacks=[callback], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    ).fit(task)  # fmt: skip
    moved = {path for path, scale in scales.items() if not torch.equal(scale, quantized.get_submodule(path).scale)}
    assert moved
    assert all(path.endswith("weight_quantizer") for path in moved)
    with pytest.raises(ConfigurationError, match="'fixed' is what calibration leaves behind"):
        QuantizationAwareTraining(activations={"range": "fixed"})
