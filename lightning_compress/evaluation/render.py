"""A report as a table on the terminal, a Markdown page, an HTML page, and as files."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.evaluation.schema import to_json

_MOST_WORDS = 100
_FIGURES = {
    "parameters": "parameters",
    "nonzero_parameters": "non-zero parameters",
    "macs": "MACs",
    "dense_bytes": "dense file, bytes",
    "gzip_bytes": "gzip of it, bytes",
}


def summary_rows(report: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Return the rows "what, baseline, compressed, change" that every form of the report shows.

    Metrics change by a difference, everything else by a factor. Unknown figures are shown as a dash.

    Args:
        report: A report.

    Returns:
        The rows as text.
    """
    before, after = report["baseline"], report["compressed"]
    rows = []
    names = list(before["metrics"] or {}) + [
        name for name in after["metrics"] or {} if name not in (before["metrics"] or {})
    ]
    for name in names:
        one, two = ((part["metrics"] or {}).get(name) for part in (before, after))
        delta = (report["metric_deltas"] or {}).get(name)
        rows.append((name, _short(one), _short(two), "–" if delta is None else f"{delta:+.4f}"))
    for key, label in _FIGURES.items():
        rows.append((label, _whole(before[key]), _whole(after[key]), _factor(before[key], after[key])))
    size = after["artifact_bytes"]
    rows.append(
        ("file on disk, bytes", _whole(before["dense_bytes"]), _whole(size), _factor(before["dense_bytes"], size))
    )
    rows.append(_latency_row(before["latency_ms"], after["latency_ms"]))
    rows += _export_rows(report.get("export"))
    if report["prediction_flip_rate"] is not None:
        rows.append(("predictions that changed", "–", f"{report['prediction_flip_rate']:.2%}", "–"))
    return rows


def print_report(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the summary table and the notes.

    Args:
        report: A report.
        console: Where to print; the terminal by default.
    """
    console = console or Console()
    table = Table(title=Text(_title(report)), title_justify="left")
    for heading in ("", "baseline", "compressed", "change"):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in summary_rows(report):
        table.add_row(*map(Text, row))
    console.print(table)
    for note in report["notes"]:
        console.print(f"- {note}", markup=False, highlight=False)


def render_markdown(report: Mapping[str, Any]) -> str:
    """Return the report as a Markdown page."""
    return _template("report.md.jinja", False).render(**_view(report, _plain_cell)) + "\n"


def render_html(report: Mapping[str, Any]) -> str:
    """Return the report as one HTML page that needs no other file; all text in it is escaped."""
    return _template("report.html.jinja", True).render(**_view(report, str)) + "\n"


def write_report(report: Mapping[str, Any], folder: str | Path) -> dict[str, Path]:
    """Write ``report.json``, ``report.md`` and ``report.html``, each aside first and then renamed.

    Args:
        report: A report; numbers that JSON does not know (NaN, infinities) are written as ``null``.
        folder: Where to; made if it does not exist.

    Returns:
        The paths by file name.

    Raises:
        ConfigurationError: If the folder cannot be made or written to.
    """
    target = Path(folder)
    texts = {
        "report.json": json.dumps(to_json(report), indent=1, allow_nan=False, ensure_ascii=False) + "\n",
        "report.md": render_markdown(report),
        "report.html": render_html(report),
    }
    try:
        target.mkdir(parents=True, exist_ok=True)
        return {name: _replace(target / name, text) for name, text in texts.items()}
    except OSError as error:
        raise ConfigurationError(
            f"`folder`: cannot write the report to {str(target)!r}: {error.strerror or error}. Choose another folder."
        ) from error


def _replace(path: Path, text: str) -> Path:
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(aside, 0o666 & ~umask)
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
    return path


def _template(name: str, escape: bool) -> Any:
    loader = PackageLoader("lightning_compress.evaluation")
    return Environment(loader=loader, autoescape=escape, trim_blocks=True, lstrip_blocks=True).get_template(name)


def _view(report: Mapping[str, Any], cell: Any) -> dict[str, Any]:
    layers = [
        [
            cell(layer["name"] or "(model)"),
            cell(layer["type"]),
            " × ".join(map(str, layer["shape"])) or "–",
            *(
                f"{_whole(layer[key][0])} → {_whole(layer[key][1])}"
                for key in ("parameters", "nonzero", "bits", "macs")
            ),
        ]
        for layer in report["layers"]
    ]
    facts = [(str(key), str(value)) for key, value in report["environment"].items()]
    if report["recipe"]:
        facts.insert(0, ("recipe", report["recipe"]))
    if report["seed"] is not None:
        facts.insert(1 if report["recipe"] else 0, ("seed", str(report["seed"])))
    history = list(dict.fromkeys(key for record in report["history"] for key in record))
    return {
        "title": cell(_title(report)),
        "rows": [tuple(map(cell, row)) for row in summary_rows(report)],
        "notes": list(map(cell, report["notes"])),
        "rates": _rates(report),
        "layers": layers,
        "edits": [tuple(map(cell, (edit["verb"], edit["path"], _what(edit)))) for edit in report["edits"]],
        "history_keys": list(map(cell, history)),
        "history": [[cell(_short(record.get(key))) for key in history] for record in report["history"]],
        "environment": [(cell(key), cell(value)) for key, value in facts],
    }


def _what(edit: Mapping[str, Any]) -> str:
    """Return the kind of an edit, with what its configuration says in a few words."""
    known = {key: value for key, value in edit["config"].items() if isinstance(value, str | int | float | list)}
    words = ", ".join(f"{key} {_short(value)}" for key, value in known.items() if value is not False)
    return f"{edit['kind']} ({words})" if words and len(words) <= _MOST_WORDS else str(edit["kind"])


def _rates(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    rates = {
        "compression rate": "compression_rate",
        "index space saving": "index_space_saving",
        "space saving": "space_saving",
        "speed-up rate": "speedup_rate",
    }
    return [(label, _short(report[key])) for label, key in rates.items()]


def _title(report: Mapping[str, Any]) -> str:
    return "Compression report" + (f": {report['recipe']}" if report["recipe"] else "")


def _latency_row(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> tuple[str, str, str, str]:
    known = after or before
    label = "latency, ms"
    if known:
        batch = "" if known["batch_size"] is None else f"batch {known['batch_size']}, "
        label = (
            f"latency, ms ({batch}{known['threads']} thread{'' if known['threads'] == 1 else 's'}, {known['backend']})"
        )
    one, two = (None if part is None else part["median"] for part in (before, after))
    return (label, _spread(before), _spread(after), _factor(one, two))


def _export_rows(export: Mapping[str, Any] | None) -> list[tuple[str, str, str, str]]:
    if export is None:
        return []
    before, after = export["baseline_bytes"], export["bytes"]
    times = export["latency_ms"]
    rows = [(f"{export['target']} file, bytes", _whole(before), _whole(after), _factor(before, after))]
    return [*rows, _latency_row(times["baseline"], times["compressed"])] if times["compressed"] else rows


def _spread(times: Mapping[str, Any] | None) -> str:
    return "–" if times is None else f"{times['median']:.3g} ({times['p10']:.3g} to {times['p90']:.3g})"


def _factor(before: float | None, after: float | None) -> str:
    if not before or not after:
        return "–"
    if before == after:
        return "same"
    return f"{before / after:.2f}x less" if before > after else f"{after / before:.2f}x more"


def _whole(value: float | None) -> str:
    return "–" if value is None else f"{value:,}"


def _short(value: Any) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain_cell(value: Any) -> str:
    """Return text that a Markdown table cell shows as it is."""
    return str(value).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
