"""How the channels of each layer type lie in its tensors; for types without an answer, why they cannot be cut."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_compress.pruning.structured.heads import ATTENTION
from lightning_compress.pruning.structured.stand_ins import RECURRENT

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CUTTABLE: tuple[type[nn.Module], ...] = (*CONVS, *TRANSPOSED, nn.Linear, *RECURRENT, nn.Embedding)
"""Layer types whose output channels can be removed."""
SELECTABLE: tuple[type[nn.Module], ...] = (*CUTTABLE, *ATTENTION)
"""Those, and attention, whose heads can go."""

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

ONE_CHANNEL = "it has one output channel only"

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
    if reason := getattr(layer, "not_cut", ""):
        return str(reason)
    if parametrize.is_parametrized(layer):
        return "its tensors are parametrized"
    if isinstance(weight := getattr(layer, "weight", None), Tensor) and not isinstance(weight, nn.Parameter):
        return "its weight is computed by a hook (weight_norm, spectral_norm)"
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
    if isinstance(layer, nn.RNNBase) and isinstance(layer, RECURRENT):
        return _recurrent_roles(layer, output)
    if isinstance(layer, _CROSS):
        return "it normalizes across channels, so that every channel changes all others"
    if isinstance(layer, nn.MultiheadAttention):
        return "attention: the width of its inputs and outputs is not cut"
    return "layers of this type are not cut"


def is_single(layer: nn.Module) -> bool:
    """Return whether a layer has one output channel, such as a gate in space or time, or the weights of a mean.

    >>> is_single(nn.Conv2d(8, 1, 3)), is_single(nn.Linear(1, 8))
    (True, False)
    """
    return 1 in (getattr(layer, "out_channels", 0), getattr(layer, "out_features", 0))


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


def _recurrent_roles(layer: nn.RNNBase, output: bool) -> list[Role] | str:
    """All layers and both directions have one hidden size, so that a channel is the same index in all of them."""
    if layer.proj_size:
        return "an LSTM with a projection"
    hidden, directions = layer.hidden_size, ("", "_reverse") if layer.bidirectional else ("",)
    if not output:
        tensors = tuple((f"weight_ih_l0{direction}", 1) for direction in directions)
        return [Role(tensors, layer.input_size, (("input_size", 1),))]
    roles, gates = [], layer.get_parameter("weight_hh_l0").shape[0] // hidden
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    for depth in range(layer.num_layers):
        for direction in directions:
            suffix = f"_l{depth}{direction}"
            made = _present(layer, tuple(f"{name}{suffix}" for name in names))
            roles.append(Role(made, gates * hidden, copies=gates))
            roles.append(Role(((f"weight_hh{suffix}", 1),), hidden, () if suffix != "_l0" else (("hidden_size", 1),)))
            if depth:
                width = len(directions)
                roles.append(Role(((f"weight_ih{suffix}", 1),), width * hidden, copies=width))
    return roles
