"""The methods by name: which layers each fits, its ranks, its factors' shapes, and the algebra from and to a weight."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_compress.core.errors import ConfigurationError, did_you_mean
from lightning_compress.low_rank.matrix import split_matrix
from lightning_compress.low_rank.shapes import LayerShape, link

Ranks = tuple[int, ...]


class Method(ABC):
    r"""One way to write a layer as a sequence of smaller ones.

    ``split`` and ``merge`` work on one group's weight (out, in, \*kernel), of a transposed convolution seen backwards
    (:func:`~lightning_compress.low_rank.shapes.blocks_of`), of Linear without kernel; their factors are in the order of
    a convolution, each (out, in, \*kernel), or (channels, 1, \*kernel) where it keeps channels apart. Ranks count
    channels over all groups and are those of this order too: a layer's input side first, unless it is transposed.
    """

    name: ClassVar[str]
    rank_names: ClassVar[str]
    """What the ranks are, for messages."""

    @abstractmethod
    def reason(self, shape: LayerShape) -> str:
        """Return why the method does not fit a layer, or nothing."""

    @abstractmethod
    def full_ranks(self, shape: LayerShape) -> Ranks:
        """Return the ranks at which the layer is reproduced exactly; more is useless."""

    @abstractmethod
    def factors(self, shape: LayerShape, ranks: Ranks) -> tuple[LayerShape, ...]:
        """Return the shapes of the factors, in the order in which they run."""

    @abstractmethod
    def split(self, weight: Tensor, ranks: Ranks) -> list[Tensor]:
        """Return the factors of one group's weight, at one group's ranks."""

    @abstractmethod
    def merge(self, factors: Sequence[Tensor]) -> Tensor:
        """Undo :meth:`split`."""

    @abstractmethod
    def unfoldings(self, weight: Tensor) -> list[Tensor]:
        """Return for each rank the matrix of one group's weight whose singular values say what the rank loses."""


def _common(shape: LayerShape) -> str:
    if shape.kind in ("conv", "conv_transpose") and shape.groups > 1 and shape.inputs == shape.groups:
        return "depthwise: each channel has a kernel of its own, there is nothing to share"
    return ""


def _sides(shape: LayerShape) -> tuple[int, int]:
    """Return outputs and inputs of one group, of a transposed convolution seen backwards."""
    out, into = (shape.inputs, shape.outputs) if shape.kind == "conv_transpose" else (shape.outputs, shape.inputs)
    return out // shape.groups, into // shape.groups


class MatrixSVD(Method):
    r"""Truncated SVD of a matrix: Linear, tables of embeddings, and convolutions with kernels of 1.

    :math:`W \approx U_k S_k V_k^\top`: two layers with k channels between them, :math:`k (m + n)` weights.
    """

    name = "svd"
    rank_names = "one rank"

    def reason(self, shape: LayerShape) -> str:
        """Return why the method does not fit a layer, or nothing."""
        if math.prod(shape.kernel) > 1:
            return f"its kernel is {_times(shape.kernel)}: use 'channel_svd' or 'spatial_svd'"
        return _common(shape)

    def full_ranks(self, shape: LayerShape) -> Ranks:
        """Return the smaller side."""
        return (min(_sides(shape)) * shape.groups,)

    def factors(self, shape: LayerShape, ranks: Ranks) -> tuple[LayerShape, ...]:
        """Return a layer to the rank, and one from it."""
        if shape.kind == "embedding":
            table = LayerShape("embedding", shape.inputs, ranks[0], options=shape.options)
            return table, LayerShape("linear", ranks[0], shape.outputs)
        return link(shape, ranks, [range(len(shape.kernel)), ()])

    def split(self, weight: Tensor, ranks: Ranks) -> list[Tensor]:
        """Return the two factors."""
        after, before = split_matrix(weight.flatten(1), ranks[0])
        single = (1,) * (weight.dim() - 2)
        return [before.reshape(ranks[0], *weight.shape[1:]), after.reshape(*after.shape, *single)]

    def merge(self, factors: Sequence[Tensor]) -> Tensor:
        """Return the product."""
        before, after = factors
        return (after.flatten(1) @ before.flatten(1)).reshape(-1, *before.shape[1:])

    def unfoldings(self, weight: Tensor) -> list[Tensor]:
        """Return outputs against all that they see."""
        return [weight.flatten(1)]


class ChannelSVD(MatrixSVD):
    r"""A convolution to k channels, then a mixing of them by a kernel of 1 (Denton et al. 2014, arXiv 1404.0736).

    The truncated SVD of the weight as a matrix (out, in x kernel):
    :math:`k (\text{in} \prod d_i + \text{out})` weights.
    """

    name = "channel_svd"

    def reason(self, shape: LayerShape) -> str:
        """Return why the method does not fit a layer, or nothing."""
        return _common(shape) if shape.kernel else "it is no convolution: use 'svd'"

    def full_ranks(self, shape: LayerShape) -> Ranks:
        """Return the smaller side of the matrix."""
        out, into = _sides(shape)
        return (min(out, into * math.prod(shape.kernel)) * shape.groups,)


class SpatialSVD(Method):
    r"""A kernel along the first axis, then one along the others (Tai et al. 2016, arXiv 1511.06067).

    .. math:: W_n^c \approx \sum_k h_n^k (v_k^c)^\top

    The closed form of the paper: the truncated SVD of the weight as a matrix (in x d1, d2 x out) is the global
    optimum. :math:`k (\text{in}\, d_1 + d_2\, \text{out})` weights. Of 3d kernels the second factor has two axes
    (and is a convolution that can be split again).
    """

    name = "spatial_svd"
    rank_names = "one rank"

    def reason(self, shape: LayerShape) -> str:
        """Return why the method does not fit a layer, or nothing."""
        if sum(size > 1 for size in shape.kernel) < 2:
            other = "'channel_svd'" if math.prod(shape.kernel) > 1 else "'svd'"
            return f"its kernel has no two axes to separate: use {other}"
        return _common(shape)

    def full_ranks(self, shape: LayerShape) -> Ranks:
        """Return the smaller side of the matrix."""
        out, into = _sides(shape)
        axis = _first_axis(shape.kernel)
        rest = math.prod(shape.kernel[axis + 1 :])
        return (min(into * shape.kernel[axis], rest * out) * shape.groups,)

    def factors(self, shape: LayerShape, ranks: Ranks) -> tuple[LayerShape, ...]:
        """Return the kernel along the first axis, and that along the rest."""
        axis = _first_axis(shape.kernel)
        return link(shape, ranks, [[axis], range(axis + 1, len(shape.kernel))])

    def split(self, weight: Tensor, ranks: Ranks) -> list[Tensor]:
        """Return the two kernels."""
        out, into, kernel = weight.shape[0], weight.shape[1], weight.shape[2:]
        past, ones = _first_axis(kernel) + 1, (1,) * len(kernel)
        before, after = (*kernel[:past], *ones[past:]), (*ones[:past], *kernel[past:])
        left, right = split_matrix(self.unfoldings(weight)[0], ranks[0])
        return [left.t().reshape(-1, into, *before), right.reshape(-1, *after, out).movedim(-1, 0)]

    def merge(self, factors: Sequence[Tensor]) -> Tensor:
        """Return the products of the kernels, summed over the channels between them."""
        before, after = factors
        kernel = tuple(max(pair) for pair in zip(before.shape[2:], after.shape[2:], strict=True))
        product = torch.einsum("rcx,nry->ncxy", before.flatten(2), after.flatten(2))
        return product.reshape(after.shape[0], before.shape[1], *kernel)

    def unfoldings(self, weight: Tensor) -> list[Tensor]:
        """Return inputs and first axis against outputs and the rest."""
        rows = weight.shape[1] * weight.shape[2 : _first_axis(weight.shape[2:]) + 3].numel()
        return [weight.movedim(0, -1).reshape(rows, -1)]


def _first_axis(kernel: Sequence[int]) -> int:
    return next(axis for axis, size in enumerate(kernel) if size > 1)


def _times(kernel: Sequence[int]) -> str:
    return "x".join(map(str, kernel))


METHODS: dict[str, Method] = {method.name: method for method in (MatrixSVD(), ChannelSVD(), SpatialSVD())}
"""The closed registry of methods."""


def method_named(name: str) -> Method:
    """Return a method.

    Raises:
        ConfigurationError: If there is none of that name; names the nearest.
    """
    if name not in METHODS:
        raise ConfigurationError(f"`method` is {name!r}: {did_you_mean(str(name), ('auto', *METHODS), limit=4)}")
    return METHODS[name]


def automatic(shape: LayerShape) -> str:
    """Return the method that makes a layer fastest on CPUs: spatial SVD for kernels, else an SVD of channels.

    >>> automatic(LayerShape("linear", 8, 8)), automatic(LayerShape("conv", 8, 8, (3, 3)))
    ('svd', 'spatial_svd')
    """
    names = ("spatial_svd", "svd", "channel_svd")
    return next((name for name in names if not METHODS[name].reason(shape)), names[-1])
