"""What each number of bits costs a layer: bytes of its weights in a file, and the error of its outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_compress.core.allocation import Line
from lightning_compress.core.hessians import collect_hessians
from lightning_compress.core.paths import named_layers
from lightning_compress.quantization.assignment import Assignment
from lightning_compress.quantization.build import build_quantizer
from lightning_compress.quantization.layers import channel_axis, weight_names, weight_of
from lightning_compress.quantization.post_training.layerwise import (
    MOST_INPUTS,
    inputs_of,
    plain_layers,
    portions,
)
from lightning_compress.quantization.post_training.rounding import output_error, without_bias
from lightning_compress.quantization.quantizer import WeightQuantizer
from lightning_compress.quantization.spec import QuantizerSpec


@dataclass(frozen=True)
class Candidates:
    """What some layers that share their weights can get; most often it is one layer.

    Args:
        paths: Of the layers.
        bits: Numbers of bits, the fewest first.
        line: Bytes and errors with each of them.
    """

    paths: tuple[str, ...]
    bits: tuple[int, ...]
    line: Line


@torch.no_grad()
def bit_lines(
    model: nn.Module, assigned: Mapping[str, Assignment], bits: Sequence[int], called: Sequence[str], batches: Any
) -> list[Candidates]:
    """Return the candidates of all layers whose bits no rule decides, in registration order.

    The error is that of the layer's outputs on calibration data, by its Hessian, once the weights are rounded to the
    nearest; where no Hessian describes a layer, that of its weights. Bytes are the entropy of the integers.

    Args:
        model: In float; nothing of it changes.
        assigned: What each layer gets.
        bits: Numbers of bits to try.
        called: Paths of layers that the batches reach.
        batches: Calibration data.
    """
    known = named_layers(model)
    free = searched_layers(assigned)
    tries = {p: tuple(b for b in bits if b >= (g.least or 0)) or (g.least or bits[-1],) for p, g in free.items()}
    errors = {path: [] for path in free}  # type: dict[str, list[float]]
    plain = {p: layer for p, layer in plain_layers(model, known, free).items() if p in set(called)}
    for part in portions({p: layer for p, layer in plain.items() if inputs_of(layer) <= MOST_INPUTS}):
        hessians = collect_hessians(model, part, batches) if part else {}
        for path, layer in part.items():
            for spec in _specs(free[path], tries[path]):
                errors[path].append(output_loss(layer, _rounded(layer, "weight", spec)[0], hessians[path]))
    found = []
    for paths in _tied(known, free):
        first = paths[0]
        costs, white = [], []
        for spec in _specs(free[first], tries[first]):
            parts = [(weight_of(known[first], n), *_rounded(known[first], n, spec)) for n in weight_names(known[first])]
            costs.append(sum(entropy_bytes(q) for _, _, q in parts))
            white.append(_relative([(new - old, old) for old, new, _ in parts]))
        error = errors[first] or white
        line = Line(np.array(costs, float), np.minimum(np.array(error), 1.0), np.zeros(len(costs)))
        found.append(Candidates(paths, tries[first], line))
    return found


def searched_layers(assigned: Mapping[str, Assignment]) -> dict[str, Assignment]:
    """Return what those layers get whose bits no rule decides.

    >>> searched_layers({"ruled": Assignment(QuantizerSpec(), None, least=None)})
    {}
    """
    return {path: given for path, given in assigned.items() if given.weights is not None and given.least is not None}


def output_loss(layer: nn.Module, rounded: Tensor, hessian: Tensor) -> float:
    r"""Return the relative squared error of a layer's outputs, :math:`\delta H \delta^\top / w H w^\top`.

    Args:
        layer: Linear or convolution, in float; a bias takes up the mean of what is lost.
        rounded: Its weight on a grid.
        hessian: (groups, d, d), as :func:`~lightning_compress.core.hessians.layer_hessian` returns it.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> _ = layer.weight.data.copy_(torch.tensor([[2.0, 1.0]]))
    >>> output_loss(layer, torch.tensor([[2.0, 0.0]]), torch.eye(2).double()[None])
    0.2
    """
    if getattr(layer, "bias", None) is not None:
        hessian, _ = without_bias(hessian)
    weight = weight_of(layer, "weight")
    shape = (len(hessian), -1, hessian.shape[-1])
    old, new = (value.detach().to(hessian.dtype).reshape(shape) for value in (weight, rounded))
    lost = sum(output_error(b - a, h) for a, b, h in zip(old, new, hessian, strict=True))
    whole = sum(output_error(a, h) for a, h in zip(old, hessian, strict=True))
    return lost / whole if whole > 0 else 0.0


def entropy_bytes(q: Tensor) -> float:
    """Return the bytes that integers take in a file, as an entropy coder writes them.

    >>> entropy_bytes(torch.tensor([-1, 1] * 8, dtype=torch.int8))
    2.0
    """
    counts = torch.bincount(q.reshape(-1).to(torch.int64) + 128).double()
    counts = counts[counts > 0]
    return float(-(counts * (counts / counts.sum()).log2()).sum()) / 8 + 0.0


def _specs(given: Assignment, bits: Sequence[int]) -> list[QuantizerSpec]:
    return [given.weights.with_bits(number) for number in bits] if given.weights is not None else []


def _rounded(layer: nn.Module, name: str, spec: QuantizerSpec) -> tuple[Tensor, Tensor]:
    """Return a weight rounded to the nearest values of its grid, and the integers."""
    weight, axis = weight_of(layer, name).detach(), channel_axis(layer)
    quantizer = build_quantizer(spec, "weight", axis, weight.shape[axis]).to(weight.device)
    if not isinstance(quantizer, WeightQuantizer):
        raise TypeError(f"{type(quantizer).__name__} is no quantizer of weights")
    quantizer.take_range(weight)
    q = quantizer.quantize(weight)
    return quantizer.dequantize(q, *quantizer.affine(weight)).to(weight.dtype), q


def _relative(parts: Sequence[tuple[Tensor, Tensor]]) -> float:
    lost = sum(float(change.double().square().sum()) for change, _ in parts)
    whole = sum(float(old.double().square().sum()) for _, old in parts)
    return lost / whole if whole > 0 else 0.0


def _tied(known: Mapping[str, nn.Module], free: Mapping[str, Assignment]) -> list[tuple[str, ...]]:
    """Return paths of layers, those together that hold the same weights."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for path in free:
        groups.setdefault(tuple(id(weight_of(known[path], n)) for n in weight_names(known[path])), []).append(path)
    return [tuple(paths) for paths in groups.values()]
