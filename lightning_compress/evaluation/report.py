"""The report of a compression: baseline against compressed, as plain data with a fixed set of keys."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from lightning_compress.core.checkpoint import ArtifactInfo
from lightning_compress.core.hooks import journal_of
from lightning_compress.evaluation.environment import describe_environment
from lightning_compress.evaluation.flips import Flips, count_flips
from lightning_compress.evaluation.latency import Latency, measure_latency
from lightning_compress.evaluation.measurement import Measurement, layer_table, measure
from lightning_compress.evaluation.notes import explain
from lightning_compress.evaluation.schema import SCHEMA, to_json


def build_report(
    baseline: nn.Module | Measurement | None,
    compressed: nn.Module,
    *,
    example_inputs: object = None,
    datamodule: Any = None,
    test_batches: Iterable[object] | None = None,
    artifact: ArtifactInfo | None = None,
    history: Sequence[Mapping[str, Any]] = (),
    recipe: str | None = None,
    seed: int | None = None,
    latency: bool = True,
    threads: int = 1,
    gzip: bool = True,
) -> dict[str, Any]:
    """Measure two models against each other and return the report.

    Metrics come from each module's own ``test_step``, on ``test_batches`` if given, else on the test data of
    ``datamodule``, else on the module's own ``test_dataloader``.

    Args:
        baseline: The model before; or figures measured earlier; or ``None``.
        compressed: The model after.
        example_inputs: One batch for operations and latency: a tensor, a tuple of arguments, a mapping of keywords.
        datamodule: A LightningDataModule with test data.
        test_batches: A loader of test batches.
        artifact: What was written to disk.
        history: Records of the run, each a mapping such as ``{"step": 0, "sparsity": 0.0}``.
        recipe: Name of the recipe.
        seed: Seed of the run.
        latency: Whether to measure latency.
        threads: CPU threads for the latency.
        gzip: Whether to measure the size under gzip.

    Returns:
        A dictionary that :func:`~lightning_compress.evaluation.schema.validate_report` accepts. Unknown is ``None``.

    >>> import torch
    >>> report = build_report(nn.Linear(4, 4), nn.Linear(4, 2), example_inputs=torch.zeros(1, 4), latency=False)
    >>> report["baseline"]["macs"], report["compressed"]["macs"], report["speedup_rate"]
    (16, 8, None)
    """
    if isinstance(test_batches, Iterator):  # it is read three times
        test_batches = list(test_batches)
    after = measure_with_metrics(compressed, example_inputs, datamodule, test_batches, gzip=gzip)
    before = baseline
    if isinstance(before, nn.Module):
        before = measure_with_metrics(before, example_inputs, datamodule, test_batches, gzip=gzip)
    model = baseline if isinstance(baseline, nn.Module) else None
    before, after = add_latencies(before, after, model, compressed, example_inputs, threads=threads, enabled=latency)
    flips = compare_predictions(model, compressed, datamodule, test_batches)
    return assemble_report(
        before,
        after,
        flips=flips,
        edits=describe_edits(compressed),
        artifact=artifact,
        history=history,
        recipe=recipe,
        seed=seed,
    )


def assemble_report(
    baseline: Measurement | None,
    compressed: Measurement,
    *,
    flips: Flips,
    edits: Sequence[Mapping[str, Any]] = (),
    artifact: ArtifactInfo | None = None,
    history: Sequence[Mapping[str, Any]] = (),
    recipe: str | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    r"""Put measured figures together and derive the rates; nothing is measured here.

    With :math:`a` the bytes of the dense baseline and :math:`a^*` those of the file on disk: compression rate
    :math:`a / a^*`, index space saving :math:`(a - a^*) / a^*`, space saving :math:`1 - a^* / a`; the speed-up rate is
    the baseline's median latency over that of the compressed model.

    Args:
        baseline: The model before, or ``None``.
        compressed: The model after.
        flips: Predictions that differ.
        edits: Structure edits, each with verb, path, kind and config.
        artifact: What was written to disk.
        history: Records of the run.
        recipe: Name of the recipe.
        seed: Seed of the run.

    Returns:
        The report.
    """
    size = None if artifact is None else Path(artifact.path).stat().st_size
    after = _figures(compressed)
    after |= {"artifact_bytes": size, "encoded_bits": None if artifact is None else dict(artifact.encoded_bits)}
    dense = baseline.dense_bytes if baseline is not None else None
    rate = dense / size if dense is not None and size else None
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "recipe": recipe,
        "seed": seed,
        "environment": describe_environment(),
        "baseline": _figures(baseline or Measurement()),
        "compressed": after,
        "compression_rate": rate,
        "index_space_saving": None if rate is None else rate - 1,
        "space_saving": None if rate is None else 1 - 1 / rate,
        "speedup_rate": _speedup(baseline.latency if baseline else None, compressed.latency),
        "prediction_flip_rate": flips.rate,
        "metric_deltas": _deltas(baseline.metrics if baseline else None, compressed.metrics),
        "edits": [dict(edit) for edit in edits],
        "layers": layer_table(baseline, compressed),
        "history": [dict(record) for record in history],
    }
    report["notes"] = explain(report, baseline, compressed, flips.reason)
    clean: dict[str, Any] = to_json(report)
    return clean


def measure_with_metrics(
    model: nn.Module,
    example_inputs: object = None,
    datamodule: Any = None,
    test_batches: Iterable[object] | None = None,
    *,
    gzip: bool = True,
    precision: Any = None,
) -> Measurement:
    """Measure a model's structural costs and what its own ``test_step`` logs, or why that is unknown."""
    measured = measure(model, example_inputs, gzip=gzip)
    return measured.with_metrics(*try_metrics(model, datamodule, test_batches, precision))


def try_metrics(
    model: nn.Module, datamodule: Any = None, test_batches: Iterable[object] | None = None, precision: Any = None
) -> tuple[dict[str, float], str]:
    """Return the test metrics of a model, and why there are none if there are none."""
    from lightning_compress.evaluation.metrics import measure_metrics, why_untestable

    if test_batches is not None:
        datamodule = None
    reason = why_untestable(model, test_batches, datamodule)
    if reason:
        return {}, reason
    try:
        metrics = measure_metrics(model, test_batches, datamodule, precision)
    except Exception as error:  # user code runs here; the rest of the report must survive it
        return {}, f"the test run failed with {type(error).__name__}: {error}"
    return metrics, "" if metrics else "the test_step logged nothing"


def add_latencies(
    before: Measurement | None,
    after: Measurement,
    baseline: nn.Module | None,
    compressed: nn.Module,
    example_inputs: object,
    *,
    threads: int = 1,
    enabled: bool = True,
    missing: str = "no example inputs were given",
) -> tuple[Measurement | None, Measurement]:
    """Measure the latency of both models in one process and return both measurements with it, or with a reason.

    Args:
        before: The baseline's measurement, or ``None``.
        after: The compressed model's measurement.
        baseline: The baseline itself, or ``None`` if it is not there.
        compressed: The compressed model.
        example_inputs: One batch; ``None`` leaves the latency unknown because of ``missing``.
        threads: CPU threads.
        enabled: Whether to measure at all.
        missing: Why there are no example inputs.

    Returns:
        Both measurements.
    """
    models = {"compressed": compressed} if baseline is None else {"baseline": baseline, "compressed": compressed}
    times: dict[str, Latency] = {}
    reason = missing if enabled else "it was switched off"
    if enabled and example_inputs is not None:
        try:
            times = measure_latency(models, example_inputs, threads=threads)
            reason = "the model was not there to be measured beside the compressed one"
        except Exception as error:  # user code runs here; the rest of the report must survive it
            reason = f"the forward pass failed with {type(error).__name__}: {error}"
    timed = None if before is None else before.with_latency(times.get("baseline"), reason)
    return timed, after.with_latency(times.get("compressed"), reason)


def compare_predictions(
    baseline: nn.Module | None,
    compressed: nn.Module,
    datamodule: Any = None,
    test_batches: Iterable[object] | None = None,
) -> Flips:
    """Count the predictions that differ on the test data, or say why they cannot be compared."""
    if baseline is None:
        return Flips(reason="the baseline model is not there to predict beside the compressed one")
    try:
        batches = test_batches
        if batches is None:
            from lightning_compress.evaluation.metrics import find_test_batches

            batches = find_test_batches(compressed, datamodule)
        if batches is None:
            return Flips(reason="there are no test batches")
        return count_flips(baseline, compressed, _each_batch(batches))
    except Exception as error:  # user code runs here; the rest of the report must survive it
        return Flips(reason=f"predicting failed with {type(error).__name__}: {error}")


def _each_batch(source: Any) -> Iterator[Any]:
    """Yield the batches of a loader, or of each loader in a list or mapping of them."""
    loaders = list(source.values()) if isinstance(source, Mapping) else source
    if isinstance(loaders, list | tuple) and all(isinstance(loader, DataLoader) for loader in loaders):
        for loader in loaders:
            yield from loader
    else:
        yield from loaders


def describe_edits(model: nn.Module) -> list[dict[str, Any]]:
    """Return the structure edits in a model's journal as plain data."""
    return [edit.to_dict() for edit in journal_of(model)]


def _figures(part: Measurement) -> dict[str, Any]:
    times = part.latency
    shown = ("median", "p10", "p90", "batch_size", "threads", "backend")
    return {
        "metrics": part.metrics,
        "parameters": part.parameters,
        "nonzero_parameters": part.nonzero_parameters,
        "macs": part.macs,
        "dense_bytes": part.dense_bytes,
        "gzip_bytes": part.gzip_bytes,
        "latency_ms": None if times is None else {key: getattr(times, key) for key in shown},
    }


def _speedup(before: Latency | None, after: Latency | None) -> float | None:
    return None if before is None or after is None or not after.median else before.median / after.median


def _deltas(before: Mapping[str, float] | None, after: Mapping[str, float] | None) -> dict[str, float] | None:
    if before is None or after is None:
        return None
    return {name: after[name] - before[name] for name in before if name in after}
