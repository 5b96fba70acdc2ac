"""The two ImageNet networks whose convolutions Tai et al. factorized, for images of any size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from lightning_compress.core.errors import ConfigurationError


class _Features(nn.Module):
    """Convolutions, an average of their outputs over a square, and linear layers."""

    def __init__(self, features: nn.Sequential, channels: int, side: int, hidden: int | None, num_classes: int) -> None:
        super().__init__()
        side = 1 if hidden is None else side
        self.features, self.avgpool = features, nn.AdaptiveAvgPool2d(side)
        self.classifier = _classifier(channels * side**2, hidden, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images (batch, 3, h, w), at least 32 pixels a side, to logits (batch, num_classes)."""
        return self.classifier(self.avgpool(self.features(images)).flatten(1))


class CaffeNet(_Features):
    """AlexNet as Caffe defines it: five convolutions, of which the second, fourth and fifth see two groups.

    Args:
        num_classes: Length of the output.
        hidden: Width of the two linear layers before the last; ``None`` for one linear layer on averaged features.

    Raises:
        ConfigurationError: If ``hidden`` is no width.

    >>> sum(parameter.numel() for parameter in CaffeNet(hidden=None).features.parameters())
    2334080
    """

    def __init__(self, num_classes: int = 1000, hidden: int | None = 4096) -> None:
        features = nn.Sequential(
            *(nn.Conv2d(3, 96, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.LocalResponseNorm(5)),
            *(nn.Conv2d(96, 256, 5, padding=2, groups=2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.LocalResponseNorm(5)),
            *(nn.Conv2d(256, 384, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(384, 384, 3, padding=1, groups=2), nn.ReLU()),
            *(nn.Conv2d(384, 256, 3, padding=1, groups=2), nn.ReLU()),
        )
        super().__init__(features, 256, 6, hidden, num_classes)


class VGG16(_Features):
    """The VGG network with thirteen 3x3 convolutions, named as in torchvision, whose weights fit.

    Args:
        num_classes: Length of the output.
        hidden: Width of the two linear layers before the last; ``None`` for one linear layer on averaged features.

    Raises:
        ConfigurationError: If ``hidden`` is no width.

    >>> sum(parameter.numel() for parameter in VGG16(hidden=None).features.parameters())
    14714688
    """

    def __init__(self, num_classes: int = 1000, hidden: int | None = 4096) -> None:
        features = nn.Sequential(*_stages(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))))
        super().__init__(features, 512, 7, hidden, num_classes)


def _stages(stages: Sequence[tuple[int, int]]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    inputs = 3
    for channels, depth in stages:
        for _ in range(depth):
            layers += [nn.Conv2d(inputs, channels, 3, padding=1), nn.ReLU()]
            inputs = channels
        layers.append(nn.MaxPool2d(2))
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.constant_(layer.get_parameter("bias"), 0.0)
    return layers


def _classifier(inputs: int, hidden: int | None, num_classes: int) -> nn.Sequential:
    """Return two linear layers under a third, or a single one."""
    if hidden is None:
        return nn.Sequential(nn.Linear(inputs, num_classes))
    if hidden < 1:
        raise ConfigurationError(f"`hidden` must be a width of at least 1, or None for one linear layer; got {hidden}")
    return nn.Sequential(
        *(nn.Linear(inputs, hidden), nn.ReLU(), nn.Dropout()),
        *(nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout()),
        nn.Linear(hidden, num_classes),
    )
