"""How the channels of each layer type lie in its tensors; for types without an answer, why they cannot be cut."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.utils import parametrize

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CUTTABLE: tuple[type[nn.Module], ...] = (*CONVS, *TRANSPOSED, nn.Linear, nn.LSTM, nn.Embedding)
"""Layer types whose output channels can be removed."""

PER_CHANNEL = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)
PASSING: tuple[type[nn.Module], ...] = (*PER_CHANNEL, nn.PReLU)
"""Layer types that treat every channel alone and hand it on."""

_NORM = ("weight", "bias", "running_mean", "running_var")
_CROSS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.LocalResponseNorm)


@dataclass(frozen=True)
class Role:
    """How the channels at one side of a layer lie in its tensors.

    Args:
        tensors: Name and dimension of each tensor, the weights first.
        size: Length of that dimension.
        attributes: Integer attributes with what they are for each index.
        period: Indices of the dimension repeat after so many channels (grouped convolutions), 0 if they do not.
        copies: The dimension holds so many blocks of all channels, one after the other (gates of an LSTM).
    """

    tensors: tuple[tuple[str, int], ...]
    size: int
    attributes: tuple[tuple[str, int], ...] = ()
    period: int = 0
    copies: int = 1


def roles_of(layer: nn.Module, output: bool) -> list[Role] | str:
    """Return how output (or input) channels lie in a layer's tensors, or why they cannot be cut.

    >>> roles_of(nn.Linear(3, 2), output=False)
    [Role(tensors=(('weight', 1),), size=3, attributes=(('in_features', 1),), period=0, copies=1)]
    """
    if parametrize.is_parametrized(layer):
        return "its tensors are parametrized"
    if isinstance(layer, nn.Linear):
        own = _present(layer, ("weight", "bias")) if output else (("weight", 1),)
        name, size = ("out_features", layer.out_features) if output else ("in_features", layer.in_features)
        return [Role(own, size, ((name, 1),))]
    if isinstance(layer, (*CONVS, *TRANSPOSED)):
        return _conv_roles(layer, output)
    if isinstance(layer, PER_CHANNEL):
        return [Role(_present(layer, _NORM), layer.num_features, (("num_features", 1),))]
    if isinstance(layer, nn.PReLU):
        return [Role((("weight", 0),), layer.num_parameters, (("num_parameters", 1),))]
    if isinstance(layer, nn.Embedding) and output:
        return [Role((("weight", 1),), layer.embedding_dim, (("embedding_dim", 1),))]
    if isinstance(layer, nn.LSTM):
        return _lstm_roles(layer, output)
    if isinstance(layer, _CROSS):
        return "it normalizes across channels, so that every channel changes all others"
    if isinstance(layer, nn.MultiheadAttention):
        return "attention: its heads and the stream of its inputs are not cut"
    return "layers of this type are not cut"


def _present(layer: nn.Module, names: tuple[str, ...]) -> tuple[tuple[str, int], ...]:
    return tuple((name, 0) for name in names if getattr(layer, name, None) is not None)


def _conv_roles(layer: nn.Module, output: bool) -> list[Role] | str:
    outputs, inputs, groups = (int(getattr(layer, name)) for name in ("out_channels", "in_channels", "groups"))
    transposed = isinstance(layer, TRANSPOSED)
    if groups == outputs == inputs and groups > 1:  # depthwise: one index is input, output and group
        names = (("in_channels", 1), ("out_channels", 1), ("groups", 1))
        return [Role(_present(layer, ("weight", "bias")), outputs, names)]
    if transposed and groups > 1:
        return "a grouped transposed convolution"
    if output:
        own = (("weight", 1), *_present(layer, ("bias",))) if transposed else _present(layer, ("weight", "bias"))
        return [Role(own, outputs, (("out_channels", 1),), period=outputs // groups if groups > 1 else 0)]
    if groups > 1:
        return [Role((("weight", 1),), inputs // groups, (("in_channels", groups),), period=inputs // groups)]
    return [Role((("weight", 0 if transposed else 1),), inputs, (("in_channels", 1),))]


def _lstm_roles(layer: nn.LSTM, output: bool) -> list[Role] | str:
    if layer.num_layers > 1 or layer.bidirectional or layer.proj_size:
        return "an LSTM with several layers, directions or a projection"
    hidden = layer.hidden_size
    if not output:
        return [Role((("weight_ih_l0", 1),), layer.input_size, (("input_size", 1),))]
    gates = _present(layer, ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"))
    return [
        Role(gates, 4 * hidden, copies=4),
        Role((("weight_hh_l0", 1),), hidden, (("hidden_size", 1),)),
    ]
