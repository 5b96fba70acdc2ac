"""The sentences of a report that answer "why is it not smaller?" and "why is it not faster?"."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning_compress.core.callback import CompressionCallback
from lightning_compress.evaluation.latency import Latency
from lightning_compress.evaluation.measurement import Measurement

_NAMES = {
    "metrics": "metrics",
    "parameters": "parameters",
    "nonzero_parameters": "non-zero parameters",
    "macs": "MACs",
    "dense_bytes": "dense size",
    "gzip_bytes": "gzip size",
    "latency": "latency",
}
_MOST_LEFT = 5


def explain(
    report: Mapping[str, Any], baseline: Measurement | None, compressed: Measurement, flip_reason: str = ""
) -> list[str]:
    """Return the notes of a report; each follows from a condition on its figures, none is a guess.

    Args:
        report: The report's figures (see the keys of ``report.json``), ``notes`` excepted.
        baseline: The measured baseline, for its spread and for the reasons of what is unknown.
        compressed: The measured compressed model.
        flip_reason: Why the prediction flip rate is unknown; empty if it is known.

    Returns:
        Sentences, the ones about size first, then speed, then what is unknown.
    """
    rules: list[Callable[[Mapping[str, Any]], str]] = [
        zeros_keep_shapes,
        file_is_packed,
        file_is_not_smaller,
        against_gzip,
        fewer_macs_same_time,
    ]
    notes = [rule(report) for rule in rules]
    latencies = (baseline.latency if baseline else None, compressed.latency)
    notes += [within_noise(*latencies), slower(*latencies)]
    notes.extend(disturbed(who, part) for who, part in (("baseline", baseline), ("compressed", compressed)) if part)
    if baseline is None:
        notes.append("Nothing is known about a baseline, so there are no rates and no changes to show.")
    notes.extend(_unknown(baseline, compressed))
    if flip_reason:
        notes.append(f"The prediction flip rate is unknown: {flip_reason}.")
    return [note for note in notes if note]


def zeros_keep_shapes(report: Mapping[str, Any]) -> str:
    """Say why zeros alone make nothing faster: if over 1 % of the parameters became zero and every shape is kept."""
    before, after = report["baseline"], report["compressed"]
    total, nonzero = after["parameters"], after["nonzero_parameters"]
    if not total or nonzero is None or any(before[key] not in (None, after[key]) for key in ("parameters", "macs")):
        return ""
    if (total if before["nonzero_parameters"] is None else before["nonzero_parameters"]) - nonzero < 0.01 * total:
        return ""
    whole = f"{1 - nonzero / total:.1%} of all parameters"
    selected = _selected_sparsity(report, 1 - nonzero / total)
    share = whole if selected is None else f"{selected:.1%} of the selected weights ({whole})"
    return (
        f"{share} are zero, but every layer keeps its shape: dense kernels multiply zeros too, so MACs and latency "
        "do not fall. Structured pruning, which removes whole channels, or a sparse runtime would make it faster."
    )


def file_is_packed(report: Mapping[str, Any]) -> str:
    """Say that only the file is small: if it is under 95 % of the dense file of the same compressed model."""
    after = report["compressed"]
    artifact, dense = after["artifact_bytes"], after["dense_bytes"]
    if artifact is None or dense is None or artifact >= 0.95 * dense:
        return ""
    bits = after["encoded_bits"]
    index = f", {bits['indices'] / 8 / artifact:.0%} of it marks where they belong" if bits and bits["indices"] else ""
    return (
        f"The file takes {artifact:,} bytes because it stores only the values that are needed{index}; "
        f"once loaded, the model takes {dense:,} bytes of memory again."
    )


def file_is_not_smaller(report: Mapping[str, Any]) -> str:
    """Say why the file did not shrink: if it takes over 95 % of the dense baseline."""
    artifact, dense = report["compressed"]["artifact_bytes"], report["baseline"]["dense_bytes"]
    if artifact is None or not dense or artifact < 0.95 * dense:
        return ""
    total, nonzero = report["compressed"]["parameters"], report["compressed"]["nonzero_parameters"]
    text = f"The file is not smaller than the dense baseline ({artifact:,} against {dense:,} bytes)"
    if total and nonzero is not None and nonzero > 0.95 * total:
        return f"{text}: {nonzero / total:.1%} of the parameters are not zero, so there is little to leave out."
    bits = report["compressed"]["encoded_bits"]
    if bits and bits["other"] > 4 * artifact:
        return f"{text}: names, shapes and other overhead make up {bits['other'] / 8 / artifact:.0%} of it."
    return f"{text}."


def against_gzip(report: Mapping[str, Any]) -> str:
    """Compare the file with what gzip alone makes of the compressed model's dense file, if both are known."""
    artifact, packed = report["compressed"]["artifact_bytes"], report["compressed"]["gzip_bytes"]
    if artifact is None or not packed:
        return ""
    change = artifact / packed - 1
    if abs(change) < 0.005:
        return f"gzip -6 makes a file of the same size from the dense one ({packed:,} bytes)."
    word = "smaller" if change < 0 else "larger"
    return f"The file is {abs(change):.0%} {word} than what gzip -6 makes of the dense file ({packed:,} bytes)."


def fewer_macs_same_time(report: Mapping[str, Any]) -> str:
    """Say why fewer operations are not less time: if MACs fell by over 5 % and the time fell by less than 5 %."""
    before, after, speedup = report["baseline"]["macs"], report["compressed"]["macs"], report["speedup_rate"]
    if not before or after is None or speedup is None or after > 0.95 * before or speedup > 1.05:
        return ""
    return (
        f"MACs fell by {1 - after / before:.0%} but the time did not: at this size the cost of each call and of moving "
        "memory outweighs the arithmetic. A larger batch, or channel numbers in multiples of 8, shows more of it."
    )


def within_noise(before: Latency | None, after: Latency | None) -> str:
    """Say that two latencies cannot be told apart: if the ranges from p10 to p90 overlap."""
    if before is None or after is None or max(before.p10, after.p10) > min(before.p90, after.p90):
        return ""
    return (
        f"The latencies are equal within the measured spread (p10 to p90: {before.p10:.3g} to {before.p90:.3g} ms "
        f"before, {after.p10:.3g} to {after.p90:.3g} ms after), so the speed-up rate of "
        f"{before.median / after.median:.2f} shows no difference."
    )


def slower(before: Latency | None, after: Latency | None) -> str:
    """Say that the compressed model is slower beyond the spread: if its p10 lies above the baseline's p90."""
    if before is None or after is None or after.p10 <= before.p90:
        return ""
    return (
        f"The compressed model is slower ({after.median:.3g} against {before.median:.3g} ms): its layers do extra work "
        "in each pass, such as computing their weights or making several small calls instead of one."
    )


def disturbed(who: str, part: Measurement) -> str:
    """Say that a latency was measured on a busy machine, if it was."""
    if part.latency is None or not part.latency.noisy:
        return ""
    return (
        f"The latency of the {who} model was disturbed by other work on this machine "
        f"({part.latency.repeats} repeats); measure again on a quiet one before relying on it."
    )


def missed_target(callback: CompressionCallback) -> str:
    """Say that the run ended before a method reached its final amount, if it did."""
    if callback.at_target or not callback.history:
        return ""
    reached, final = callback.history[-1].get("amount", 0.0), callback.schedule.final
    return f"Training ended before the target of {callback.state_key}: it reached {reached:.4g} of {final:.4g}."


def explain_export(export: Mapping[str, Any]) -> list[str]:
    """Return the notes on an exported file: its check, what stays float in it, and whether it is faster.

    Args:
        export: The entry ``export`` of a report.

    >>> explain_export({"file": "a.onnx", "difference": None, "left": {}, "speedup_rate": None, "latency_ms": {}})
    ['a.onnx was not run, so nobody knows whether it computes the same.']
    """
    file, difference, rate = export["file"], export["difference"], export["speedup_rate"]
    notes = [f"{file} was not run, so nobody knows whether it computes the same."]
    if difference is not None:
        notes = [f"{file} was run on one batch: what it computes differs by {difference:.2g} of the outputs' size."]
    left = [f"{path or 'the model'} ({why})" for path, why in export["left"].items()]
    if left:
        more = f"; and {len(left) - _MOST_LEFT} more" if len(left) > _MOST_LEFT else ""
        notes.append(f"Not an integer, or not as asked, in {file}: {'; '.join(left[:_MOST_LEFT])}{more}.")
    if rate is not None:
        backend = export["latency_ms"]["compressed"]["backend"]
        word = f"{rate:.2f}x faster" if rate >= 1 else f"{1 / rate:.2f}x slower"
        notes.append(f"In {backend} it is {word} than the baseline written for the same runtime.")
    return notes


def _selected_sparsity(report: Mapping[str, Any], whole: float) -> float | None:
    """Return the last sparsity of the selected weights, unless it was another model's: before the zeros came, or went.

    Selected weights have at least the share of all, and some layer has nearly theirs; biases are rarely selected.
    """
    found = [record["sparsity"] for record in report["history"] if isinstance(record.get("sparsity"), int | float)]
    counts = [(layer["parameters"][1], layer["nonzero"][1]) for layer in report["layers"]]
    most = max((1 - nonzero / total for total, nonzero in counts if total and nonzero is not None), default=0.0)
    return float(found[-1]) if found and whole <= found[-1] + 1e-3 and most >= 0.8 * found[-1] else None


def _unknown(baseline: Measurement | None, compressed: Measurement) -> list[str]:
    """Return a sentence for each reason, about every figure and model that it holds for."""
    whose: dict[tuple[str, str], list[str]] = {}
    for who, part in (("baseline", baseline), ("compressed model", compressed)):
        for key, reason in (part.reasons if part is not None else {}).items():
            whose.setdefault((key, reason), []).append(who)
    figures: dict[tuple[str, str], list[str]] = {}
    for (key, reason), parts in whose.items():
        figures.setdefault((" and the ".join(parts), reason), []).append(_NAMES[key])
    return [
        f"The {_join(names)} of the {parts} {_verb(names)} unknown: {reason}."
        for (parts, reason), names in figures.items()
    ]


def _join(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _verb(names: list[str]) -> str:
    return "is" if len(names) == 1 and names[0].endswith(("size", "latency")) else "are"
