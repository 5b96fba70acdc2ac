"""Layers as products of smaller ones: what fits, at which ranks, at what cost, and the factors themselves.

The interface of the family, one layer at a time (a callback or a search puts it to work on whole models):

- :data:`~lightning_compress.low_rank.methods.METHODS`: the methods by name; ``"auto"`` picks one for each layer.
- :func:`why_not`: why a method does not fit a layer; :func:`best_method`: what ``"auto"`` means for it.
- :func:`full_ranks`: the ranks at which a method is exact. Ranks count channels over all groups of a layer.
- :func:`usable_ranks`: the nearest ranks below some wish that a layer can have.
- :func:`cost`: parameters and multiply-accumulate operations at given ranks, from shapes alone, in microseconds.
- :func:`spectra`: the singular values that a rank is chosen by (energy, variational Bayes).
- :func:`second_moment`: of what a layer sees, summed over calibration batches, for activation-aware SVD.
- :func:`factorize`: the factors of a trained layer, with their relative error. The result's ``edit(path)`` is what
  the ``apply`` of a model takes: it puts exactly these factors there. ``structure`` gives untrained ones.
- ``Factorized.to_dense()`` multiplies factors out (verb ``bake``); ``fold_batch_norm`` folds batch norm between them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.journal import Edit
from lightning_compress.core.patches import layer_patches
from lightning_compress.core.verbs import layout_of
from lightning_compress.low_rank.kinds import KIND, check, hand_over, structure
from lightning_compress.low_rank.layers import Factorized, dense_of, factor_shapes, norm_reason
from lightning_compress.low_rank.matrix import as_float, energy
from lightning_compress.low_rank.method import Effort, Method, Ranks
from lightning_compress.low_rank.methods import METHODS, automatic, method_named
from lightning_compress.low_rank.shapes import LAYERS, LayerShape, blocks_of, own_tensors, shape_of, weight_of

__all__ = [
    "LAYERS",
    "METHODS",
    "Cost",
    "Factorization",
    "best_method",
    "cost",
    "dense_cost",
    "factorize",
    "full_ranks",
    "second_moment",
    "spectra",
    "structure",
    "usable_ranks",
    "why_not",
]


@dataclass(frozen=True)
class Cost:
    """What a layer costs.

    Attributes:
        parameters: Numbers it learns, bias and batch norm included.
        weights: Those that are multiplied with inputs, as papers count: without bias and batch norm.
        macs: Multiply-accumulate operations for one sample.
    """

    parameters: int
    weights: int
    macs: int


@dataclass(frozen=True)
class Factorization:
    r"""The factors of a layer.

    Attributes:
        layer: The layer itself, unchanged.
        module: What can stand in its place.
        error: :math:`\lVert W - \hat W \rVert_F / \lVert W \rVert_F`; 0 to 1, unless a moment was given.
        output_error: The same of the layer's outputs (without bias) over the inputs whose moment was given.
    """

    layer: nn.Module
    module: Factorized
    error: float
    output_error: float | None = None

    def edit(self, path: str) -> Edit:
        """Return the edit that puts ``module`` in place of ``layer``; ``path`` is where that is in the model."""
        hand_over(self.layer, self.module)
        return Edit("replace", path, KIND, {**self.module.config(), "error": float(f"{self.error:.4g}")})


def why_not(layer: nn.Module, method: str = "auto", batch_norm: bool = False) -> str:
    """Return why a method does not fit a layer, or nothing if it does.

    >>> why_not(nn.Conv2d(8, 8, 3, groups=8))
    'depthwise: each channel has a kernel of its own, there is nothing to share'
    """
    try:
        shape = shape_of(dense_of(layer))
    except ConfigurationError as error:
        return str(error)
    reason = method_named(automatic(shape) if method == "auto" else method).reason(shape)
    return reason or (norm_reason(shape) if batch_norm else "")


def best_method(layer: nn.Module) -> str:
    """Return what ``"auto"`` means for a layer: spatial SVD for kernels with two axes, else an SVD of channels.

    >>> best_method(nn.Conv2d(8, 8, 3)), best_method(nn.Conv1d(8, 8, 3)), best_method(nn.Linear(8, 8))
    ('spatial_svd', 'channel_svd', 'svd')
    """
    return automatic(shape_of(dense_of(layer)))


def full_ranks(layer: nn.Module | LayerShape, method: str = "auto") -> Ranks:
    """Return the ranks at which the factors reproduce a layer exactly, counted over all groups.

    >>> full_ranks(nn.Conv2d(16, 32, 3)), full_ranks(nn.Linear(10, 4))
    ((48,), (4,))
    """
    shape, chosen = _resolve(layer, method)
    return method_named(chosen).full_ranks(shape)


def usable_ranks(layer: nn.Module | LayerShape, method: str, ranks: Sequence[int]) -> Ranks:
    """Return the largest ranks a layer can have that are at most ``ranks``, and at least one for each group.

    >>> usable_ranks(nn.Conv2d(8, 8, 3, groups=2), "tucker", [7, 100])
    (6, 8)
    """
    shape, chosen = _resolve(layer, method)
    rounded = tuple(max(rank // shape.groups, 1) * shape.groups for rank in ranks)
    return method_named(chosen).usable(shape, rounded)


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

    >>> cost(nn.Conv2d(3, 64, 3, padding=1, bias=False), "spatial_svd", [5], (224, 224))
    Cost(parameters=1005, weights=1005, macs=50426880)
    """
    shape, chosen = _resolve(layer, method)
    factors = factor_shapes(shape, chosen, tuple(ranks), batch_norm)
    return _total(shape, factors, size, batch_norm)


def dense_cost(layer: nn.Module | LayerShape, size: Sequence[int] = ()) -> Cost:
    """Return what a layer costs as it is; arguments as in :func:`cost`.

    >>> dense_cost(nn.Linear(8, 4))
    Cost(parameters=36, weights=32, macs=32)
    """
    shape = layer if isinstance(layer, LayerShape) else shape_of(dense_of(layer))
    return _total(shape, (shape,), size)


def _total(whole: LayerShape, factors: Sequence[LayerShape], size: Sequence[int], batch_norm: bool = False) -> Cost:
    weights = sum(factor.parameters - (factor.outputs if factor.bias else 0) for factor in factors)
    more = whole.outputs if whole.bias else 0
    more += sum(2 * factor.outputs for factor in factors[:-1]) if batch_norm else 0
    macs = 0
    for factor in factors:
        here = size or (1,) * len(factor.kernel)
        macs += factor.macs(here)
        size = factor.output_size(here) if size else ()
    return Cost(weights + more, weights, macs)


def spectra(layer: nn.Module, method: str = "auto") -> tuple[Tensor, ...]:
    """Return, for each rank of a method, the singular values that say what it would lose: (groups, n), falling.

    >>> [values.shape for values in spectra(nn.Conv2d(16, 32, 3), "spatial_svd")]
    [torch.Size([1, 48])]
    """
    dense = dense_of(layer)
    shape, chosen = _resolve(dense, method)
    check_method(shape, chosen)
    blocks = blocks_of(as_float(own_tensors(dense)["weight"]), shape)
    per_group = [method_named(chosen).spectra(block) for block in blocks]
    return tuple(torch.stack(values) for values in zip(*per_group, strict=True))


@torch.no_grad()
def factorize(
    layer: nn.Module,
    method: str = "auto",
    ranks: Sequence[int] = (),
    batch_norm: bool = False,
    moment: Tensor | None = None,
    steps: int | None = None,
) -> Factorization:
    """Return the factors of a trained layer, or fewer of them of a layer that is factorized already.

    The factors keep dtype, device and ``requires_grad`` of the weight, and the bias Parameter itself. Half precision
    is computed in float32. The layer stays as it is.

    Args:
        layer: Any of :data:`LAYERS`, or factors of one: they are multiplied out first. So a model can be compressed in
            stages, a little at a time with training in between (MUSCO, Gusak et al. 2019, arXiv 1903.09973).
        method: Name of the method, or ``"auto"``.
        ranks: As the method counts them, over all groups.
        batch_norm: Put a batch norm after each factor but the last, which starts as the identity.
        moment: Of the layer's inputs, (groups, n, n), see :func:`second_moment`: ``svd`` and ``channel_svd`` then keep
            the outputs as they are for such inputs (activation-aware SVD), not the weights.
        steps: Iterations at most of Tucker and CP; by default what they think is enough.

    Raises:
        ConfigurationError: If the method or the ranks do not fit the layer, or its weight is not finite.

    >>> found = factorize(nn.Linear(8, 6), "svd", [6])
    >>> found.error < 1e-6, found.module
    (True, Factorized(
      svd, ranks=[6]
      (factors): Sequential(
        (0): Linear(in_features=8, out_features=6, bias=False)
        (1): Linear(in_features=6, out_features=6, bias=True)
      )
    ))
    """
    dense, ranks = dense_of(layer), tuple(ranks)
    shape, chosen = _resolve(dense, method)
    check(shape, chosen, ranks, batch_norm)
    weight = as_float(own_tensors(dense)["weight"])
    if not bool(torch.isfinite(weight).all()):
        raise ConfigurationError("the weight holds infinite or undefined numbers; factors need finite ones")
    blocks, algebra = blocks_of(weight, shape), method_named(chosen)
    moments = _moments(moment, shape, algebra)
    inner = tuple(rank // shape.groups for rank in ranks)
    split: list[list[Tensor]] = []
    lost, seen_lost = _Share(), _Share()
    for block, seen in zip(blocks, moments, strict=True):
        split.append(algebra.split(block, inner, Effort(seen, steps)))
        off = algebra.merge(split[-1], shape).sub_(block)
        lost.add(energy(off), energy(block))
        if seen is not None:
            seen_lost.add(_seen_energy(off, seen), _seen_energy(block, seen))
    del off
    module = structure(dense, chosen, ranks, batch_norm, device="meta")
    _fill(module, [torch.stack(parts) for parts in zip(*split, strict=True)], own_tensors(dense)["weight"])
    return Factorization(layer, module, lost.root(), None if moment is None else seen_lost.root())


def second_moment(layer: nn.Module, inputs: Tensor) -> Tensor:
    r"""Return :math:`\sum x x^\top` of what each output of a layer sees; add up over batches.

    Args:
        layer: Linear or Conv1d/2d/3d.
        inputs: What the layer was called with.

    Returns:
        (groups, n, n) in float64, n the inputs (of a group) times the kernel's size.

    >>> second_moment(nn.Linear(2, 1), torch.tensor([[1.0, 2.0], [0.0, 1.0]])).tolist()
    [[[1.0, 2.0], [2.0, 5.0]]]
    """
    rows = layer_patches(layer, inputs.detach()).double()
    return rows.transpose(1, 2) @ rows


def _moments(moment: Tensor | None, shape: LayerShape, method: Method) -> list[Tensor | None]:
    """Return the moment of each group."""
    if moment is None:
        return [None] * shape.groups
    if not method.uses_moment or shape.kind not in ("linear", "conv"):
        raise ConfigurationError(
            f"`moment` is for 'svd' and 'channel_svd' of Linear and convolutions, not for {method.name!r} of "
            f"{shape.kind} layers; leave it out"
        )
    size = shape.inputs // shape.groups * math.prod(shape.kernel)
    if tuple(moment.shape) != (shape.groups, size, size):
        raise ConfigurationError(
            f"`moment` must be of shape {(shape.groups, size, size)} for this layer, got {tuple(moment.shape)}; "
            "take it from `second_moment(layer, inputs)`"
        )
    if not bool(torch.isfinite(moment).all()):
        raise ConfigurationError("`moment` holds infinite or undefined numbers; check the calibration inputs")
    return list(moment)


@dataclass
class _Share:
    """What was lost of a whole, over groups."""

    lost: float = 0.0
    whole: float = 0.0

    def add(self, lost: float, whole: float) -> None:
        self.lost, self.whole = self.lost + lost, self.whole + whole

    def root(self) -> float:
        return math.sqrt(max(self.lost, 0.0) / self.whole) if self.whole > 0 else 0.0


def _seen_energy(block: Tensor, moment: Tensor) -> float:
    rows = block.flatten(1).double()
    return float(((rows @ moment.double().to(rows.device)) * rows).sum())


def _fill(module: Factorized, blocks: list[Tensor], like: Tensor) -> None:
    """Give factors that have no values yet their weights, and make batch norms the identity."""
    backwards = module.shape.kind == "conv_transpose"
    layers = module.layers()[::-1] if backwards else module.layers()
    layout = layout_of(like)
    for layer, block in zip(layers, blocks, strict=True):
        value = weight_of(block, shape_of(layer)).to(like.dtype).contiguous(memory_format=layout)
        layer.weight = nn.Parameter(value, requires_grad=like.requires_grad)
    for bn in module.norms():
        bn.to_empty(device=like.device)
        bn.reset_parameters()
        nn.init.constant_(bn.get_buffer("running_var"), 1 - bn.eps)


def check_method(shape: LayerShape, method: str) -> None:
    """Raise a ConfigurationError if a method does not fit a layer."""
    reason = method_named(method).reason(shape)
    if reason:
        raise ConfigurationError(f"{method!r} does not fit this layer: {reason}")


def _resolve(layer: nn.Module | LayerShape, method: str) -> tuple[LayerShape, str]:
    shape = layer if isinstance(layer, LayerShape) else shape_of(dense_of(layer))
    return shape, automatic(shape) if method == "auto" else method
