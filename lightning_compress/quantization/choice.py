"""What a model's quantization consists of: its layers with their bits, and where activations are quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_compress.core.errors import SelectionError
from lightning_compress.core.paths import named_layers
from lightning_compress.core.select import Selection
from lightning_compress.quantization.assignment import Assignment, Settings
from lightning_compress.quantization.layers import why_not
from lightning_compress.quantization.preparation import holds_padding
from lightning_compress.quantization.sites import Sites, find_sites, is_prepared, sites_of


@dataclass(frozen=True)
class Choice:
    """What will be quantized, and how.

    Args:
        assigned: What each layer gets, by path.
        sites: Where activations are quantized.
        encoders: Paths of ``nn.TransformerEncoder`` whose nested tensors would meet a quantized layer.
        left: Why a layer of the right type is left alone, by path.
        prepared: Whether the model was quantized before.
    """

    assigned: Mapping[str, Assignment] = field(default_factory=dict)
    sites: Sites = field(default_factory=Sites)
    encoders: tuple[str, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)
    prepared: bool = False

    @property
    def paths(self) -> list[str]:
        """Paths of all modules that have quantizers."""
        return list(dict.fromkeys([*self.assigned, *self.sites.outputs]))


def choose_quantized(root: nn.Module, selection: Selection, settings: Settings, example_inputs: Any = None) -> Choice:
    """Return which of the selected layers are quantized and what each of them gets.

    Args:
        root: The model.
        selection: Layers of supported types.
        settings: General specs, rules, and more bits for the first and the last layer.
        example_inputs: One batch, for networks that only ``torch.export`` can trace.

    Raises:
        SelectionError: If no layer can be quantized, or a rule matches none.
    """
    inner = {f"{path}.out_proj" for path, m in selection.layers.items() if isinstance(m, nn.MultiheadAttention)}
    reasons = {path: why_not(layer) for path, layer in selection.layers.items() if path not in inner}
    layers = {path: layer for path, layer in selection.layers.items() if not reasons.get(path, "it belongs")}
    left = {**selection.left, **{path: f"kept: {why}" for path, why in reasons.items() if why}}
    if not layers:
        raise SelectionError(f"no selected layer can be quantized: {'; '.join(f'{p}: {w}' for p, w in left.items())}")
    assigned = {
        path: given
        for path, given in settings.assign(root, layers).items()
        if given.weights is not None or given.activations is not None
    }
    prepared = is_prepared(root, assigned)
    sites = sites_of(root) if prepared else find_sites(root, assigned, settings.activations, example_inputs)
    everything = named_layers(root)
    encoders = tuple(path for path, layer in everything.items() if holds_padding(layer, assigned, path))
    return Choice(assigned, sites, encoders, left, prepared)
