"""From what each layer gets to edits of the journal and lines of the plan."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.journal import Edit
from lightning_compress.core.plan import PlanRow
from lightning_compress.quantization.assignment import Assignment
from lightning_compress.quantization.layers import QuantizedLayer, weight_names, weight_of, weight_quantizers_of
from lightning_compress.quantization.quantizer import quantizers_of
from lightning_compress.quantization.spec import QuantizerSpec

_NO_INPUT = (nn.Embedding, nn.EmbeddingBag)


def prepare_edits(
    layers: Mapping[str, nn.Module], assigned: Mapping[str, Assignment], encoders: Sequence[str] = ()
) -> Iterator[Edit]:
    """Yield the edits that give layers what they lack.

    Args:
        layers: By path.
        assigned: What each of them gets.
        encoders: Paths of ``nn.TransformerEncoder`` whose nested tensors would meet a quantized layer.

    Raises:
        ConfigurationError: If a layer was quantized in another way already.
    """
    fresh = False
    for path, given in assigned.items():
        if isinstance(layers[path], QuantizedLayer):
            _check_same(path, layers[path], given)
        else:
            fresh = True
            yield Edit("replace", path, "quantized", edit_config(layers[path], given))
    for path in encoders if fresh else ():
        yield Edit("replace", path, "padded_encoder")


def edit_config(layer: nn.Module, given: Assignment) -> dict[str, Any]:
    """Return the configuration of the kind ``quantized`` for a layer.

    >>> edit_config(nn.Embedding(2, 2), Assignment(None, QuantizerSpec()))
    {'weight': None, 'input': None}
    """
    weight = None if given.weights is None else given.weights.to_config()
    spec = None if given.activations is None or isinstance(layer, _NO_INPUT) else given.activations.to_config()
    config = {"weight": weight, "input": spec}
    return {**config, "key": spec, "value": spec} if isinstance(layer, nn.MultiheadAttention) else config


def holds_padding(module: nn.Module, paths: Collection[str], own: str) -> bool:
    """Return whether a module is an encoder that would make nested tensors for a quantized layer inside it."""
    inside = any(path.startswith(f"{own}.") for path in paths)
    return isinstance(module, nn.TransformerEncoder) and inside and bool(module.use_nested_tensor)


def plan_rows(layers: Mapping[str, nn.Module], assigned: Mapping[str, Assignment]) -> list[PlanRow]:
    """Return a line for each layer."""
    rows = []
    for path, given in assigned.items():
        layer = layers[path]
        weights = {name: weight_of(layer, name) for name in weight_names(layer)}
        shape = (
            "x".join(map(str, next(iter(weights.values())).shape)) if len(weights) == 1 else f"{len(weights)} weights"
        )
        parts = [f"weights {describe(given.weights)}"]
        parts += [] if isinstance(layer, _NO_INPUT) else [f"input {describe(given.activations)}"]
        parts += ["its hidden states stay float"] if isinstance(layer, nn.RNNBase) else []
        parts += ["scores and what enters out_proj stay float"] if isinstance(layer, nn.MultiheadAttention) else []
        rows.append(PlanRow(given.rule, path, shape, "; ".join(parts)))
    return rows


def describe(spec: QuantizerSpec | None) -> str:
    """Return a spec in a few words.

    >>> describe(QuantizerSpec(4, symmetric=True, per_channel=True, range="lsq"))
    'to 4 bits, symmetric, per channel (lsq)'
    """
    if spec is None:
        return "float"
    grid = "symmetric" if spec.symmetric else "affine"
    return f"to {spec.bits} bits, {grid}{', per channel' if spec.per_channel else ''} ({spec.range})"


def _check_same(path: str, layer: nn.Module, given: Assignment) -> None:
    for quantizer in quantizers_of(layer):
        weight = quantizer in weight_quantizers_of(layer).values()
        wanted = given.weights if weight else given.activations
        if quantizer.spec != wanted:
            role = "weights" if weight else "activations"
            raise ConfigurationError(
                f"the {role} of {path!r} are quantized {describe(quantizer.spec)} already, and `{role}` says "
                f"{describe(wanted)}; give the settings that the model was quantized with, or build it anew"
            )
