"""Everything that is known about one model: its costs, its layers, and why a figure is missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from rich.progress import Progress
from torch import nn
from torch.nn.utils import parametrize

from lightning_compress.core.cost import HeldWeight, MacCount, count_macs, count_parameters
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.paths import clean_path
from lightning_compress.evaluation.latency import Latency
from lightning_compress.evaluation.size import dense_bytes, gzip_bytes

_LONG = 40_000_000


@dataclass(frozen=True)
class LayerCost:
    """One layer of a model.

    Attributes:
        type: Class name, without what a parametrization makes of it.
        shape: Shape of its weight, or of its largest parameter; empty without parameters.
        parameters: Elements of the Parameters that it holds itself.
        nonzero: Those that are not zero; ``None`` if values are not known.
        bits: Bits of one element of the weight in memory; ``None`` without parameters.
        macs: Multiply-accumulate operations of its own; ``None`` if not counted.
    """

    type: str
    shape: list[int]
    parameters: int
    nonzero: int | None
    bits: int | None
    macs: int | None


@dataclass(frozen=True)
class Measurement:
    """What one model costs and achieves; ``None`` stands for unknown, and ``reasons`` says why.

    Attributes:
        parameters: Elements of all Parameters, tied ones once.
        nonzero_parameters: Those that are not zero.
        macs: Multiply-accumulate operations for one example batch.
        dense_bytes: Bytes of a dense safetensors file of the ``state_dict``.
        gzip_bytes: Bytes of that file after gzip -6.
        metrics: Values by name.
        latency: Time of a forward pass.
        layers: Costs by module path.
        reasons: Name of a field -> why it is unknown.
    """

    parameters: int | None = None
    nonzero_parameters: int | None = None
    macs: int | None = None
    dense_bytes: int | None = None
    gzip_bytes: int | None = None
    metrics: dict[str, float] | None = None
    latency: Latency | None = None
    layers: dict[str, LayerCost] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def with_metrics(self, metrics: Mapping[str, float] | None, reason: str = "") -> Measurement:
        """Return a copy with metrics, or with the reason why there are none."""
        reasons = {key: text for key, text in self.reasons.items() if key != "metrics"}
        if metrics:
            return replace(self, metrics=dict(metrics), reasons=reasons)
        return replace(self, metrics=None, reasons=reasons | {"metrics": reason or "it was not measured"})

    def with_latency(self, latency: Latency | None, reason: str = "") -> Measurement:
        """Return a copy with a latency, or with the reason why there is none."""
        reasons = {key: text for key, text in self.reasons.items() if key != "latency"}
        if latency is not None:
            return replace(self, latency=latency, reasons=reasons)
        return replace(self, latency=None, reasons=reasons | {"latency": reason or "it was not measured"})

    def with_reason(self, reason: str, *names: str) -> Measurement:
        """Return a copy that gives one reason for each of these fields, which are unknown."""
        return replace(self, reasons=self.reasons | dict.fromkeys(names, reason))

    def to_state(self) -> dict[str, Any]:
        """Return the figures as builtins that a checkpoint can hold."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Measurement:
        """Return the measurement that :meth:`to_state` described.

        >>> Measurement.from_state(Measurement(parameters=3).to_state()) == Measurement(parameters=3)
        True
        """
        values = dict(state)
        values["layers"] = {path: LayerCost(**row) for path, row in values["layers"].items()}
        values["latency"] = None if values["latency"] is None else Latency(**values["latency"])
        return cls(**values)


def measure(model: nn.Module, example_inputs: object = None, *, gzip: bool = True) -> Measurement:
    """Measure the structural costs of a model: everything but metrics and latency. The model is not changed.

    Args:
        model: Any module.
        example_inputs: One batch for counting operations; ``None`` leaves them unknown.
        gzip: Whether to compress the dense file, which takes about a second for 20 MB; over 40 MB a bar shows.

    Returns:
        The measurement, with reasons for what is unknown.

    >>> measured = measure(nn.Linear(8, 4), torch.zeros(1, 8))
    >>> measured.parameters, measured.macs, measured.layers[""].shape
    (36, 32, [4, 8])
    """
    reasons = {"metrics": "it was not measured", "latency": "it was not measured"}
    counts = count_parameters(model)
    macs = MacCount(None, {}, "no example inputs were given")
    if example_inputs is not None:
        macs = count_macs(model, example_inputs)
    if macs.total is None:
        reasons["macs"] = macs.reason
    dense, packed = None, None
    try:
        dense = dense_bytes(model)
    except ConfigurationError as error:  # a type that no dense file holds must not cost the rest of the report
        reasons["dense_bytes"] = str(error)
    if counts.nonzero is None:
        reasons["nonzero_parameters"] = reasons["gzip_bytes"] = "the weights have no values"
    elif gzip and dense is None:
        reasons["gzip_bytes"] = reasons["dense_bytes"]
    elif gzip:
        packed = _gzip_with_bar(model)
    else:
        reasons["gzip_bytes"] = "it was switched off"
    return Measurement(
        parameters=counts.total,
        nonzero_parameters=counts.nonzero,
        macs=macs.total,
        dense_bytes=dense,
        gzip_bytes=packed,
        layers=_layers(model, counts.per_layer, macs),
        reasons=reasons,
    )


def layer_table(baseline: Measurement | None, compressed: Measurement) -> list[dict[str, Any]]:
    """Return the rows of the report's ``layers``: baseline and compressed figures side by side.

    What replaced a layer is counted in that layer's row: ``fc.0`` and ``fc.1`` in the compressed model belong to ``fc``
    of the baseline. So every column sums to the total of its model.

    Args:
        baseline: The model before; ``None`` leaves the first of each pair unknown.
        compressed: The model after.

    Returns:
        One dictionary for each layer, in the order of the baseline, then of the compressed model.

    >>> before = Measurement(layers={"fc": LayerCost("Linear", [9, 9], 81, 81, 32, 81)})
    >>> half = LayerCost("Linear", [1, 9], 9, 9, 32, 9)
    >>> layer_table(before, Measurement(layers={"fc.0": half, "fc.1": half}))[0]["parameters"]
    [81, 18]
    """
    olds = {} if baseline is None else baseline.layers
    groups: dict[str, list[LayerCost]] = {path: [] for path in olds}
    for path, layer in compressed.layers.items():
        groups.setdefault(_home(path, olds), []).append(layer)
    return [
        _row(path, olds.get(path), news, None if baseline is None else 0, compressed.macs is not None)
        for path, news in groups.items()
    ]


def _home(path: str, olds: Mapping[str, LayerCost]) -> str:
    """Return the baseline layer that ``path`` replaces: itself, or the nearest above it that had no layers below."""
    if path in olds:
        return path
    parts = path.split(".")
    for length in range(len(parts) - 1, 0, -1):
        above = ".".join(parts[:length])
        if above in olds:
            return path if any(other.startswith(above + ".") for other in olds) else above
    return path


def _row(
    path: str, old: LayerCost | None, news: list[LayerCost], missing: int | None, macs_known: bool
) -> dict[str, Any]:
    shown = old if old is not None else news[0]
    before = (missing, missing, None, missing) if old is None else (old.parameters, old.nonzero, old.bits, old.macs)
    return {
        "name": path,
        "type": shown.type,
        "shape": shown.shape,
        "parameters": [before[0], sum(new.parameters for new in news)],
        "nonzero": [before[1], _sum_known([new.nonzero for new in news])],
        "bits": [before[2], max(news, key=lambda new: new.parameters).bits if news else None],
        "macs": [before[3], _sum_known([new.macs for new in news]) if macs_known else None],
    }


def _gzip_with_bar(model: nn.Module) -> int:
    """Return the size under gzip; where that takes more than about two seconds, show how far it is."""
    total = dense_bytes(model)
    if total < _LONG:
        return gzip_bytes(model)
    with Progress(transient=True) as bar:
        task = bar.add_task("measuring the size under gzip", total=total)
        return gzip_bytes(model, lambda done: bar.advance(task, done))


def _layers(model: nn.Module, counts: Mapping[str, tuple[int, int | None]], macs: MacCount) -> dict[str, LayerCost]:
    modules = {clean_path(path): module for path, module in model.named_modules()}
    sizes: dict[str, tuple[int, int | None]] = {}
    for path, (total, nonzero) in counts.items():
        before = sizes.get(_owner(path), (0, 0))
        sizes[_owner(path)] = (before[0] + total, _sum_known([before[1], nonzero]))
    operations: dict[str, int] = {}
    for path, count in macs.per_layer.items():
        operations[_owner(path)] = operations.get(_owner(path), 0) + count
    wanted = sizes.keys() | operations.keys()
    return {
        path: _layer(module, *sizes.get(path, (0, 0)), None if macs.total is None else operations.get(path, 0))
        for path, module in modules.items()
        if path in wanted
    }


def _layer(module: nn.Module, total: int, nonzero: int | None, macs: int | None) -> LayerCost:
    held = module if isinstance(module, HeldWeight) else None
    weight = _weight(module) if total and not held else None
    return LayerCost(
        type=parametrize.type_before_parametrizations(module).__name__,
        shape=list(held.shape) if held else [] if weight is None else list(weight.shape),
        parameters=total,
        nonzero=nonzero,
        bits=held.bits if held else None if weight is None else 8 * weight.element_size(),
        macs=macs,
    )


def _weight(module: nn.Module) -> torch.Tensor | None:
    """Return the weight, or the largest tensor it is made of: to ask for it would run its parametrization.

    That may draw numbers, or change buffers of a module that trains, as spectral norm does.
    """
    parametrized = parametrize.is_parametrized(module, "weight")
    weight = None if parametrized else getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor):
        return weight
    made_of = "parametrizations.weight." if parametrized else "parametrizations."
    own = [t for name, t in module.named_parameters() if name.startswith(made_of) or not (parametrized or "." in name)]
    return max(own, key=torch.Tensor.numel, default=None)


def _owner(path: str) -> str:
    """Return the layer that a parametrization's path belongs to."""
    parts = path.split(".")
    return ".".join(parts[: parts.index("parametrizations")]) if "parametrizations" in parts else path


def _sum_known(values: list[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
