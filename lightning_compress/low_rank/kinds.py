"""The ``replace`` kinds: a factorized layer from JSON, and the same without the batch norm between its factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import nn

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.verbs import register_kind
from lightning_compress.low_rank.layers import Factorized, container, dense_of, factor_shapes, norm_reason
from lightning_compress.low_rank.matrix import as_float
from lightning_compress.low_rank.merging import absorb, affine_of
from lightning_compress.low_rank.method import Ranks
from lightning_compress.low_rank.methods import method_named
from lightning_compress.low_rank.shapes import LayerShape, own_tensors, shape_of

KIND = "low_rank"
"""Key of the ``replace`` edit that puts factors in place of a layer."""
FOLDED_KIND = "low_rank_folded"
"""Key of the ``replace`` edit that folds the batch norm between factors into them."""

_READY: WeakKeyDictionary[nn.Module, Factorized] = WeakKeyDictionary()


def hand_over(layer: nn.Module, module: Factorized) -> None:
    """Keep a factorized layer until an edit replaces exactly this layer by exactly this structure."""
    _READY[layer] = module


@register_kind("replace", KIND)
def build_factorized(
    layer: nn.Module, method: str, ranks: Sequence[int], batch_norm: bool = False, error: float | None = None
) -> Factorized:
    """Return the structure of a factorized layer: with values if they were handed over, else freshly initialized.

    Args:
        layer: What stands there now, factors included; its shape, dtype, device and bias Parameter are kept.
        method: Name of the method.
        ranks: As the method counts them.
        batch_norm: Whether a batch norm follows each factor but the last.
        error: Relative error of the factors when they were computed; a record, without effect.

    Raises:
        ConfigurationError: If the method or the ranks do not fit the layer.

    >>> build_factorized(nn.Linear(8, 6), "svd", [2]).factors
    Sequential(
      (0): Linear(in_features=8, out_features=2, bias=False)
      (1): Linear(in_features=2, out_features=6, bias=True)
    )
    """
    ready = _READY.pop(layer, None)
    if ready is not None and ready.config() == {"method": method, "ranks": list(ranks), "batch_norm": batch_norm}:
        return ready
    return structure(layer, method, tuple(ranks), batch_norm)


def structure(
    layer: nn.Module, method: str, ranks: Ranks, batch_norm: bool = False, device: torch.device | str | None = None
) -> Factorized:
    """Return freshly initialized factors for a layer, with its bias Parameter, dtype and (if none is given) device."""
    dense = dense_of(layer)
    shape = shape_of(dense)
    check(shape, method, ranks, batch_norm)
    weight, bias = own_tensors(dense)["weight"], own_tensors(dense).get("bias")
    module = container(shape, method)(shape, method, ranks, batch_norm, device or weight.device, weight.dtype)
    module.requires_grad_(weight.requires_grad)
    if bias is not None:
        module.take_bias(bias)
    return module.train(layer.training)


def check(shape: LayerShape, method: str, ranks: Ranks, batch_norm: bool = False) -> None:
    """Raise a ConfigurationError if a method, its ranks or a batch norm do not fit a layer; says why."""
    chosen = method_named(method)
    reason = chosen.reason(shape) or (norm_reason(shape) if batch_norm else "")
    if reason:
        raise ConfigurationError(f"{method!r} does not fit this layer: {reason}")
    whole = all(type(rank) is int and rank >= 1 and rank % shape.groups == 0 for rank in ranks)
    if not whole or chosen.usable(shape, ranks) != ranks:
        most = chosen.usable(shape, ranks) if whole else chosen.full_ranks(shape)
        step = f" that are multiples of the {shape.groups} groups" if shape.groups > 1 else ""
        raise ConfigurationError(
            f"`ranks` of {method!r} must be whole numbers up to {list(most)} here{step}, got {list(ranks)}"
        )


@register_kind("replace", FOLDED_KIND)
@torch.no_grad()
def fold_batch_norm(layer: nn.Module) -> Factorized:
    """Return the same factors without the batch norm between them, which is folded into weights and bias.

    Exact in evaluation mode, and faster: padding returns to the factor it belongs to.

    Raises:
        ConfigurationError: If the layer is not factorized with batch norm.

    >>> inner = build_factorized(nn.Conv2d(4, 6, 3, padding=1), "spatial_svd", [5], batch_norm=True).eval()
    >>> x = torch.randn(1, 4, 5, 5)
    >>> torch.allclose(fold_batch_norm(inner)(x), inner(x), atol=1e-6)
    True
    """
    if not isinstance(layer, Factorized) or not layer.batch_norm:
        raise ConfigurationError(f"there is no batch norm between factors to fold in {type(layer).__name__}")
    layers, whole = layer.layers(), replace(layer.shape, bias=True)
    shapes = [shape_of(part) for part in layers]
    own = [own_tensors(part) for part in layers]
    weights, shift = absorb(
        [as_float(tensors["weight"]) for tensors in own], shapes, [affine_of(norm) for norm in layer.norms()]
    )
    plain = factor_shapes(whole, layer.method, layer.ranks)
    parts = []
    for shape, model, weight, tensors in zip(shapes, plain, weights, own, strict=True):
        part, old = replace(shape, padding=model.padding, bias=model.bias).build("meta"), tensors["weight"]
        part.weight = nn.Parameter(weight.to(old.dtype), requires_grad=old.requires_grad)
        parts.append(part)
    bias, like = own[-1].get("bias"), own[-1]["weight"]
    moved = shift if bias is None else shift + bias
    parts[-1].bias = nn.Parameter(moved.to(like.dtype), requires_grad=like.requires_grad)
    return Factorized.of_parts(whole, layer.method, layer.ranks, parts).train(layer.training)
