"""Methods with one rank and two factors: truncated SVDs of the weight as a matrix, in closed form."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_compress.low_rank.matrix import principal, split_matrix
from lightning_compress.low_rank.method import PLAIN, Effort, Method, Ranks, along, shared_reason, sides, wide_axes
from lightning_compress.low_rank.moments import Moment
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
        after, before = split_matrix(weight.flatten(1), ranks[0], effort.moment, effort.directions)
        single = (1,) * (weight.dim() - 2)
        return [before.reshape(ranks[0], *weight.shape[1:]), after.reshape(*after.shape, *single)]

    def unfoldings(self, weight: Tensor) -> list[Tensor]:
        """Return outputs against all that they see."""
        return [weight.flatten(1)]

    def principal(self, weight: Tensor, moment: Moment | None = None) -> tuple[Tensor, Tensor]:
        """Return the strengths and directions of the (whitened) matrix."""
        matrix = weight.flatten(1)
        return principal(matrix if moment is None else moment.whiten(matrix))


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
    (and is a convolution that can be split again). With the second moment of the inputs the second factor becomes the
    one that keeps the outputs best, the first being what it is: no more is lost of them than by the closed form.
    """

    name = "spatial_svd"
    rank_names = "one rank"
    uses_moment = True

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
        left, right = split_matrix(self.unfoldings(weight)[0], ranks[0], None, effort.directions)
        before = left.t().reshape(ranks[0], weight.shape[1], *along(kernel, [first]))
        after = right.reshape(ranks[0], *along(kernel, rest), len(weight)).movedim(-1, 0)
        return [before, after if effort.moment is None else refit(weight, before, after, effort.moment)]

    def unfoldings(self, weight: Tensor) -> list[Tensor]:
        """Return inputs and first axis against outputs and the rest."""
        rows = weight.shape[1] * weight.shape[2 + wide_axes(weight.shape[2:])[0]]
        return [weight.movedim(0, -1).reshape(rows, -1)]

    def principal(self, weight: Tensor, moment: Moment | None = None) -> tuple[Tensor, Tensor]:
        """Return the strengths and directions of the matrix; the moment changes the second kernel only."""
        return principal(self.unfoldings(weight)[0])


def refit(weight: Tensor, before: Tensor, after: Tensor, moment: Moment) -> Tensor:
    r"""Return the second of two kernels that keeps the outputs best while the first stays: least squares.

    Args:
        weight: (out, in, \*kernel).
        before: (k, in, \*kernel), 1 along all axes but the first.
        after: (out, k, \*kernel), 1 along the first axis; what it starts from.
        moment: Of what each output sees.
    """
    first, second = before.flatten(2), after.flatten(2)  # (k, in, x), (out, k, y)
    places = torch.eye(second.shape[2], dtype=first.dtype, device=first.device)
    seen = torch.einsum("kcx,yz->kycxz", first, places).flatten(2).flatten(0, 1)  # (k y, in x z)
    lost = weight.flatten(1) - second.flatten(1) @ seen
    white, target = moment.whiten(seen), moment.whiten(lost)
    gram = white @ white.t()
    gram.diagonal().add_(gram.diagonal().mean() * torch.finfo(gram.dtype).eps * len(gram))
    factor, failed = torch.linalg.cholesky_ex(gram)
    if bool(failed):
        return after
    more = torch.cholesky_solve(white @ target.t(), factor).t()
    return after + more.to(after.dtype).reshape(after.shape)
