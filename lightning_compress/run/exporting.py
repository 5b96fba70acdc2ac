"""The last step of a recipe with ``export``: a file for a runtime, checked and timed there."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from lightning_compress.core.errors import CompressionError, ConfigurationError, did_you_mean
from lightning_compress.evaluation.latency import Latency, measure_latency
from lightning_compress.export import Exported, export
from lightning_compress.export.runtimes import RUNTIMES, open_exported
from lightning_compress.export.targets import check_target

NAME = "compressed"
"""Of the file, without its ending, if ``export.path`` says nothing else."""
_DEFAULTS: dict[str, Any] = {"path": NAME, "dynamic_batch": True, "int4": False}
_SHOWN = ("median", "p10", "p90", "batch_size", "threads", "backend")


def read_export(value: Any) -> dict[str, Any] | None:
    """Return what ``export`` of a configuration asks for, with all keys.

    Args:
        value: ``None``; a target; or a mapping with ``target`` and, if wanted, ``path`` (in the run's folder unless it
            is absolute), ``dynamic_batch`` and ``int4``.

    Raises:
        ConfigurationError: For an unknown key or target, a value of a wrong type, or a package that is not installed.

    >>> read_export("torch")["path"]
    'compressed'
    """
    if value is None:
        return None
    given = {"target": value} if isinstance(value, str) else value
    if not isinstance(given, Mapping) or "target" not in given:
        raise ConfigurationError(
            f"`export` must be a target such as onnx, a mapping with `target`, or null; got {value!r}"
        )
    for key in given:
        if key not in ("target", *_DEFAULTS):
            raise ConfigurationError(f"`export.{key}` is not known; {did_you_mean(str(key), ('target', *_DEFAULTS))}")
    asked = {**_DEFAULTS, **given}
    for key, default in _DEFAULTS.items():
        if not isinstance(asked[key], type(default)) or asked[key] == "":
            raise ConfigurationError(f"`export.{key}` must be like {default!r}, got {asked[key]!r}")
    try:
        check_target(asked["target"], needs=True)
    except ConfigurationError as error:
        raise ConfigurationError(f"`export`: {error}; or set export=null") from error
    if asked["int4"] and asked["target"] != "onnx":
        raise ConfigurationError(f"`export.int4` is for the target onnx, not for {asked['target']}")
    return asked


def export_model(
    asked: Mapping[str, Any],
    folder: Path,
    baseline: nn.Module | None,
    model: nn.Module,
    inputs: Any,
    threads: int | None,
) -> tuple[dict[str, Any], Path]:
    """Write a model for a runtime, and time it there beside the baseline, written for the same runtime.

    Args:
        asked: What :func:`read_export` returned.
        folder: Of the run.
        baseline: The model to compare with, or ``None``.
        model: The model to write.
        inputs: One batch to trace, check and time it with.
        threads: Of the processor, for the times; ``None`` not to take any.

    Returns:
        The entry ``export`` of the report, and where the file lies.

    Raises:
        ExportError: If the model cannot be written, or the runtime computes something else.
    """
    options = {key: asked[key] for key in ("dynamic_batch", "int4")}
    made = export(model, folder / asked["path"], asked["target"], example_inputs=inputs, **options)
    entry: dict[str, Any] = {
        "target": made.target,
        "file": made.path.name,
        "bytes": made.bytes,
        "baseline_bytes": None,
        "opset": made.opset,
        "dynamic_batch": made.dynamic_batch,
        "difference": made.difference,
        "left": dict(made.left),
        "latency_ms": {"baseline": None, "compressed": None},
        "speedup_rate": None,
    }
    if threads is not None and made.target in RUNTIMES:
        entry |= _timed(made, baseline, inputs, threads)
    return entry, made.path


def _timed(made: Exported, baseline: nn.Module | None, inputs: Any, threads: int) -> dict[str, Any]:
    """Return the entries of a report that come from running files, as far as they can be run."""
    with tempfile.TemporaryDirectory() as folder:
        dense = None if baseline is None else _written(baseline, Path(folder, NAME), made.target, inputs)
        files = {"compressed": made} | ({} if dense is None else {"baseline": dense})
        try:
            calls = {who: open_exported(file, threads) for who, file in files.items()}
            times = measure_latency(calls, inputs, threads=threads, backend=RUNTIMES[made.target][0])
        except Exception:  # the runtime's own errors: a file whose batch is fixed refuses another one
            return {}
    before, after = times.get("baseline"), times["compressed"]
    return {
        "baseline_bytes": None if dense is None else dense.bytes,
        "latency_ms": {"baseline": _shown(before), "compressed": _shown(after)},
        "speedup_rate": None if before is None else before.median / after.median,
    }


def _written(model: nn.Module, path: Path, target: str, inputs: Any) -> Exported | None:
    try:
        return export(model, path, target, example_inputs=inputs, verify=False)
    except CompressionError:  # then there is nothing to compare with
        return None


def _shown(times: Latency | None) -> dict[str, Any] | None:
    return None if times is None else {key: value for key, value in asdict(times).items() if key in _SHOWN}
