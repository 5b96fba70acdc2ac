"""Stand-ins for recurrent layers, whose channels a tracer can follow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_compress.core.companions import HasCompanions
from lightning_compress.core.copies import tensors_in
from lightning_compress.core.paths import named_layers, set_layer

RECURRENT: tuple[type[nn.Module], ...] = (nn.LSTM, nn.GRU, nn.RNN)
"""Types that get a stand-in."""


class RecurrentStandIn(nn.Module):
    """One Linear whose outputs lie where the hidden channels of a recurrent layer do, in every layer and direction.

    Only shapes and what depends on what are those of the recurrent layer, not values.

    Args:
        layer: What it stands for.
    """

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        weight = next(layer.parameters())
        width = layer.proj_size or layer.hidden_size
        self.channels = nn.Linear(layer.input_size, width, device=weight.device, dtype=weight.dtype)
        self.stood_for = (layer,)  # in a tuple, so that it is no part of this module

    def __getattr__(self, name: str) -> Any:
        """Answer for the recurrent layer, whose sizes and methods a model may ask for."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "stood_for":
                raise
            return getattr(self.stood_for[0], name)

    def forward(self, inputs: Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:
        """Return outputs and last states in the shapes of the recurrent layer."""
        layer = self.stood_for[0]
        directions = 2 if layer.bidirectional else 1
        hidden = self.channels(inputs.data if isinstance(inputs, PackedSequence) else inputs)
        for state in tensors_in(hx):
            hidden = hidden + state.flatten(0, -2).sum(0)
        if isinstance(inputs, PackedSequence):
            last = hidden.mean(0, keepdim=True) + hidden.new_zeros(int(inputs.batch_sizes[0]), 1)
        else:
            last = hidden.mean(1 if layer.batch_first and inputs.dim() == 3 else 0)
        outputs = torch.cat([hidden.clone() for _ in range(directions)], -1) if directions > 1 else hidden
        final = torch.stack([last.clone() for _ in range(layer.num_layers * directions)])
        if isinstance(inputs, PackedSequence):
            outputs = PackedSequence(outputs, inputs.batch_sizes, inputs.sorted_indices, inputs.unsorted_indices)
        return outputs, (final, final.clone()) if isinstance(layer, nn.LSTM) else final


def put_stand_ins(model: nn.Module) -> dict[nn.Module, tuple[str, nn.Module]]:
    """Put stand-ins into ``model``, and return for the Linear of each the path and the layer it stands for.

    >>> net = nn.Sequential(nn.GRU(3, 4, num_layers=2, bidirectional=True))
    >>> [(path, layer) for path, layer in put_stand_ins(net).values()], net[0](torch.zeros(5, 1, 3))[0].shape
    ([('0', GRU(3, 4, num_layers=2, bidirectional=True))], torch.Size([5, 1, 8]))
    """
    found: dict[nn.Module, tuple[str, nn.Module]] = {}
    for path, layer in named_layers(model).items():
        known = type(layer) in RECURRENT or isinstance(layer, HasCompanions)  # quantized ones compute as theirs do
        if isinstance(layer, nn.RNNBase) and known:
            stand_in = RecurrentStandIn(layer)
            set_layer(model, path, stand_in)
            found[stand_in.channels] = (path, layer)
    return found
