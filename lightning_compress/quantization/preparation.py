"""From what each layer gets to edits of the journal and lines of the plan."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.journal import Edit
from lightning_compress.core.plan import PlanRow
from lightning_compress.quantization.assignment import Assignment
from lightning_compress.quantization.layers import (
    QuantizedLayer,
    own_quantizers,
    weight_names,
    weight_of,
)
from lightning_compress.quantization.quantizer import ActivationQuantizer, WeightQuantizer
from lightning_compress.quantization.sites import Sites
from lightning_compress.quantization.spec import FIXED, QuantizerSpec


def prepare_edits(
    layers: Mapping[str, nn.Module], assigned: Mapping[str, Assignment], sites: Sites, encoders: Sequence[str] = ()
) -> Iterator[Edit]:
    """Yield the edits that give layers what they lack.

    Args:
        layers: By path.
        assigned: What each of them gets.
        sites: Where activations are quantized.
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
            yield Edit("replace", path, "quantized", edit_config(given, sites.inputs.get(path, {})))
    for path, spec in sites.outputs.items():
        if "output_quantizer" not in dict(layers[path].named_children()):
            yield Edit("replace", path, "quantized_output", spec.to_config())
    for path in encoders if fresh else ():
        yield Edit("replace", path, "padded_encoder")


def edit_config(given: Assignment, arguments: Mapping[str, QuantizerSpec]) -> dict[str, Any]:
    """Return the configuration of the kind ``quantized`` for a layer.

    >>> edit_config(Assignment(None, QuantizerSpec()), {})
    {'weight': None}
    """
    weight = None if given.weights is None else given.weights.to_config()
    return {"weight": weight, **{slot: spec.to_config() for slot, spec in arguments.items()}}


def holds_padding(module: nn.Module, paths: Collection[str], own: str) -> bool:
    """Return whether a module is an encoder that would make nested tensors for a quantized layer inside it."""
    inside = any(path.startswith(f"{own}.") for path in paths)
    return isinstance(module, nn.TransformerEncoder) and inside and bool(module.use_nested_tensor)


def plan_rows(layers: Mapping[str, nn.Module], assigned: Mapping[str, Assignment], sites: Sites) -> list[PlanRow]:
    """Return a line for each layer, and one for each other module whose result is quantized."""
    rows = []
    for path, given in assigned.items():
        layer = layers[path]
        weights = {name: weight_of(layer, name) for name in weight_names(layer)}
        first = "x".join(map(str, next(iter(weights.values())).shape))
        shape = first if len(weights) == 1 else f"{len(weights)} weights"
        held = {name: part for name, part in layer.named_children() if isinstance(part, ActivationQuantizer)}
        parts = [f"weights {describe(given.weights)}"]
        parts += [f"{name.removesuffix('_quantizer')} {describe(part.spec)}" for name, part in held.items()]
        parts += ["its hidden states stay float"] if isinstance(layer, nn.RNNBase) else []
        parts += ["scores and what enters out_proj stay float"] if isinstance(layer, nn.MultiheadAttention) else []
        rows.append(PlanRow(given.rule, path, shape, "; ".join(parts)))
    others = {path: spec for path, spec in sites.outputs.items() if path not in assigned}
    rows += [PlanRow("block", path, "", f"output {describe(spec)}") for path, spec in others.items()]
    return [*rows, *(PlanRow("float", path, "", why) for path, why in sites.left.items())]


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
    for quantizer in own_quantizers(layer):
        weight = isinstance(quantizer, WeightQuantizer)
        if not weight and quantizer is dict(layer.named_children()).get("output_quantizer"):
            continue  # in the bits of whoever takes it
        wanted = given.weights if weight else given.activations
        if wanted is not None and quantizer.spec.range == FIXED:  # calibrated: the range stays
            wanted = replace(wanted, range=FIXED)
        if quantizer.spec != wanted:
            role = "weights" if weight else "activations"
            raise ConfigurationError(
                f"the {role} of {path!r} are quantized {describe(quantizer.spec)} already, and `{role}` says "
                f"{describe(wanted)}; give the settings that the model was quantized with, or build it anew"
            )
