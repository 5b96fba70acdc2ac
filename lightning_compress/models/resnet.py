"""Residual networks for 32x32 images in the layout of He et al., "Deep Residual Learning" (2016), section 4.2."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lightning_compress.core.errors import ConfigurationError


def shortcut_a(features: torch.Tensor, channels: int, stride: int) -> torch.Tensor:
    """Option-A shortcut: subsample, then pad with zero channels on both sides; it has no parameters.

    Args:
        features: Tensor (batch, c, h, w).
        channels: Number of channels wanted, at least ``c``.
        stride: Keep every ``stride``-th row and column.

    Returns:
        Tensor (batch, channels, ceil(h / stride), ceil(w / stride)).

    >>> shortcut_a(torch.ones(1, 2, 4, 4), channels=4, stride=2).sum(dim=(0, 2, 3))
    tensor([0., 4., 4., 0.])
    """
    missing = channels - features.shape[1]
    if stride == 1 and missing == 0:
        return features
    before = missing // 2
    return F.pad(features[:, :, ::stride, ::stride], (0, 0, 0, 0, before, missing - before))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm around an option-A shortcut.

    Args:
        inputs: Channels that come in.
        outputs: Channels that go out.
        stride: Stride of the first convolution and of the shortcut.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.widens = stride != 1 or inputs != outputs

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map (batch, inputs, h, w) to (batch, outputs, h / stride, w / stride)."""
        residual = torch.relu(self.bn1(self.conv1(features)))
        residual = self.bn2(self.conv2(residual))
        if self.widens:  # known without looking at a tensor, so that the network can be traced
            features = shortcut_a(features, residual.shape[1], self.stride)
        return torch.relu(residual + features)


class CifarResNet(nn.Module):
    """A CIFAR ResNet of depth 6n + 2: three stages of n blocks with 16, 32 and 64 channels.

    Args:
        depth: 20, 32, 44, 56, 110 or any other 6n + 2.
        num_classes: Length of the output.

    Raises:
        ConfigurationError: If ``depth`` is not 6n + 2.
    """

    def __init__(self, depth: int = 20, num_classes: int = 10) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ConfigurationError(
                f"`depth` of a CIFAR ResNet must be 6n + 2 with n >= 1 (8, 14, 20, 32, 44, 56, 110, ...), got {depth}"
            )
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = self._stage(16, 16, blocks, stride=1)
        self.layer2 = self._stage(16, 32, blocks, stride=2)
        self.layer3 = self._stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(inputs, outputs, stride)
        return nn.Sequential(first, *(BasicBlock(outputs, outputs) for _ in range(blocks - 1)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images (batch, 3, h, w) to logits (batch, num_classes)."""
        features = self.relu(self.bn1(self.conv1(images)))
        features = self.layer3(self.layer2(self.layer1(features)))
        return self.linear(features.mean(dim=(2, 3)))


def resnet20(num_classes: int = 10) -> CifarResNet:
    """Build the CIFAR ResNet-20.

    >>> sum(parameter.numel() for parameter in resnet20().parameters())
    269722
    """
    return CifarResNet(20, num_classes)


def resnet32(num_classes: int = 10) -> CifarResNet:
    """Build the CIFAR ResNet-32.

    >>> sum(parameter.numel() for parameter in resnet32().parameters())
    464154
    """
    return CifarResNet(32, num_classes)


def resnet44(num_classes: int = 10) -> CifarResNet:
    """Build the CIFAR ResNet-44.

    >>> sum(parameter.numel() for parameter in resnet44().parameters())
    658586
    """
    return CifarResNet(44, num_classes)


def resnet56(num_classes: int = 10) -> CifarResNet:
    """Build the CIFAR ResNet-56.

    >>> sum(parameter.numel() for parameter in resnet56().parameters())
    853018
    """
    return CifarResNet(56, num_classes)
