"""What a network computes, as far as quantization must know it: operations, what feeds what, and in which module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_AVERAGE = tuple(f"{name}{dims}d" for name in ("AvgPool", "AdaptiveAvgPool") for dims in (1, 2, 3))
_SAME_GRID = (
    *(f"{name}{dims}d" for name in ("MaxPool", "AdaptiveMaxPool", "Dropout", "ZeroPad") for dims in (1, 2, 3)),
    *(f"{name}Pad{dims}d" for name in ("Reflection", "Replication") for dims in (1, 2, 3)),
    *("Identity", "Dropout", "AlphaDropout", "StochasticDepth", "Flatten", "Unflatten", "UpsamplingNearest2d"),
    *("PixelShuffle", "PixelUnshuffle", "ChannelShuffle", "Quantizer", "FixedQuantizer", "FoldedBatchNorm"),
)
_FUNCTIONS = {
    "relu": "relu relu_ relu6",
    "add": "add iadd add_ sub isub sub_ __add__ __iadd__",
    "mul": "mul imul mul_ __mul__ __imul__",
    "concat": "cat concat concatenate",
    "average": "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d mean",
    "same": "max_pool1d max_pool2d max_pool3d boolean_dispatch flatten reshape view permute transpose contiguous "
    "squeeze unsqueeze dropout dropout_ chunk split unbind clone detach pixel_shuffle channel_shuffle movedim swapaxes "
    "t T max_pool2d_with_indices adaptive_max_pool1d adaptive_max_pool2d stochastic_depth feature_dropout expand slice "
    "select native_dropout _unsafe_view alias lift_fresh_copy split_with_sizes unflatten narrow",
    "batch_norm": "batch_norm _native_batch_norm_legit_no_training",
    "convolution": "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution",
    "linear": "linear addmm",
    "shape": "size shape dim _assert _assert_is_none eq floordiv getattr numel len sym_size _assert_tensor_metadata",
}
_KIND_OF = {name: kind for kind, names in _FUNCTIONS.items() for name in names.split()}
_VALUELESS = ("constant", "shape")
"""Kinds of operations whose results nothing quantizes."""
PADDINGS = ("pad", "constant_pad_nd")
"""Functions that add a border."""
PIECES = ("chunk", "split", "unbind", "split_with_sizes")
"""Functions whose results are parts of their input, so that taking one of them keeps its values."""


@dataclass(eq=False)
class Operation:
    """One step of a traced network, and the value it computes.

    Args:
        kind: ``input``, ``constant``, ``convolution``, ``linear``, ``attention``,
            ``recurrent``, ``batch_norm``, ``relu`` (what a
            quantizer's clipping can stand for), ``add``, ``mul``, ``concat``, ``average``, ``same`` (its results are
            values of its input), ``shape`` (no values at all) or ``other``.
        label: What messages call it, such as ``Conv2d`` or ``add``.
        path: Of the layer that computes it; empty for a function.
        inputs: Operations whose values it takes; for a layer in the order of its positional arguments.
        inside: The module calls around it, outermost first: path and number of the call.
        positions: Place of each input among the layer's positional arguments; -1 for keyword arguments.
    """

    kind: str
    label: str
    path: str = ""
    inputs: tuple[Operation, ...] = ()
    inside: tuple[tuple[str, int], ...] = ()
    positions: tuple[int, ...] = ()

    def __str__(self) -> str:
        where = self.path or (self.inside[-1][0] if self.inside else "")
        return self.label + (f" at {where!r}" if where else "")


@dataclass
class Graph:
    """A traced network.

    Args:
        operations: In the order they run.
        results: Operations whose values the network returns.
        blocks: Which operation's value a call of a module with children returns: (path, number of the call).
        reads: Paths of the parameters that are used outside of layers, by functions.
    """

    operations: list[Operation] = field(default_factory=list)
    results: list[Operation] = field(default_factory=list)
    blocks: dict[tuple[str, int], Operation] = field(default_factory=dict)
    reads: list[str] = field(default_factory=list)

    def users(self) -> dict[Operation, list[Operation]]:
        """Return the operations that take each value."""
        table: dict[Operation, list[Operation]] = {operation: [] for operation in self.operations}
        for operation in self.operations:
            for source in dict.fromkeys(operation.inputs):
                table.setdefault(source, []).append(operation)
        return table

    def entries(self) -> dict[Operation, list[str]]:
        """Return the modules with children that take each value, called once and with no other value; outermost first.

        >>> value, block = Operation("input", "the input"), (("block", 1),)
        >>> inner = Operation("convolution", "Conv2d", "block.conv", (value,), block)
        >>> Graph([value, inner, Operation("add", "add", "", (inner, value), block)]).entries()[value]
        ['block']
        """
        entering: dict[tuple[str, int], dict[Operation, None]] = {}
        for operation in self.operations:
            for call in operation.inside:
                outer = (each for each in operation.inputs if call not in each.inside)
                entering.setdefault(call, {}).update({each: None for each in outer if each.kind not in _VALUELESS})
        paths = [path for path, _ in entering]
        table: dict[Operation, list[str]] = {}
        for (path, _), values in sorted(entering.items(), key=lambda item: len(item[0][0])):
            if len(values) == 1 and paths.count(path) == 1:
                table.setdefault(next(iter(values)), []).append(path)
        return table

    def calls(self) -> dict[str, int]:
        """Return how often each layer and each block is called."""
        counts: dict[str, int] = {}
        for operation in self.operations:
            if operation.path:
                counts[operation.path] = counts.get(operation.path, 0) + 1
        for path, _ in self.blocks:
            counts[path] = counts.get(path, 0) + 1
        return counts


def kind_of_layer(layer: nn.Module) -> str:
    """Return the kind of operation that a layer is.

    >>> kind_of_layer(nn.Conv2d(1, 1, 1)), kind_of_layer(nn.Hardtanh()), kind_of_layer(nn.ReLU6())
    ('convolution', 'other', 'relu')
    """
    if isinstance(layer, CONVOLUTIONS):
        return "convolution"
    if isinstance(layer, nn.Linear):
        return "linear"
    if isinstance(layer, nn.MultiheadAttention):
        return "attention"
    if isinstance(layer, nn.RNNBase | nn.RNNCellBase):
        return "recurrent"
    if isinstance(layer, BATCH_NORMS):
        return "batch_norm"
    if isinstance(layer, nn.ReLU) or (isinstance(layer, nn.Hardtanh) and layer.min_val == 0 < layer.max_val):
        return "relu"
    names = {cls.__name__ for cls in type(layer).__mro__}
    if names & set(_AVERAGE):
        return "average"
    return "same" if names & set(_SAME_GRID) else "other"


def kind_of_function(name: str) -> str:
    """Return the kind of operation that a function or a method of tensors is, by its name without its module.

    >>> kind_of_function("adaptive_avg_pool2d"), kind_of_function("gelu")
    ('average', 'other')
    """
    return _KIND_OF.get(name, "other")


def kind_of_item(source: Operation, index: object) -> str:
    """Return the kind of ``source[index]``: slices of a tensor and parts of a split keep values, others are unknown."""
    if source.kind == "shape":
        return "shape"
    whole = isinstance(index, int) and source.label not in PIECES
    return "other" if whole or source.kind == "concat" else "same"


def kind_of_padding(name: str, args: Sequence[object], kwargs: Mapping[str, object]) -> str:
    """Return the kind of a padding: zeros and repeated values are on the grid of the input already, others may not be.

    >>> kind_of_padding("pad", ("x", [1, 1], "constant", 0.0), {})
    'same'
    >>> kind_of_padding("pad", ("x", [1, 1]), {"value": 1.0})
    'other'
    """
    names = ("input", "pad", "value") if name == "constant_pad_nd" else ("input", "pad", "mode", "value")
    value = {**dict(zip(names, args, strict=False)), **kwargs}.get("value")
    return "same" if value is None or (isinstance(value, int | float) and value == 0) else "other"


def function_name(target: object) -> str:
    """Return the plain name of a function, an overload of an operator, or a method's name.

    >>> import torch
    >>> function_name(torch.add), function_name(torch.ops.aten.relu.default), function_name("view")
    ('add', 'relu', 'view')
    """
    if isinstance(target, str):
        return target
    packet = getattr(target, "overloadpacket", target)
    return str(getattr(packet, "__name__", packet)).split(".")[0]


def unique(operations: Sequence[Operation]) -> list[Operation]:
    """Return the operations without repetitions, in order."""
    return list(dict.fromkeys(operations))


def is_layer(module: nn.Module) -> bool:
    """Return whether a module is one operation: it computes one, or has no inner modules but quantizers.

    >>> is_layer(nn.Conv2d(1, 1, 1)), is_layer(nn.LSTM(1, 1)), is_layer(nn.Sequential())
    (True, True, False)
    """
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return False
    inner = (child for name, child in module.named_children() if not name.endswith("_quantizer"))
    return kind_of_layer(module) != "other" or not any(True for _ in inner)
