"""Which layers of a model can be factorized, and why others stay."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from lightning_compress.core.paths import clean_path, named_layers
from lightning_compress.core.select import Select, Selection
from lightning_compress.low_rank.decompose import best_method, why_not
from lightning_compress.low_rank.factors import Factors
from lightning_compress.low_rank.layers import Factorized, norm_reason, shape_now
from lightning_compress.low_rank.shapes import LAYERS

OTHERS: tuple[type[nn.Module], ...] = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.Bilinear)
"""Layers with weights that have no factorized form; the plan names them."""


def find_layers(model: nn.Module, select: Select, factors: Factors) -> tuple[Selection, dict[str, str]]:
    """Return the selected layers that can be factorized, and the method for each.

    What is factorized already counts as the one layer that its factors make, with the method that made them, unless the
    selection names single factors.

    Raises:
        SelectionError: If nothing is selected, or a rule names a layer that cannot be factorized.

    >>> net = nn.Sequential(nn.Linear(8, 8), nn.LSTM(8, 8), nn.Conv2d(4, 4, 3, groups=4))
    >>> selection, methods = find_layers(net, Select(), Factors())
    >>> methods, list(selection.left)
    ({'0': 'svd'}, ['1', '2'])
    """
    found = _lift(model, select, select.resolve(model, (*LAYERS, *OTHERS)))
    shared, packed = _tied(model), _read_elsewhere(model)
    left = dict(found.left)
    reasons = {path: _reason(layer, shared, packed) for path, layer in found.layers.items()}
    usable = [path for path, why in reasons.items() if not why]
    settings = factors.of(model, usable) if usable else {}
    methods: dict[str, str] = {}
    for path, layer in found.layers.items():
        why = reasons[path]
        if not why:
            method = settings[path].method
            own = layer.method if isinstance(layer, Factorized) else "auto"
            method = own if method == "auto" else method
            why = why_not(layer, method)
            methods |= {} if why else {path: best_method(layer) if method == "auto" else method}
        if why:
            left[path] = f"kept: {why}"
    return Selection({path: found.layers[path] for path in methods}, left), methods


def _lift(model: nn.Module, select: Select, found: Selection) -> Selection:
    """Put factorized layers in place of their factors, as far as ``include`` means them as a whole."""
    factors = {path: layer for path, layer in named_layers(model).items() if isinstance(layer, Factorized)}
    if not factors:
        return found
    meant = Select(include=select.include).resolve(model).layers
    whole = [path for path in factors if path in meant and not any(_around(path, factors.keys() & meant.keys()))]
    layers: dict[str, nn.Module] = {}
    left: dict[str, str] = {}
    for path, why in found.left.items():
        left[next(_around(path, whole), path)] = why
    for path, layer in found.layers.items():
        owner = next(_around(path, whole), path)
        if owner not in left:
            layers[owner] = factors.get(owner, layer)
    return Selection(layers, left)


def _around(path: str, owners: Iterable[str]) -> Iterator[str]:
    """Yield those of some modules that contain a layer."""
    return (owner for owner in owners if path.startswith(f"{owner}."))


def takes_norm(layer: nn.Module) -> bool:
    """Return whether there can be a batch norm between the factors of a layer.

    >>> takes_norm(nn.Conv2d(3, 4, 3)), takes_norm(nn.Linear(3, 4))
    (True, False)
    """
    return not norm_reason(shape_now(layer))


def _reason(layer: nn.Module, shared: Mapping[int, str], packed: Mapping[int, str]) -> str:
    if isinstance(layer, OTHERS):
        return f"{type(layer).__name__} reads its weights itself, factors would not be called"
    if id(layer) in packed:
        return packed[id(layer)]
    return next((shared[id(own)] for own in layer.parameters() if id(own) in shared), "")


def _tied(model: nn.Module) -> dict[int, str]:
    """Return the parameters that several modules hold, and whose they are."""
    owners: dict[int, dict[int, str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), {}).setdefault(id(module), clean_path(f"{path}.{name}"))
    several = {key: list(names.values()) for key, names in owners.items() if len(names) > 1}
    return {key: f"its weight is tied: {', '.join(names)} are one" for key, names in several.items()}


def _read_elsewhere(model: nn.Module) -> dict[int, str]:
    """Return the Linear layers whose weights the fused kernels of torch's encoder layers read in evaluation mode."""
    why = "the fused kernel of nn.TransformerEncoderLayer reads its weight; build the encoder with batch_first=False"
    encoders = [module for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer)]
    fused = [module for module in encoders if module.self_attn.batch_first]
    return {id(part): why for module in fused for part in (module.linear1, module.linear2)}


def factorized(layers: Mapping[str, nn.Module]) -> dict[str, Factorized]:
    """Return those of some layers that are factors already."""
    return {path: layer for path, layer in layers.items() if isinstance(layer, Factorized)}
