"""Tensor trains: of convolutions axis by axis, and of Linear layers as a train of small matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.low_rank.method import PLAIN, Effort, Method, Ranks, along, kernel_reason, sides, wide_axes
from lightning_compress.low_rank.shapes import LayerShape, link
from lightning_compress.low_rank.tensor import balanced_factors, tensor_train, train_ranks


class ConvTrain(Method):
    r"""A kernel of 1, one kernel along each axis, and a kernel of 1, all of them mixing channels (TT-SVD).

    :math:`W_{n c i j} \approx \sum G_{c r_1} G_{r_1 i r_2} G_{r_2 j r_3} G_{r_3 n}` (Oseledets 2011):
    :math:`\text{in}\, r_1 + \sum r_i d_i r_{i+1} + r_{d+1} \text{out}` weights.
    """

    name = "tt"
    rank_names = "one more than the kernel has axes of more than 1"

    def reason(self, shape: LayerShape) -> str:
        """Return why the method does not fit a layer, or nothing."""
        return kernel_reason(shape)

    def full_ranks(self, shape: LayerShape) -> Ranks:
        """Return the ranks of the unfoldings."""
        return tuple(rank * shape.groups for rank in train_ranks(self._sizes(shape)))

    def usable(self, shape: LayerShape, ranks: Ranks) -> Ranks:
        """Return ranks of which none exceeds what its neighbours let through."""
        super().usable(shape, ranks)
        inner = [rank // shape.groups for rank in ranks]
        return tuple(rank * shape.groups for rank in train_ranks(self._sizes(shape), inner))

    def factors(self, shape: LayerShape, ranks: Ranks) -> tuple[LayerShape, ...]:
        """Return kernels of 1 around one along each axis."""
        return link(shape, ranks, [(), *([axis] for axis in wide_axes(shape.kernel)), ()])

    def split(self, weight: Tensor, ranks: Ranks, effort: Effort = PLAIN) -> list[Tensor]:
        """Return the cores."""
        kernel, single = weight.shape[2:], (1,) * (weight.dim() - 2)
        axes = wide_axes(kernel)
        first, *between, last = tensor_train(self._tensor(weight), ranks)
        ends = (first[0].t(), last[..., 0].t())
        places = [
            core.permute(2, 0, 1).reshape(core.shape[2], core.shape[0], *along(kernel, [axis]))
            for axis, core in zip(axes, between, strict=True)
        ]
        before, after = (end.reshape(*end.shape, *single) for end in ends)
        return [before, *places, after]

    def unfoldings(self, weight: Tensor) -> list[Tensor]:
        """Return the tensor cut after each of its sides."""
        tensor = self._tensor(weight)
        return [tensor.flatten(0, cut).flatten(1) for cut in range(tensor.dim() - 1)]

    def _tensor(self, weight: Tensor) -> Tensor:
        return weight.movedim(0, -1).reshape(self._sizes_of(weight))

    def _sizes_of(self, weight: Tensor) -> list[int]:
        return [weight.shape[1], *(size for size in weight.shape[2:] if size > 1), weight.shape[0]]

    def _sizes(self, shape: LayerShape) -> list[int]:
        out, into = sides(shape)
        return [into, *(size for size in shape.kernel if size > 1), out]


class MatrixTrain(Method):
    r"""A matrix as a train of small ones (Novikov et al. 2015, arXiv 1509.06569).

    Outputs and inputs are numbered by d digits each, :math:`o = (o_1 \dots o_d)`, whose sizes are as even as can be:
    :math:`W_{o, i} \approx G^1_{o_1 i_1} G^2_{o_2 i_2} \cdots G^d_{o_d i_d}`, with matrices :math:`G^k` of
    :math:`r_{k-1} \times r_k`. :math:`\sum r_{k-1} o_k i_k r_k` weights: very few, at the price of a large error on
    most trained weights; it pays for wide layers trained in this form. d is one more than the number of ranks.
    """

    name = "tt"
    rank_names = "any number, usually two or three"

    def reason(self, shape: LayerShape) -> str:
        """Return why the method does not fit a layer, or nothing."""
        return "" if shape.kind == "linear" else f"there is no train for {shape.kind} layers: use 'svd'"

    def full_ranks(self, shape: LayerShape) -> Ranks:
        """Return the ranks of three matrices."""
        return self.usable(shape, (shape.inputs * shape.outputs,) * 2)

    def usable(self, shape: LayerShape, ranks: Ranks) -> Ranks:
        """Return ranks of which none exceeds what its neighbours let through."""
        if not ranks:
            raise ConfigurationError(f"`ranks` of {self.name!r} are {self.rank_names}, got none")
        return train_ranks([o * i for o, i in zip(*digits(shape, len(ranks) + 1), strict=True)], ranks)

    def factors(self, shape: LayerShape, ranks: Ranks) -> tuple[LayerShape, ...]:
        """Return a Linear for each pair of digits, which runs once for each value of all other digits."""
        outs, ins = digits(shape, len(ranks) + 1)
        ends = [1, *ranks, 1]
        return tuple(
            LayerShape(
                "linear", ends[k] * ins[k], outs[k] * ends[k + 1], runs=math.prod(outs[:k]) * math.prod(ins[k + 1 :])
            )
            for k in range(len(outs))
        )

    def split(self, weight: Tensor, ranks: Ranks, effort: Effort = PLAIN) -> list[Tensor]:
        """Return the cores as weights of Linear, (out digit x rank after, rank before x in digit)."""
        outs, ins = digits(_linear(weight), len(ranks) + 1)
        cores = tensor_train(_paired(weight, outs, ins), ranks)
        return [
            core.unflatten(1, (o, i)).permute(1, 3, 0, 2).reshape(o * core.shape[2], core.shape[0] * i)
            for core, o, i in zip(cores, outs, ins, strict=True)
        ]

    def merge(self, factors: Sequence[Tensor], shape: LayerShape) -> Tensor:
        """Undo :meth:`split`."""
        outs, ins = digits(shape, len(factors))
        product, before = torch.ones(1, 1, 1, dtype=factors[0].dtype, device=factors[0].device), 1
        for factor, o, i in zip(factors, outs, ins, strict=True):
            core = factor.reshape(o, -1, before, i)
            before = core.shape[1]
            product = torch.einsum("xyr,osri->xoyis", product, core).flatten(2, 3).flatten(0, 1)
        return product[..., 0]

    def unfoldings(self, weight: Tensor) -> list[Tensor]:
        """Return the paired digits cut after each of the first two."""
        tensor = _paired(weight, *digits(_linear(weight), 3))
        return [tensor.flatten(0, cut).flatten(1) for cut in range(2)]


class TensorTrain(Method):
    """Tensor train: :class:`ConvTrain` of convolutions, :class:`MatrixTrain` of Linear."""

    name = "tt"
    rank_names = "as many as the layer asks for"

    def _of(self, matrix: bool) -> Method:
        return MatrixTrain() if matrix else ConvTrain()

    def reason(self, shape: LayerShape) -> str:
        """Return why the method does not fit a layer, or nothing."""
        return self._of(not shape.kernel).reason(shape)

    def full_ranks(self, shape: LayerShape) -> Ranks:
        """Return the ranks at which the layer is reproduced exactly."""
        return self._of(not shape.kernel).full_ranks(shape)

    def usable(self, shape: LayerShape, ranks: Ranks) -> Ranks:
        """Return ranks of which none exceeds what its neighbours let through."""
        return self._of(not shape.kernel).usable(shape, ranks)

    def factors(self, shape: LayerShape, ranks: Ranks) -> tuple[LayerShape, ...]:
        """Return the shapes of the factors."""
        return self._of(not shape.kernel).factors(shape, ranks)

    def split(self, weight: Tensor, ranks: Ranks, effort: Effort = PLAIN) -> list[Tensor]:
        """Return the cores."""
        return self._of(weight.dim() == 2).split(weight, ranks, effort)

    def merge(self, factors: Sequence[Tensor], shape: LayerShape) -> Tensor:
        """Undo :meth:`split`."""
        return MatrixTrain().merge(factors, shape) if not shape.kernel else super().merge(factors, shape)

    def unfoldings(self, weight: Tensor) -> list[Tensor]:
        """Return the tensor cut at each rank."""
        return self._of(weight.dim() == 2).unfoldings(weight)


def digits(shape: LayerShape, count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the sizes of the digits that outputs and inputs are numbered by.

    >>> digits(LayerShape("linear", 784, 256), 3)
    ((4, 8, 8), (7, 8, 14))
    """
    return balanced_factors(shape.outputs, count), balanced_factors(shape.inputs, count)


def _linear(weight: Tensor) -> LayerShape:
    return LayerShape("linear", weight.shape[1], weight.shape[0])


def _paired(weight: Tensor, outs: Sequence[int], ins: Sequence[int]) -> Tensor:
    """Return a matrix with an index for each pair of digits."""
    split = weight.reshape(*outs, *ins)
    order = [axis for pair in zip(range(len(outs)), range(len(outs), 2 * len(outs)), strict=True) for axis in pair]
    return split.permute(order).reshape([o * i for o, i in zip(outs, ins, strict=True)])
