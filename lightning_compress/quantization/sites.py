"""Where activations are quantized for given layers, with how many bits, and at which module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_compress.core.paths import get_layer, named_layers
from lightning_compress.quantization.assignment import Assignment
from lightning_compress.quantization.calls import CONVOLUTIONS, TRANSPOSED
from lightning_compress.quantization.layers import QuantizedLayer
from lightning_compress.quantization.placement import READ, Point, place_quantizers
from lightning_compress.quantization.quantizer import Quantizer
from lightning_compress.quantization.spec import QuantizerSpec

_SLOTS = ("input", "key", "value")


@dataclass(frozen=True)
class Sites:
    """What is quantized beside weights.

    Args:
        inputs: For each layer the specs of its quantized arguments, by ``"input"``, ``"key"`` and ``"value"``.
        outputs: For each module whose result is quantized, the spec.
        left: What stays float, by path, and why.
    """

    inputs: Mapping[str, Mapping[str, QuantizerSpec]] = field(default_factory=dict)
    outputs: Mapping[str, QuantizerSpec] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)


def find_sites(
    root: nn.Module,
    assigned: Mapping[str, Assignment],
    general: QuantizerSpec | None,
    example_inputs: Any = None,
) -> Sites:
    """Return where activations are quantized: between the blocks that runtimes fuse, or at the inputs of layers.

    What a layer computes from gets the layer's own bits, the most of those that need it; what only joins blocks
    (both sides of an addition) the general ones.

    Args:
        root: The model, not quantized yet.
        assigned: What each layer gets.
        general: Spec of what no single layer asks for; ``None`` for float.
        example_inputs: One batch, for networks that only ``torch.export`` can trace.
    """
    known = named_layers(root)
    wanted = {path: given.activations for path, given in assigned.items() if given.activations is not None}
    inputs: dict[str, dict[str, QuantizerSpec]] = {
        path: {"input": spec} for path, spec in wanted.items() if isinstance(known[path], nn.RNNBase)
    }
    traced = [path for path in wanted if not isinstance(known[path], (nn.RNNBase, nn.Embedding, nn.EmbeddingBag))]
    if not traced:
        return Sites(inputs)
    placement = place_quantizers(root, traced, example_inputs)
    specs = {point: _own(point, wanted) or general for point in placement.points}
    for path in traced:
        source = _source(root, path, example_inputs) if wanted[path] != general else None
        if source in specs:
            specs[source] = _more(specs[source] if specs[source] != general else None, wanted[path])
    outputs: dict[str, QuantizerSpec] = {}
    for point, spec in specs.items():
        if spec is not None and point.side == "output":
            outputs[point.path] = spec
        elif spec is not None:
            inputs.setdefault(point.path, {})[_SLOTS[point.index]] = spec
    reads = {f"{path}.weight": READ for path in placement.reads if path in assigned and assigned[path].weights}
    return Sites(inputs, outputs, {**placement.left, **reads})


def sites_of(root: nn.Module) -> Sites:
    """Return the outputs that are quantized in a model that was prepared already."""
    held = {path: dict(module.named_children()).get("output_quantizer") for path, module in named_layers(root).items()}
    return Sites(outputs={path: quantizer.spec for path, quantizer in held.items() if isinstance(quantizer, Quantizer)})


def is_prepared(root: nn.Module, assigned: Mapping[str, Assignment]) -> bool:
    """Return whether all these layers are quantized ones."""
    known = named_layers(root)
    return all(isinstance(known[path], QuantizedLayer) for path in assigned)


def _own(point: Point, wanted: Mapping[str, QuantizerSpec]) -> QuantizerSpec | None:
    return wanted.get(point.path) if point.side == "input" else None


def _source(root: nn.Module, path: str, example_inputs: Any) -> Point | None:
    """Return the point that a layer computes from, if another module returns it."""
    points = place_quantizers(root, [path], example_inputs).points
    if any(point.path == path and point.side == "input" for point in points):
        return None
    convolution = isinstance(get_layer(root, path), (*CONVOLUTIONS, *TRANSPOSED))
    before = points[:-1] if convolution else points  # of convolutions the result is quantized as well
    return before[-1] if before else None


def _more(first: QuantizerSpec | None, second: QuantizerSpec) -> QuantizerSpec:
    return first if first is not None and first.bits >= second.bits else second
