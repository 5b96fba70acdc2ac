"""One table at the end of a sweep: what each job changed, and what came of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from lightning_compress.run.folder import RunFolder

SUMMARY = "sweep.json"


class CompareJobs(Callback):
    """A Hydra callback: after the last job of ``-m`` it compares the reports of all of them."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the table and write ``sweep.json`` into the sweep's folder."""
        folder = Path(config.hydra.sweep.dir)
        if not folder.is_dir():
            return
        rows = collect(folder)
        RunFolder(folder).write(
            SUMMARY, lambda aside: aside.write_text(json.dumps({"schema": 1, "jobs": rows}, indent=1), encoding="utf-8")
        )
        Console().print(comparison(rows))
        print(f"sweep: {(folder / SUMMARY).absolute()}")


def collect(folder: Path) -> list[dict[str, Any]]:
    """Return a row per job folder below ``folder``, in the order of the jobs; a failed job has no figures.

    Args:
        folder: What ``hydra.sweep.dir`` names.

    Returns:
        ``job``, ``overrides``, ``failed``, ``metrics``, ``metric_deltas``, ``sparsity``, ``compression_rate``,
        ``artifact_bytes``, ``speedup_rate``.
    """
    folders = [path.parent.parent for path in folder.rglob(".hydra/overrides.yaml")]
    return [_row(path, folder) for path in sorted(folders, key=_job_number)]


def _job_number(path: Path) -> tuple[int, str]:
    return (int(path.name), "") if path.name.isdigit() else (0, str(path))


def _row(path: Path, folder: Path) -> dict[str, Any]:
    overrides = [str(word) for word in OmegaConf.load(path / ".hydra" / "overrides.yaml")]
    row: dict[str, Any] = {"job": path.relative_to(folder).as_posix(), "overrides": overrides}
    try:
        report = json.loads((path / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {**row, "failed": True}
    after = report["compressed"]
    return {
        **row,
        "failed": False,
        "metrics": after["metrics"],
        "metric_deltas": report["metric_deltas"],
        "sparsity": _sparsity(after),
        "compression_rate": report["compression_rate"],
        "artifact_bytes": after["artifact_bytes"],
        "speedup_rate": report["speedup_rate"],
    }


def _sparsity(part: Mapping[str, Any]) -> float | None:
    total, nonzero = part["parameters"], part["nonzero_parameters"]
    return 1 - nonzero / total if total and nonzero is not None else None


def comparison(rows: list[dict[str, Any]]) -> Table:
    """Return the rows as a table; metrics come with their change against the job's baseline."""
    shared = [word for word in rows[0]["overrides"] if all(word in row["overrides"] for row in rows)] if rows else []
    names = list(dict.fromkeys(name for row in rows for name in row.get("metrics") or {}))
    table = Table(title=" ".join(["sweep", *shared]), title_justify="left")
    table.add_column("job")
    table.add_column("changed", overflow="fold", min_width=18)
    for heading in (*names, "zeros", "smaller", "bytes", "faster"):
        table.add_column(heading, justify="right")
    for row in rows:
        metrics = row.get("metrics") or {}
        deltas = row.get("metric_deltas") or {}
        cells = [" ".join((_number(metrics.get(name), ".4f"), _number(deltas.get(name), "+.4f"))) for name in names]
        cells += [_number(row.get("sparsity"), ".2%"), _number(row.get("compression_rate"), ".2f", "x")]
        cells += [_number(row.get("artifact_bytes"), ",d"), _number(row.get("speedup_rate"), ".2f", "x")]
        failed = ["failed", *([""] * (len(cells) - 1))]
        changed = "\n".join(word for word in row["overrides"] if word not in shared)
        table.add_row(row["job"], changed, *(failed if row["failed"] else cells))
    return table


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "–" if value is None else f"{value:{form}}{unit}"
