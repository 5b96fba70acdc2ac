"""A small convolutional network for 8x8 grey images."""

from __future__ import annotations

import torch
from torch import nn


class DigitsCNN(nn.Module):
    """Two convolutions and two linear layers for 1x8x8 images, 151,306 parameters at the default width.

    Large enough that headers and biases do not decide the size of a 90 % sparse file, small enough to train in seconds.

    Args:
        num_classes: Length of the output.
        width: Channels of the first convolution; the second has twice as many, the hidden linear layer four times.
        dropout: Probability in [0, 1) of dropping a hidden unit while training.

    >>> sum(parameter.numel() for parameter in DigitsCNN().parameters())
    151306
    """

    def __init__(self, num_classes: int = 10, width: int = 32, dropout: float = 0.25) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(2 * width * 16, 4 * width)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(4 * width, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images (batch, 1, 8, 8) to logits (batch, num_classes)."""
        features = torch.relu(self.conv1(images))
        features = self.pool(torch.relu(self.conv2(features)))
        hidden = torch.relu(self.fc1(features.flatten(1)))
        return self.fc2(self.dropout(hidden))
