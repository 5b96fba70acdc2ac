"""Methods for kernels as tensors: Tucker-2 and CP."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_compress.low_rank.cp import decompose_cp, rotate, slices_of, spatial_bases
from lightning_compress.low_rank.method import PLAIN, Effort, Method, Ranks, along, kernel_reason, sides, wide_axes
from lightning_compress.low_rank.shapes import LayerShape, link
from lightning_compress.low_rank.tensor import tucker2


class Tucker(Method):
    r"""Fewer channels, the kernel between them, and back (Tucker-2, Kim et al. 2016, arXiv 1511.06530).

    :math:`W \approx G \times_1 U_{out} \times_2 U_{in}`: kernels of 1, of the layer's size, of 1;
    :math:`\text{in}\, r_1 + r_1 r_2 \prod d_i + r_2\, \text{out}` weights.
    """

    name = "tucker"
    rank_names = "two, of the input and of the output side"

    def reason(self, shape: LayerShape) -> str:
        """Return why the method does not fit a layer, or nothing."""
        return kernel_reason(shape)

    def full_ranks(self, shape: LayerShape) -> Ranks:
        """Return the widths of both sides."""
        out, into = sides(shape)
        return self.usable(shape, (into * shape.groups, out * shape.groups))

    def usable(self, shape: LayerShape, ranks: Ranks) -> Ranks:
        """Return ranks of which neither exceeds what the other lets through."""
        if len(ranks) != 2:
            return super().usable(shape, ranks)
        out, into = sides(shape)
        before = min(ranks[0], into * shape.groups, math.prod(shape.kernel) * ranks[1])
        return before, min(ranks[1], out * shape.groups, math.prod(shape.kernel) * before)

    def factors(self, shape: LayerShape, ranks: Ranks) -> tuple[LayerShape, ...]:
        """Return a kernel of 1, the kernel, and another of 1."""
        return link(shape, ranks, [(), wide_axes(shape.kernel), ()])

    def split(self, weight: Tensor, ranks: Ranks, effort: Effort = PLAIN) -> list[Tensor]:
        """Return the three factors."""
        single = (1,) * (weight.dim() - 2)
        into, core, out = tucker2(weight.flatten(2), (ranks[0], ranks[1]), effort.steps or 20)
        return [
            into.t().reshape(ranks[0], -1, *single),
            core.reshape(*core.shape[:2], *weight.shape[2:]),
            out.reshape(*out.shape, *single),
        ]

    def unfoldings(self, weight: Tensor) -> list[Tensor]:
        """Return inputs, and outputs, against everything else."""
        return [weight.transpose(0, 1).flatten(1), weight.flatten(1)]


class CP(Method):
    r"""Rank-one terms: channels are mixed, seen through one axis after the other apart, and mixed again.

    :math:`W_{n c i j} \approx \sum_r e_{n r} a_{c r} b_{i r} d_{j r}` (Lebedev et al. 2015, arXiv 1412.6553): a kernel
    of 1, one depthwise kernel along each axis, a kernel of 1; :math:`r (\text{in} + \sum d_i + \text{out})` weights.
    Depthwise kernels run slowly for their few operations: it pays at strong compression only (five times and more).
    """

    name = "cp"
    rank_names = "one rank"

    def reason(self, shape: LayerShape) -> str:
        """Return why the method does not fit a layer, or nothing."""
        return kernel_reason(shape)

    def full_ranks(self, shape: LayerShape) -> Ranks:
        """Return a rank that is enough for any weight."""
        return (math.prod(shape.kernel) * min(sides(shape)) * shape.groups,)

    def factors(self, shape: LayerShape, ranks: Ranks) -> tuple[LayerShape, ...]:
        """Return a kernel of 1, depthwise ones, and a kernel of 1."""
        axes = wide_axes(shape.kernel)
        widths = ranks * (len(axes) + 1)
        return link(shape, widths, [(), *([axis] for axis in axes), ()], depthwise=range(1, len(axes) + 1))

    def split(self, weight: Tensor, ranks: Ranks, effort: Effort = PLAIN) -> list[Tensor]:
        """Return the factors, with the norm of each term spread evenly over them."""
        kernel, single = weight.shape[2:], (1,) * (weight.dim() - 2)
        terms = decompose_cp(weight, ranks[0], effort.steps).even()
        places = [
            axis.t().reshape(ranks[0], 1, *along(kernel, [index]))
            for index, axis in zip(wide_axes(kernel), terms.axes, strict=True)
        ]
        return [terms.into.t().reshape(ranks[0], -1, *single), *places, terms.out.reshape(-1, ranks[0], *single)]

    def unfoldings(self, weight: Tensor) -> list[Tensor]:
        """Return the widest of the unfoldings; its rank is the least that CP may need."""
        matrices = [weight.transpose(0, 1).flatten(1), weight.flatten(1)]
        return [max(matrices, key=lambda matrix: min(matrix.shape))]

    def spectra(self, weight: Tensor) -> list[Tensor]:
        """Return the norms of orthogonal terms, from which the decomposition starts: it loses less than they say."""
        slices, kernel = slices_of(weight)
        values = torch.linalg.svdvals(rotate(slices, spatial_bases(slices, kernel)))
        return [values.flatten().sort(descending=True).values]
