"""What is pruned as one: weights, rows, columns, kernels, filters, channels, blocks, or N of every M inputs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.core.errors import ConfigurationError, did_you_mean

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

_TOGETHER: dict[str, tuple[int, ...]] = {
    "element": (),
    "row": (2, 3),
    "column": (1,),
    "kernel": (3,),
    "filter": (2, 3),
    "channel": (1, 3),
}
_EXAMPLES = (*_TOGETHER, "block:4x1", "2:4")

REDUCTIONS = ("sum", "mean", "l2", "first")
"""How the scores of a group's weights make the score of the group."""


@dataclass(frozen=True)
class Layout:
    """How a weight tensor maps inputs to outputs.

    Args:
        groups: Groups of a convolution; each has outputs and inputs of its own.
        transposed: Whether inputs come first, as in transposed convolutions.
        kernel: How many dimensions after the second are positions of a kernel; all others are inputs.
    """

    groups: int = 1
    transposed: bool = False
    kernel: int = 0


def layout_of(layer: nn.Module) -> Layout:
    """Return the layout of a layer's weights; whatever is no convolution holds matrices, outputs first.

    >>> layout_of(nn.ConvTranspose2d(4, 6, 3, groups=2))
    Layout(groups=2, transposed=True, kernel=2)
    """
    if isinstance(layer, (*_CONVOLUTIONS, *_TRANSPOSED)):
        return Layout(layer.groups, isinstance(layer, _TRANSPOSED), len(layer.kernel_size))
    return Layout()


def to_units(weight: Tensor, layout: Layout) -> Tensor:
    """Return the weight as ``(groups, outputs, inputs, positions)``; outputs and inputs are those of one group.

    >>> to_units(torch.ones(4, 3, 5, 5), Layout(groups=2, transposed=True, kernel=2)).shape
    torch.Size([2, 3, 2, 25])
    """
    if not layout.kernel:
        return weight.reshape(1, weight.shape[0], -1, 1)
    units = weight.reshape(layout.groups, weight.shape[0] // layout.groups, weight.shape[1], -1)
    return units.transpose(1, 2) if layout.transposed else units


def from_units(units: Tensor, layout: Layout, shape: Sequence[int]) -> Tensor:
    """Undo :func:`to_units`.

    Args:
        units: ``(groups, outputs, inputs, positions)``.
        layout: As it was given to :func:`to_units`.
        shape: Shape of the weight.
    """
    return (units.transpose(1, 2) if layout.transposed else units).reshape(tuple(shape))


@dataclass(frozen=True)
class Granularity:
    """A way to cut a weight into groups that are pruned as one.

    Args:
        kind: ``"element"``, ``"row"``, ``"column"``, ``"kernel"``, ``"filter"``, ``"channel"``, ``"block"``, ``"n:m"``.
        a: Outputs of a block, or how many of ``b`` inputs stay.
        b: Inputs of a block, or of how many inputs ``a`` stay.
    """

    kind: str = "element"
    a: int = 1
    b: int = 1

    def __str__(self) -> str:
        return {"block": f"block:{self.a}x{self.b}", "n:m": f"{self.a}:{self.b}"}.get(self.kind, self.kind)

    @property
    def single(self) -> bool:
        """Whether every weight is ranked by itself."""
        return self.kind in ("element", "n:m")

    @property
    def final(self) -> float | None:
        """The sparsity that an N:M pattern has, ``None`` for what can have any."""
        return 1 - self.a / self.b if self.kind == "n:m" else None


def parse_granularity(text: Any) -> Granularity:
    """Return the granularity that a word means.

    Over the matrix of a layer (for a convolution: outputs by inputs x kernel positions, the matrix that unrolled
    patches are multiplied with):

    - ``"element"``: each weight;
    - ``"row"``, ``"filter"``: all weights of an output;
    - ``"column"``: all weights of an input at one kernel position (the shapes of Wen et al. 2016, arXiv 1608.03665);
    - ``"kernel"``: the weights from one input to one output;
    - ``"channel"``: all weights of an input;
    - ``"block:AxB"``: A outputs by B inputs, at one kernel position;
    - ``"N:M"``: each weight, but only so many that N of every M consecutive inputs stay (2:4, arXiv 2104.08378).

    Outputs and inputs of transposed convolutions are swapped as they must be, and those of grouped convolutions belong
    to one group.

    Raises:
        ConfigurationError: For a word that is none of these, or numbers that make no sense.

    >>> parse_granularity("block:4x1"), parse_granularity("2:4").final
    (Granularity(kind='block', a=4, b=1), 0.5)
    """
    if not isinstance(text, str):
        hint = "; in YAML write it in quotes: '2:4'" if isinstance(text, int) else ""
        raise ConfigurationError(f"`granularity` must be a string such as 'filter' or '2:4', got {text!r}{hint}")
    if text in _TOGETHER:
        return Granularity(text)
    block, pattern = re.fullmatch(r"block:(\d+)x(\d+)", text), re.fullmatch(r"(\d+):(\d+)", text)
    if block is not None:
        a, b = int(block[1]), int(block[2])
        if min(a, b) < 1 or max(a, b) == 1:
            raise ConfigurationError(f"`granularity` {text!r} must name a block of at least two weights: 'block:4x1'")
        return Granularity("block", a, b)
    if pattern is not None:
        a, b = int(pattern[1]), int(pattern[2])
        if not 1 <= a < b:
            raise ConfigurationError(f"`granularity` {text!r} must keep fewer than all, and at least 1: '2:4', '1:4'")
        return Granularity("n:m", a, b)
    raise ConfigurationError(f"`granularity` is {text!r}: {did_you_mean(text, _EXAMPLES, limit=4)}")


def misfit(shape: Sequence[int], granularity: Granularity, layout: Layout) -> str | None:
    """Return why a weight cannot be cut that way, or ``None`` if it can.

    >>> misfit((8, 3), Granularity("n:m", 2, 4), Layout())
    'its 3 inputs are not a multiple of 4'
    """
    units = to_units(torch.empty(tuple(shape), device="meta"), layout)
    _, outputs, inputs, _ = units.shape
    per = " per group" if layout.groups > 1 else ""
    if granularity.kind == "block" and outputs % granularity.a:
        return f"its {outputs} outputs{per} are not a multiple of {granularity.a}"
    if granularity.kind in ("block", "n:m") and inputs % granularity.b:
        return f"its {inputs} inputs{per} are not a multiple of {granularity.b}"
    return None


def group_scores(scores: Tensor, granularity: Granularity, layout: Layout, how: str = "mean") -> Tensor:
    """Return one score a group.

    Args:
        scores: One score a weight, in the weight's shape.
        granularity: Which weights are one group.
        layout: Of the layer.
        how: ``"sum"``, ``"mean"``, ``"l2"`` (root of the sum of squares) or ``"first"`` (that of the first weight).

    Returns:
        ``scores`` itself for single weights; otherwise four dimensions that :func:`expand_mask` understands.

    Raises:
        ConfigurationError: For an unknown reduction.

    >>> group_scores(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), Granularity("column"), Layout(), "sum").flatten()
    tensor([4., 6.])
    """
    if how not in REDUCTIONS:
        raise ConfigurationError(f"`how` is {how!r}: {did_you_mean(how, REDUCTIONS)}")
    if granularity.single:
        return scores
    units = to_units(scores, layout)
    if granularity.kind == "block":
        groups, outputs, inputs, positions = units.shape
        a, b = granularity.a, granularity.b
        units = units.reshape(groups, outputs // a, a, inputs // b, b, positions)
        return _reduce(units, (2, 4), how).squeeze(4).squeeze(2)
    return _reduce(units, _TOGETHER[granularity.kind], how)


def expand_mask(mask: Tensor, granularity: Granularity, layout: Layout, like: Tensor) -> Tensor:
    """Return the ``int8`` mask of the weights from that of their groups, in the strides of ``like``.

    >>> mask = torch.tensor([-1, 0], dtype=torch.int8).reshape(1, 1, 2, 1)
    >>> expand_mask(mask, Granularity("column"), Layout(), torch.ones(2, 2)).tolist()
    [[-1, 0], [-1, 0]]
    """
    if granularity.single:
        return mask
    if granularity.kind == "block":
        mask = mask.repeat_interleave(granularity.a, 1).repeat_interleave(granularity.b, 2)
    units = mask.expand(to_units(like, layout).shape)
    full = torch.empty_like(like, dtype=torch.int8, requires_grad=False)
    return full.copy_(from_units(units, layout, like.shape))


def may_go(scores: Tensor, granularity: Granularity, layout: Layout) -> Tensor:
    """Return which weights an N:M pattern lets go: the M - N lowest of every M consecutive inputs.

    Ties go to the earlier input.

    Args:
        scores: One score a weight, in the weight's shape.
        granularity: Of kind ``"n:m"``.
        layout: Of the layer.

    Returns:
        A boolean tensor in the weight's shape.

    >>> may_go(torch.tensor([[4.0, 1.0, 3.0, 2.0]]), Granularity("n:m", 2, 4), Layout()).tolist()
    [[False, True, False, True]]
    """
    units = to_units(scores, layout)
    groups, outputs, inputs, positions = units.shape
    runs = units.reshape(groups, outputs, inputs // granularity.b, granularity.b, positions)
    order = runs.argsort(dim=3, stable=True)
    free = torch.zeros_like(runs, dtype=torch.bool)
    free.scatter_(3, order[:, :, :, : granularity.b - granularity.a], True)
    return from_units(free.reshape(units.shape), layout, scores.shape)


def _reduce(values: Tensor, dims: tuple[int, ...], how: str) -> Tensor:
    if how == "sum":
        return values.sum(dims, keepdim=True)
    if how == "mean":
        return values.mean(dims, keepdim=True)
    if how == "l2":
        return values.square().sum(dims, keepdim=True).sqrt()
    for dim in dims:
        values = values.narrow(dim, 0, 1)
    return values
