"""Networks that the tests of placement, conversion and export share; the large ones cost no memory under ``meta``."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchvision.models as zoo
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.core.journal import Edit
from lightning_compress.core.paths import named_layers
from lightning_compress.core.verbs import apply
from lightning_compress.quantization import (
    ActivationQuantizer,
    QuantizerSpec,
    place_quantizers,
    quantizers_of,
    update_ranges,
)
from lightning_compress.quantization.layers import CLASSES, weight_of, weight_quantizers_of, why_not

VISION: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: zoo.resnet18(weights=None),
    "mobilenet_v2": lambda: zoo.mobilenet_v2(weights=None),
    "vgg16": lambda: zoo.vgg16(weights=None, init_weights=False),
    "googlenet": lambda: zoo.googlenet(weights=None, init_weights=False, aux_logits=False),
    "densenet121": lambda: zoo.densenet121(weights=None),
    "efficientnet_b0": lambda: zoo.efficientnet_b0(weights=None),
    "vit_b_16": lambda: zoo.vit_b_16(weights=None),
}


class Residual(nn.Module):
    """A block as torchvision writes it: one ReLU for two places, and an addition in ``forward``."""

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.down = nn.Conv2d(channels, channels, 1, stride) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.down is None else self.down(x)
        return self.relu(out)


class Small(nn.Module):
    """Residual, depthwise and concatenated blocks, pools, and a Linear head."""

    def __init__(self, classes: int = 3, inputs: int = 1) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(inputs, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6(), nn.MaxPool2d(2))
        self.block = nn.Sequential(Residual(8), Residual(8, 2))
        self.left = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.SiLU())
        self.right = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(x))
        x = torch.cat([self.left(x), F.relu(self.right(x))], 1)
        return self.head(self.pool(x).flatten(1))


class Shortcut(nn.Module):
    """A block with functions for its ReLUs, and an empty module for a shortcut that changes nothing."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False)).append(nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        out += self.shortcut(x)
        return F.relu(out)


class Functional(nn.Module):
    """A residual network whose ReLUs and pools are functions, as many write it."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(Shortcut(4, 4), Shortcut(4, 4))
        self.layer2 = Shortcut(4, 8, 2)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn(self.conv(x))), 2)
        x = self.layer2(self.layer1(x))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Audio(nn.Module):
    """Convolutions over time, one of them transposed."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv1d(1, 8, 9, stride=2, padding=4),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.ConvTranspose1d(8, 8, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.MaxPool1d(4),
        )
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean(-1))


class Words(nn.Module):
    """An embedding, an LSTM, and a Linear layer on its last output."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.recur = nn.LSTM(8, 12, batch_first=True)
        self.head = nn.Linear(12, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.recur(self.embed(tokens))[0][:, -1])


class Branching(nn.Module):
    """A branch on the values of a tensor, which nothing can trace, around parts that can be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(784, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.part(x)
        return self.head(x) if bool(x.mean() > -1e9) else self.head(-x)


def randomize(model: nn.Module) -> nn.Module:
    """Give batch norms statistics of their own, some of the gammas negative."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                size = module.weight.shape
                module.weight.copy_(torch.rand(size, generator=generator) * 1.5 + 0.3)
                module.weight[::3] *= -1
                module.bias.copy_(torch.randn(size, generator=generator) * 0.3)
                module.running_mean.copy_(torch.randn(size, generator=generator) * 0.2)
                module.running_var.copy_(torch.rand(size, generator=generator) + 0.5)
    return model


def quantize(model: nn.Module, weights: int = 8, activations: int = 8) -> nn.Module:
    """Give a network quantizers where :func:`place_quantizers` wants them, in place, as edits."""
    placement = place_quantizers(model)
    weight = QuantizerSpec(weights, symmetric=True, per_channel=True, range="minmax").to_config()
    known = named_layers(model)
    inside = tuple(f"{path}." for path, layer in known.items() if isinstance(layer, nn.MultiheadAttention))
    points = {(point.path, point.side) for point in placement.points}
    for path, layer in known.items():
        if isinstance(layer, tuple(CLASSES)) and not path.startswith(inside) and not why_not(layer):
            given = {"bits": activations} if (path, "input") in points else None
            apply(model, Edit("replace", path, "quantized", {"weight": weight, "input": given}))
            points.discard((path, "input"))
    for path, side in sorted(points):
        apply(model, Edit("replace", path, f"quantized_{side}", {"bits": activations}))
    return model


def calibrate(model: nn.Module, *inputs: Tensor) -> nn.Module:
    """Set all ranges from one batch, and switch the quantizers on."""
    quantizers = quantizers_of(model)
    for layer in model.modules():
        for name, quantizer in weight_quantizers_of(layer).items():
            quantizer.take_range(weight_of(layer, name).detach())
    for quantizer in quantizers:
        quantizer.observing = isinstance(quantizer, ActivationQuantizer)
        quantizer.train(quantizer.observing)
    with torch.no_grad():
        model(*inputs)
    update_ranges(quantizers)
    for quantizer in quantizers:
        quantizer.enabled, quantizer.observing = True, False
    return model.eval()
