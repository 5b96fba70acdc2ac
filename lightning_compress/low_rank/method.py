"""What a method of factorization is: shapes of its factors, and the algebra from a weight to them and back."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.low_rank.matrix import singular_values
from lightning_compress.low_rank.moments import Moment
from lightning_compress.low_rank.shapes import LayerShape

Ranks = tuple[int, ...]


@dataclass(frozen=True)
class Effort:
    """What a split may use besides the weight.

    Attributes:
        moment: Of what each output of the group sees; or nothing.
        steps: Iterations at most, of methods that iterate; or what they think is enough.
        directions: What :meth:`Method.principal` found, or the first of it; or nothing.
    """

    moment: Moment | None = None
    steps: int | None = None
    directions: Tensor | None = None


PLAIN = Effort()


class Method(ABC):
    r"""One way to write a layer as a sequence of smaller ones.

    :meth:`split` works on one group's weight (out, in, \*kernel), of a transposed convolution seen backwards
    (:func:`~lightning_compress.low_rank.shapes.blocks_of`), of Linear without kernel. Factors are in the order of a
    convolution, each (out, in, \*kernel), or (channels, 1, \*kernel) where it keeps channels apart. Ranks count
    channels over all groups, in this order too: a layer's input side first, unless it is transposed.
    """

    name: ClassVar[str]
    rank_names: ClassVar[str]
    """What the ranks are, for messages."""
    uses_moment: ClassVar[bool] = False
    """Whether :meth:`split` can minimize the error of outputs instead of weights."""

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
    def split(self, weight: Tensor, ranks: Ranks, effort: Effort = PLAIN) -> list[Tensor]:
        """Return the factors of one group's weight, at one group's ranks."""

    @abstractmethod
    def unfoldings(self, weight: Tensor) -> list[Tensor]:
        """Return for each rank the matrix of one group's weight whose singular values say what the rank loses."""

    def spectra(self, weight: Tensor) -> list[Tensor]:
        """Return for each rank what it loses when it ends there: values of which the rest's squares add up."""
        return [singular_values(matrix) for matrix in self.unfoldings(weight)]

    def principal(self, weight: Tensor, moment: Moment | None = None) -> tuple[Tensor, Tensor] | None:
        """Return what is lost with each direction that a truncation leaves out, and the directions; or nothing.

        Of methods that truncate a single SVD, so that the directions serve any rank.

        Args:
            weight: Of one group.
            moment: If the outputs are to be kept for it.
        """
        return None

    def usable(self, shape: LayerShape, ranks: Ranks) -> Ranks:
        """Return the ranks without what is of no use, such as more than full ones."""
        full = self.full_ranks(shape)
        if len(ranks) != len(full):
            raise ConfigurationError(f"`ranks` of {self.name!r} are {self.rank_names}, got {list(ranks)}")
        return tuple(min(pair) for pair in zip(ranks, full, strict=True))

    def merge(self, factors: Sequence[Tensor], shape: LayerShape) -> Tensor:
        """Undo :meth:`split`: multiply factors that each take their own spatial axes."""
        product = factors[0].flatten(2) if factors[0].dim() > 2 else factors[0].unsqueeze(-1)
        for factor in factors[1:]:
            product = _compose(product, factor.flatten(2) if factor.dim() > 2 else factor.unsqueeze(-1))
        kernel = [max(sizes) for sizes in zip(*(factor.shape[2:] for factor in factors), strict=True)]
        return product.reshape(*product.shape[:2], *kernel)


def _compose(before: Tensor, after: Tensor) -> Tensor:
    """Return the kernel of two convolutions along different axes, (out, in, positions before x after)."""
    if after.shape[1] == 1 and before.shape[0] > 1:
        return (before[..., None] * after[:, :, None, :]).flatten(2)
    return torch.tensordot(after, before, ([1], [0])).permute(0, 2, 3, 1).flatten(2)


def shared_reason(shape: LayerShape) -> str:
    """Return why no method fits a layer, or nothing."""
    if shape.kernel and shape.groups > 1 and shape.inputs == shape.groups:
        return "depthwise: each channel has a kernel of its own, there is nothing to share"
    return ""


def sides(shape: LayerShape) -> tuple[int, int]:
    """Return outputs and inputs of one group, of a transposed convolution seen backwards."""
    out, into = (shape.inputs, shape.outputs) if shape.kind == "conv_transpose" else (shape.outputs, shape.inputs)
    return out // shape.groups, into // shape.groups


def wide_axes(kernel: Sequence[int]) -> list[int]:
    """Return the spatial axes with a kernel of more than 1."""
    return [axis for axis, size in enumerate(kernel) if size > 1]


def along(kernel: Sequence[int], axes: Sequence[int]) -> tuple[int, ...]:
    """Return a kernel's sizes along some axes, and 1 along the others."""
    return tuple(size if axis in axes else 1 for axis, size in enumerate(kernel))


def kernel_reason(shape: LayerShape) -> str:
    """Return why a method for kernels of more than one position does not fit, or nothing."""
    if math.prod(shape.kernel) == 1:
        return "it has no kernel to take apart: use 'svd'"
    return shared_reason(shape)
