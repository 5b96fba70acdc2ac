"""The two LeNets that compression papers report on (LeCun et al., 1998)."""

from __future__ import annotations

import torch
from torch import nn


class LeNet300100(nn.Module):
    """LeNet-300-100: three linear layers for 28x28 images, 266,610 parameters with 10 classes.

    Args:
        num_classes: Length of the output.

    >>> sum(parameter.numel() for parameter in LeNet300100().parameters())
    266610
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 300)
        self.fc2 = nn.Linear(300, 100)
        self.fc3 = nn.Linear(100, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images (batch, 1, 28, 28) to logits (batch, num_classes)."""
        hidden = torch.relu(self.fc1(images.flatten(1)))
        return self.fc3(torch.relu(self.fc2(hidden)))


class LeNet5(nn.Module):
    """LeNet-5 as Caffe defines it: 20 and 50 maps of 5x5, then 500 and 10 units; 431,080 parameters.

    As there, the convolutions are followed by max pooling alone; the only ReLU sits after the first linear layer.

    Args:
        num_classes: Length of the output.

    >>> sum(parameter.numel() for parameter in LeNet5().parameters())
    431080
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images (batch, 1, 28, 28) to logits (batch, num_classes)."""
        features = self.pool(self.conv2(self.pool(self.conv1(images))))
        return self.fc2(torch.relu(self.fc1(features.flatten(1))))
