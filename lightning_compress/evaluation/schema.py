"""The keys and types of ``report.json``: a check against them, and how any value becomes strict JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from lightning_compress.core.errors import ConfigurationError, did_you_mean

SCHEMA = 1
"""Version of the keys and types below."""

_Check = Callable[[Any], bool]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


def _or_none(check: _Check) -> _Check:
    return lambda value: value is None or check(value)


def _pair(check: _Check) -> _Check:
    return lambda value: (
        isinstance(value, list) and len(value) == 2 and all(item is None or check(item) for item in value)
    )


def _list_of(check: _Check) -> _Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def _numbers(value: Any) -> bool:
    return _is_mapping(value) and all(item is None or _is_number(item) for item in value.values())


_LATENCY: dict[str, _Check] = {
    "median": _is_number,
    "p10": _is_number,
    "p90": _is_number,
    "batch_size": _or_none(_is_int),
    "threads": _is_int,
    "backend": _is_text,
}
_MODEL: dict[str, _Check] = {
    "metrics": _or_none(_numbers),
    "parameters": _or_none(_is_int),
    "nonzero_parameters": _or_none(_is_int),
    "macs": _or_none(_is_int),
    "dense_bytes": _or_none(_is_int),
    "gzip_bytes": _or_none(_is_int),
    "latency_ms": _or_none(_is_mapping),
}
_BITS: dict[str, _Check] = dict.fromkeys(("values", "indices", "codebooks", "other"), _is_int)
_LAYER: dict[str, _Check] = {
    "name": _is_text,
    "type": _is_text,
    "shape": _list_of(_is_int),
    "parameters": _pair(_is_int),
    "nonzero": _pair(_is_int),
    "bits": _pair(_is_number),
    "macs": _pair(_is_int),
}
_EDIT: dict[str, _Check] = {"verb": _is_text, "path": _is_text, "kind": _is_text, "config": _is_mapping}
_REPORT: dict[str, _Check] = {
    "schema": lambda value: value == SCHEMA,
    "recipe": _or_none(_is_text),
    "seed": _or_none(_is_int),
    "environment": _is_mapping,
    "baseline": _is_mapping,
    "compressed": _is_mapping,
    "compression_rate": _or_none(_is_number),
    "index_space_saving": _or_none(_is_number),
    "space_saving": _or_none(_is_number),
    "speedup_rate": _or_none(_is_number),
    "prediction_flip_rate": _or_none(_is_number),
    "metric_deltas": _or_none(_numbers),
    "edits": _list_of(_is_mapping),
    "layers": _list_of(_is_mapping),
    "notes": _list_of(_is_text),
    "history": _list_of(_is_mapping),
}


_EXPORT: dict[str, _Check] = {
    "target": _is_text,
    "file": _is_text,
    "bytes": _is_int,
    "baseline_bytes": _or_none(_is_int),
    "opset": _or_none(_is_int),
    "dynamic_batch": lambda value: isinstance(value, bool),
    "difference": _or_none(_is_number),
    "left": _is_mapping,
    "latency_ms": _is_mapping,
    "speedup_rate": _or_none(_is_number),
}
"""Of the entry ``export``, which only reports of runs with an export have."""


def validate_report(report: Any) -> None:
    """Check that a report has exactly the keys of schema 1, each with a value of its type or ``None`` where allowed.

    Args:
        report: What ``json.load`` returns for a ``report.json``.

    Raises:
        ConfigurationError: Names the first key that is missing, unknown or has a wrong value.

    >>> validate_report({"schema": 1})
    Traceback (most recent call last):
    ...
    lightning_compress.core.errors.ConfigurationError: `report`: the key 'recipe' is missing.
    """
    exported = isinstance(report, Mapping) and "export" in report
    _check("", report, _REPORT | ({"export": _is_mapping} if exported else {}))
    _check("baseline.", report["baseline"], _MODEL)
    artifact = {"artifact_bytes": _or_none(_is_int), "encoded_bits": _or_none(_is_mapping)}
    _check("compressed.", report["compressed"], _MODEL | artifact)
    for who in ("baseline", "compressed"):
        if report[who]["latency_ms"] is not None:
            _check(f"{who}.latency_ms.", report[who]["latency_ms"], _LATENCY)
    if report["compressed"]["encoded_bits"] is not None:
        _check("compressed.encoded_bits.", report["compressed"]["encoded_bits"], _BITS)
    if exported:
        _check("export.", report["export"], _EXPORT)
        times = report["export"]["latency_ms"]
        _check("export.latency_ms.", times, dict.fromkeys(("baseline", "compressed"), _or_none(_is_mapping)))
        for who in (who for who in times if times[who] is not None):
            _check(f"export.latency_ms.{who}.", times[who], _LATENCY)
    for index, layer in enumerate(report["layers"]):
        _check(f"layers[{index}].", layer, _LAYER)
    for index, edit in enumerate(report["edits"]):
        _check(f"edits[{index}].", edit, _EDIT)


def to_json(value: Any) -> Any:
    """Return ``value`` as what strict JSON can hold: NaN and infinities become ``None``, tensors numbers or lists.

    >>> to_json({"a": (float("nan"), 1), "b": (0, 1)})
    {'a': [None, 1], 'b': [0, 1]}
    """
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, tuple | list | set | frozenset):
        return [to_json(item) for item in value]
    if isinstance(value, bool | str) or value is None:
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "tolist"):
        return to_json(value.tolist())
    return str(value)


def _check(where: str, value: Any, keys: Mapping[str, _Check]) -> None:
    if not isinstance(value, Mapping):
        raise ConfigurationError(f"`report`: expected a mapping, got {type(value).__name__} at {where or 'the top'!r}.")
    for key, valid in keys.items():
        if key not in value:
            raise ConfigurationError(f"`report`: the key {where + key!r} is missing.")
        if not valid(value[key]):
            raise ConfigurationError(f"`report`: {where + key!r} has an invalid value: {value[key]!r:.80}.")
    for key in value:
        if key not in keys:
            raise ConfigurationError(f"`report`: unknown key {where + str(key)!r}; {did_you_mean(str(key), keys)}")
