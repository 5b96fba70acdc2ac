"""Methods with one rank and two factors: truncated SVDs of the weight as a matrix, in closed form."""

from __future__ import annotations

import math

from torch import Tensor

from lightning_compress.low_rank.matrix import split_matrix
from lightning_compress.low_rank.method import PLAIN, Effort, Method, Ranks, along, shared_reason, sides, wide_axes
from lightning_compress.low_rank.shapes import LayerShape, link


class MatrixSVD(Method):
    r"""Truncated SVD of a matrix: Linear, tables of embeddings, and convolutions with kernels of 1.

    :math:`W \approx U_k S_k V_k^\top`: two layers with k channels between them, :math:`k (m + n)` weights. With the
    second moment of the inputs it is the outputs whose error is minimal (activation-aware SVD).
    """

    name = "svd"
    rank_names = "one rank"
    uses_moment = True

    def reason(self, shape: LayerShape) -> str:
        """Return why the method does not fit a layer, or nothing."""
        if math.prod(shape.kernel) > 1:
            return f"its kernel is {'x'.join(map(str, shape.kernel))}: use 'channel_svd' or 'spatial_svd'"
        return shared_reason(shape)

    def full_ranks(self, shape: LayerShape) -> Ranks:
        """Return the smaller side of the matrix."""
        out, into = sides(shape)
        return (min(out, into * math.prod(shape.kernel)) * shape.groups,)

    def factors(self, shape: LayerShape, ranks: Ranks) -> tuple[LayerShape, ...]:
        """Return a layer to the rank, and one from it."""
        if shape.kind == "embedding":
            table = LayerShape("embedding", shape.inputs, ranks[0], options=shape.options)
            return table, LayerShape("linear", ranks[0], shape.outputs)
        return link(shape, ranks, [range(len(shape.kernel)), ()])

    def split(self, weight: Tensor, ranks: Ranks, effort: Effort = PLAIN) -> list[Tensor]:
        """Return the two factors."""
        after, before = split_matrix(weight.flatten(1), ranks[0], effort.moment)
        single = (1,) * (weight.dim() - 2)
        return [before.reshape(ranks[0], *weight.shape[1:]), after.reshape(*after.shape, *single)]

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
        return shared_reason(shape) if shape.kernel else "it is no convolution: use 'svd'"


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
        if len(wide_axes(shape.kernel)) < 2:
            other = "'channel_svd'" if math.prod(shape.kernel) > 1 else "'svd'"
            return f"its kernel has no two axes to separate: use {other}"
        return shared_reason(shape)

    def full_ranks(self, shape: LayerShape) -> Ranks:
        """Return the smaller side of the matrix."""
        out, into = sides(shape)
        size = shape.kernel[wide_axes(shape.kernel)[0]]
        return (min(into * size, math.prod(shape.kernel) // size * out) * shape.groups,)

    def factors(self, shape: LayerShape, ranks: Ranks) -> tuple[LayerShape, ...]:
        """Return the kernel along the first axis, and that along the rest."""
        first, *rest = wide_axes(shape.kernel)
        return link(shape, ranks, [[first], rest])

    def split(self, weight: Tensor, ranks: Ranks, effort: Effort = PLAIN) -> list[Tensor]:
        """Return the two kernels."""
        kernel = weight.shape[2:]
        first, *rest = wide_axes(kernel)
        left, right = split_matrix(self.unfoldings(weight)[0], ranks[0])
        before = left.t().reshape(ranks[0], weight.shape[1], *along(kernel, [first]))
        return [before, right.reshape(ranks[0], *along(kernel, rest), len(weight)).movedim(-1, 0)]

    def unfoldings(self, weight: Tensor) -> list[Tensor]:
        """Return inputs and first axis against outputs and the rest."""
        rows = weight.shape[1] * weight.shape[2 + wide_axes(weight.shape[2:])[0]]
        return [weight.movedim(0, -1).reshape(rows, -1)]
