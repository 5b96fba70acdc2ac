"""What a layer computes, without its values: kind, channels, kernel, and what follows (size, cost, a module)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_compress.core.errors import ConfigurationError

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, *_CONVS, *_TRANSPOSED, nn.Embedding)
"""Layer types that have a factorized form."""


@dataclass(frozen=True)
class LayerShape:
    """Everything about a layer but its values; of a whole layer as well as of one factor.

    Attributes:
        kind: ``"linear"``, ``"conv"``, ``"conv_transpose"`` or ``"embedding"``.
        inputs: Features, channels over all groups, or rows of the table.
        outputs: Features, channels over all groups, or the width of the table.
        kernel: One number for each spatial axis; empty for Linear and Embedding, like what follows.
        stride: Of each axis.
        padding: Of each axis, or ``"same"``.
        dilation: Of each axis.
        output_padding: Of each axis, of transposed convolutions.
        groups: Blocks that do not see each other.
        padding_mode: As in ``nn.Conv2d``.
        bias: Whether there is one.
        runs: How often it runs for each row of the whole layer's input.
        options: Further arguments of ``nn.Embedding``.
    """

    kind: str
    inputs: int
    outputs: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"
    bias: bool = False
    runs: int = 1
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def parameters(self) -> int:
        """Numbers it learns, the bias included."""
        weights = self.inputs * self.outputs // self.groups * math.prod(self.kernel)
        return weights + (self.outputs if self.bias else 0)

    def output_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """Return the spatial size of the output for an input of spatial size ``size`` (of Linear: its rows)."""
        if not self.kernel:
            return tuple(size)
        spans = [d * (k - 1) for k, d in zip(self.kernel, self.dilation, strict=True)]
        if self.padding == "same":
            return tuple(size)
        assert not isinstance(self.padding, str)
        axes = zip(size, spans, self.stride, self.padding, strict=True)
        if self.kind == "conv":
            return tuple((n + 2 * p - span - 1) // s + 1 for n, span, s, p in axes)
        extra = self.output_padding
        return tuple((n - 1) * s - 2 * p + span + e + 1 for (n, span, s, p), e in zip(axes, extra, strict=True))

    def macs(self, size: Sequence[int] = ()) -> int:
        """Return the multiply-accumulate operations for one sample, as torch's own counter counts them.

        Args:
            size: Spatial size of the input; of Linear the number of rows, ``()`` for one.

        >>> LayerShape("conv", 3, 8, (3, 3), (2, 2), (1, 1), (1, 1)).macs((32, 32))
        55296
        """
        positions = size if self.kind == "conv_transpose" else self.output_size(size)
        return math.prod(positions) * self.macs_at_one

    @property
    def macs_at_one(self) -> int:
        """Multiply-accumulate operations for one row, or at one position."""
        if self.kind == "embedding":
            return 0
        return self.runs * (self.parameters - (self.outputs if self.bias else 0))

    def traffic(self, size: Sequence[int]) -> int:
        """Return the inputs and outputs for one sample, which are read and written.

        >>> LayerShape("linear", 4, 2).traffic((3,))
        18
        """
        seen, made = math.prod(size), math.prod(self.output_size(size))
        return (
            self.outputs * made if self.kind == "embedding" else self.runs * (self.inputs * seen + self.outputs * made)
        )

    def build(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> nn.Module:
        """Return an ordinary torch layer of this shape."""
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        if self.kind == "linear":
            return nn.Linear(self.inputs, self.outputs, self.bias, **where)
        if self.kind == "embedding":
            return nn.Embedding(self.inputs, self.outputs, **self.options, **where)
        more: dict[str, Any] = {
            "dilation": self.dilation,
            "groups": self.groups,
            "bias": self.bias,
            "padding_mode": self.padding_mode,
        }
        place: tuple[Any, ...] = (self.inputs, self.outputs, self.kernel, self.stride, self.padding)
        if self.kind == "conv":
            make: Callable[..., nn.Module] = _CONVS[len(self.kernel) - 1]
        else:
            make = _TRANSPOSED[len(self.kernel) - 1]
            more["output_padding"] = self.output_padding
        return make(*place, **more, **where)


def shape_of(layer: nn.Module) -> LayerShape:
    """Return the shape of a layer.

    Raises:
        ConfigurationError: If the layer is of none of :data:`LAYERS`, or is more than it looks like; says why.

    >>> shape_of(nn.Conv1d(4, 6, 3, padding="same")).padding
    'same'
    """
    reason = _foreign(layer)
    if reason:
        raise ConfigurationError(reason)
    if isinstance(layer, nn.Linear):
        return LayerShape("linear", layer.in_features, layer.out_features, bias=layer.bias is not None)
    if isinstance(layer, nn.Embedding):
        options = {
            "padding_idx": layer.padding_idx,
            "scale_grad_by_freq": layer.scale_grad_by_freq,
            "sparse": layer.sparse,
        }
        return LayerShape("embedding", layer.num_embeddings, layer.embedding_dim, options=options)
    assert isinstance(layer, _CONVS + _TRANSPOSED)
    return LayerShape(
        kind="conv_transpose" if isinstance(layer, _TRANSPOSED) else "conv",
        inputs=layer.in_channels,
        outputs=layer.out_channels,
        kernel=tuple(layer.kernel_size),
        stride=tuple(layer.stride),
        padding=_padding(layer),
        dilation=tuple(layer.dilation),
        output_padding=tuple(layer.output_padding),
        groups=layer.groups,
        padding_mode=layer.padding_mode,
        bias=layer.bias is not None,
    )


def _padding(layer: Any) -> tuple[int, ...] | str:
    if isinstance(layer.padding, str):
        return "same" if layer.padding == "same" else (0,) * len(layer.kernel_size)
    return tuple(layer.padding)


def _foreign(layer: nn.Module) -> str:
    """Return why a layer cannot be described, or nothing."""
    base = next((kind for kind in LAYERS if isinstance(layer, kind)), None)
    name = type(layer).__name__
    if base is None:
        return f"{name} is none of {', '.join(kind.__name__ for kind in LAYERS)}"
    if parametrize.is_parametrized(layer):
        return "its weight is parametrized; bake the parametrization first"
    weight = dict(layer.named_parameters(recurse=False)).get("weight")
    if weight is None:
        return "its weight is not a Parameter of its own (computed by a hook, such as weight norm)"
    if nn.parameter.is_lazy(weight):
        return "it has no shape yet (a lazy layer); run one batch first"
    if not weight.is_floating_point() or weight.element_size() < 2:
        return f"its weight is {weight.dtype}; factors need float16, bfloat16, float32 or float64"
    if type(layer).forward is not base.forward:
        return f"{name} has a forward of its own, which factors would not follow"
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight without calling it"
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return "`max_norm` rescales rows of the table, which a product of two matrices cannot do"
    return ""


def blocks_of(weight: Tensor, shape: LayerShape) -> Tensor:
    r"""Return a weight as (groups, out / groups, in / groups, \*kernel), of a transposed convolution seen backwards.

    The map of a transposed convolution is the adjoint of that of a convolution with the same weight. So whatever
    factorizes a convolution also factorizes it, with the factors in reverse order.
    """
    if shape.kind == "embedding":
        return weight.t().unsqueeze(0)
    return weight.unflatten(0, (shape.groups, -1))


def weight_of(blocks: Tensor, shape: LayerShape) -> Tensor:
    """Undo :func:`blocks_of`."""
    return blocks[0].t() if shape.kind == "embedding" else blocks.flatten(0, 1)


def link(
    shape: LayerShape, widths: Sequence[int], axes: Sequence[Sequence[int]], depthwise: Sequence[int] = ()
) -> tuple[LayerShape, ...]:
    """Return the shapes of the factors that a layer is split into, in the order in which they run.

    Args:
        shape: Of the layer.
        widths: Channels between the factors, over all groups, seen as a convolution (see :func:`blocks_of`).
        axes: Spatial axes that each factor works along; one with a kernel of 1 may be left out: the first factor
            takes its stride and padding.
        depthwise: Numbers of the factors that keep channels apart.
    """
    backwards = shape.kind == "conv_transpose"
    ends = (shape.outputs, shape.inputs) if backwards else (shape.inputs, shape.outputs)
    channels = [ends[0], *widths, ends[1]]
    named = {axis for some in axes for axis in some}
    found = []
    for index, some in enumerate(axes):
        mine = {*some, *(set(range(len(shape.kernel))) - named if index == 0 else ())}
        before, after = channels[index : index + 2]
        groups = before if index in depthwise else shape.groups
        found.append(_part(shape, mine, (after, before) if backwards else (before, after), groups))
    ordered = found[::-1] if backwards else found
    return (*ordered[:-1], replace(ordered[-1], bias=shape.bias))


def _part(shape: LayerShape, axes: set[int], channels: tuple[int, int], groups: int) -> LayerShape:
    def pick(values: tuple[int, ...], other: int) -> tuple[int, ...]:
        return tuple(value if axis in axes else other for axis, value in enumerate(values))

    return LayerShape(
        kind=shape.kind,
        inputs=channels[0],
        outputs=channels[1],
        kernel=pick(shape.kernel, 1),
        stride=pick(shape.stride, 1),
        padding=shape.padding if isinstance(shape.padding, str) else pick(shape.padding, 0),
        dilation=pick(shape.dilation, 1),
        output_padding=pick(shape.output_padding, 0),
        groups=groups,
        padding_mode=shape.padding_mode,
    )


def own_tensors(layer: nn.Module) -> dict[str, nn.Parameter]:
    """Return the Parameters that a layer itself holds, by name."""
    return dict(layer.named_parameters(recurse=False))
