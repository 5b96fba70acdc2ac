"""A plain convolutional network for 28x28 images, wide or thin, shallow or deep: a teacher and its student."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from lightning_compress.core.errors import ConfigurationError


class StagedCNN(nn.Module):
    """Three stages of 3x3 convolutions, the first of each with stride 2, and a linear layer; no shortcuts.

    With batch norm and many channels it is a good teacher for MNIST; thin, deep and without batch norm it is what
    FitNets are about (Romero et al. 2015): a network that gradients from the labels alone train badly.

    Args:
        channels: Of ``stage1``, ``stage2`` and ``stage3``; for 28x28 images their maps have 14x14, 7x7 and 4x4 places.
        depths: Convolutions of each stage, at least 1.
        batch_norm: Put batch norm after every convolution.
        num_classes: Length of the output.

    Raises:
        ConfigurationError: Unless there are three positive numbers of each.

    >>> sum(parameter.numel() for parameter in StagedCNN().parameters())
    82266
    >>> sum(parameter.numel() for parameter in StagedCNN((8, 8, 8), (2, 3, 3), batch_norm=False).parameters())
    5458
    """

    def __init__(
        self,
        channels: Sequence[int] = (16, 32, 64),
        depths: Sequence[int] = (2, 2, 2),
        batch_norm: bool = True,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        for name, numbers in (("channels", channels), ("depths", depths)):
            if len(numbers) != 3 or min(numbers) < 1:
                raise ConfigurationError(f"`{name}` must be three numbers of at least 1, got {list(numbers)}")
        sizes = list(pairwise((1, *channels)))
        self.stage1, self.stage2, self.stage3 = (
            _stage(*sizes[place], depth, batch_norm) for place, depth in enumerate(depths)
        )
        self.fc = nn.Linear(channels[-1] * 16, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images (batch, 1, 28, 28) to logits (batch, num_classes)."""
        return self.fc(self.stage3(self.stage2(self.stage1(images))).flatten(1))


def _stage(inputs: int, outputs: int, depth: int, batch_norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for place in range(depth):
        before, stride = (inputs, 2) if place == 0 else (outputs, 1)
        layers.append(nn.Conv2d(before, outputs, 3, stride, padding=1, bias=not batch_norm))
        layers += [nn.BatchNorm2d(outputs), nn.ReLU()] if batch_norm else [nn.ReLU()]
    return nn.Sequential(*layers)
