"""A perceptron with batch norm, as the papers on binary networks train it on MNIST."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from lightning_compress.core.errors import ConfigurationError


class Perceptron(nn.Module):
    """Linear layers, each but the last followed by batch norm and, if wanted, a ReLU.

    BinaryConnect (Courbariaux et al. 2015) has three hidden layers of 1,024 units with ReLU. Layers that take the signs
    of their inputs do without: the sign is the non-linearity.

    Args:
        inputs: Length of the flattened input.
        hidden: Units of each hidden layer, at least one layer.
        relu: Put a ReLU after each batch norm.
        num_classes: Length of the output.
        dropout: Share of the inputs that are zero in training, from 0 to below 1; BinaryNet (Hubara et al. 2016): 0.2.

    Raises:
        ConfigurationError: For sizes below 1, no hidden layer, or a dropout outside its range.

    >>> sum(parameter.numel() for parameter in Perceptron().parameters())
    2919434
    """

    def __init__(
        self,
        inputs: int = 784,
        hidden: Sequence[int] = (1024, 1024, 1024),
        relu: bool = True,
        num_classes: int = 10,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not hidden or min(inputs, num_classes, *hidden) < 1:
            raise ConfigurationError(f"`hidden` must be at least one number of units, got {list(hidden)}")
        if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            raise ConfigurationError(f"`dropout` must be at least 0 and below 1, got {dropout!r}")
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.Sequential()
        for place, (before, after) in enumerate(pairwise((inputs, *hidden)), start=1):
            self.layers.add_module(f"fc{place}", nn.Linear(before, after))
            self.layers.add_module(f"bn{place}", nn.BatchNorm1d(after))
            if relu:
                self.layers.add_module(f"relu{place}", nn.ReLU())
        self.head = nn.Linear(hidden[-1], num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images (batch, ...) to logits (batch, num_classes)."""
        return self.head(self.layers(self.dropout(images.flatten(1))))
