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
from lightning_compress.core.verbs import layout_of
from lightning_compress.low_rank.costs import Cost, cost, dense_cost, resolve
from lightning_compress.low_rank.kinds import KIND, check, hand_over, structure
from lightning_compress.low_rank.layers import Factorized, dense_of, norm_reason
from lightning_compress.low_rank.matrix import as_float, energy
from lightning_compress.low_rank.method import Effort, Method, Ranks
from lightning_compress.low_rank.methods import METHODS, automatic, method_named
from lightning_compress.low_rank.moments import Moment, SquareMoment, check_moment, second_moment
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
    shape, chosen = resolve(layer, method)
    return method_named(chosen).full_ranks(shape)


def usable_ranks(layer: nn.Module | LayerShape, method: str, ranks: Sequence[int]) -> Ranks:
    """Return the largest ranks a layer can have that are at most ``ranks``, and at least one for each group.

    >>> usable_ranks(nn.Conv2d(8, 8, 3, groups=2), "tucker", [7, 100])
    (6, 8)
    """
    shape, chosen = resolve(layer, method)
    rounded = tuple(max(rank // shape.groups, 1) * shape.groups for rank in ranks)
    return method_named(chosen).usable(shape, rounded)


def spectra(layer: nn.Module, method: str = "auto") -> tuple[Tensor, ...]:
    """Return, for each rank of a method, the singular values that say what it would lose: (groups, n), falling.

    >>> [values.shape for values in spectra(nn.Conv2d(16, 32, 3), "spatial_svd")]
    [torch.Size([1, 48])]
    """
    dense = dense_of(layer)
    shape, chosen = resolve(dense, method)
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
    moment: Tensor | Sequence[Moment] | None = None,
    steps: int | None = None,
    directions: Sequence[Tensor] = (),
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
        moment: Of the layer's inputs, (groups, n, n) from :func:`second_moment`, or one for each group: ``svd``,
            ``channel_svd`` and ``spatial_svd`` then keep the outputs as they are for such inputs, not the weight.
        steps: Iterations at most of Tucker and CP; by default what they think is enough.
        directions: Of each group, if an error profile has found them: then no SVD is computed.

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
    shape, chosen = resolve(dense, method)
    check(shape, chosen, ranks, batch_norm)
    weight = as_float(own_tensors(dense)["weight"])
    if not bool(torch.isfinite(weight).all()):
        raise ConfigurationError("the weight holds infinite or undefined numbers; factors need finite ones")
    blocks, algebra = blocks_of(weight, shape), method_named(chosen)
    moments = _moments(moment, shape, algebra)
    inner = tuple(rank // shape.groups for rank in ranks)
    split: list[list[Tensor]] = []
    lost, seen_lost = _Share(), _Share()
    found: Sequence[Tensor | None] = directions or [None] * len(blocks)
    for block, seen, known in zip(blocks, moments, found, strict=True):
        split.append(algebra.split(block, inner, Effort(seen, steps, known)))
        off = algebra.merge(split[-1], shape).sub_(block)
        lost.add(energy(off), energy(block))
        if seen is not None:
            seen_lost.add(seen.energy(off.flatten(1)), seen.energy(block.flatten(1)))
    del off
    module = structure(dense, chosen, ranks, batch_norm, device="meta")
    _fill(module, [torch.stack(parts) for parts in zip(*split, strict=True)], own_tensors(dense)["weight"])
    return Factorization(layer, module, lost.root(), None if moment is None else seen_lost.root())


def _moments(moment: Tensor | Sequence[Moment] | None, shape: LayerShape, method: Method) -> Sequence[Moment | None]:
    """Return the moment of each group."""
    if moment is None:
        return [None] * shape.groups
    if not weighs_outputs(shape, method.name):
        raise ConfigurationError(
            f"`moment` is for {', '.join(map(repr, AWARE))} of Linear and convolutions, not for {method.name!r} of "
            f"{shape.kind} layers; leave it out"
        )
    if not isinstance(moment, Tensor):
        return moment
    check_moment(moment, shape)
    return [SquareMoment(matrix) for matrix in moment]


def weighs_outputs(shape: LayerShape, method: str) -> bool:
    """Return whether a method can keep the outputs of a layer as they are, instead of its weight.

    >>> weighs_outputs(LayerShape("linear", 8, 8), "svd"), weighs_outputs(LayerShape("embedding", 8, 8), "svd")
    (True, False)
    """
    return method_named(method).uses_moment and shape.kind in ("linear", "conv")


AWARE = tuple(name for name, method in METHODS.items() if method.uses_moment)
"""Methods that can weigh outputs."""


@dataclass
class _Share:
    """What was lost of a whole, over groups."""

    lost: float = 0.0
    whole: float = 0.0

    def add(self, lost: float, whole: float) -> None:
        self.lost, self.whole = self.lost + lost, self.whole + whole

    def root(self) -> float:
        return math.sqrt(max(self.lost, 0.0) / self.whole) if self.whole > 0 else 0.0


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
