"""What a layer and its factors cost, from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lightning_compress.low_rank.layers import dense_of, factor_shapes
from lightning_compress.low_rank.methods import automatic
from lightning_compress.low_rank.shapes import LayerShape, shape_of


@dataclass(frozen=True)
class Cost:
    """What a layer costs.

    Attributes:
        parameters: Numbers it learns, bias and batch norm included.
        weights: Those that are multiplied with inputs, as papers count: without bias and batch norm.
        macs: Multiply-accumulate operations for one sample.
        moved: Inputs and outputs of every factor for one sample; 0 where the size of the input is not known.
    """

    parameters: int
    weights: int
    macs: int
    moved: int = 0


def cost(
    layer: nn.Module | LayerShape,
    method: str = "auto",
    ranks: Sequence[int] = (),
    size: Sequence[int] = (),
    batch_norm: bool = False,
) -> Cost:
    """Return what the factors of a layer cost, without building them.

    Args:
        layer: The layer, or its shape.
        method: Name of the method.
        ranks: As the method counts them.
        size: Spatial size of the layer's input; for Linear the number of rows of one sample, ``()`` for one.
            Without it convolutions count as at one position.
        batch_norm: Whether there is batch norm between the factors.

    >>> cost(nn.Conv2d(3, 64, 3, padding=1, bias=False), "spatial_svd", [5], (224, 224)).macs
    50426880
    """
    shape, chosen = resolve(layer, method)
    return total(shape, factor_shapes(shape, chosen, tuple(ranks), batch_norm), size, batch_norm)


def dense_cost(layer: nn.Module | LayerShape, size: Sequence[int] = ()) -> Cost:
    """Return what a layer costs as it is; arguments as in :func:`cost`.

    >>> found = dense_cost(nn.Linear(8, 4))
    >>> found.parameters, found.weights, found.macs
    (36, 32, 32)
    """
    shape = layer if isinstance(layer, LayerShape) else shape_of(dense_of(layer))
    return total(shape, (shape,), size)


def total(whole: LayerShape, factors: Sequence[LayerShape], size: Sequence[int], batch_norm: bool = False) -> Cost:
    """Return what a sequence of factors costs that stands for a whole layer; the bias is the layer's."""
    weights = sum(factor.parameters - (factor.outputs if factor.bias else 0) for factor in factors)
    more = whole.outputs if whole.bias else 0
    more += sum(2 * factor.outputs for factor in factors[:-1]) if batch_norm else 0
    macs = moved = 0
    for factor in factors:
        macs += factor.macs(size) if size else factor.macs_at_one
        moved += factor.traffic(size) if size else 0
        size = factor.output_size(size) if size else ()
    return Cost(weights + more, weights, macs, moved)


def resolve(layer: nn.Module | LayerShape, method: str) -> tuple[LayerShape, str]:
    """Return the shape of a layer, and the name of the method that ``"auto"`` means for it."""
    shape = layer if isinstance(layer, LayerShape) else shape_of(dense_of(layer))
    return shape, automatic(shape) if method == "auto" else method
