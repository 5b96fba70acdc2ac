"""The benchmark of Deep Compression: its arithmetic, what it asks of the recipes, and what it has found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import _common as common
from benchmarks import deep_compression as bench

NAME = "deep_compression_lenet5"


def write_report(place: Path, accuracy: float, size: int) -> None:
    place.mkdir(parents=True, exist_ok=True)
    before = {"metrics": {"accuracy": 0.99}, "parameters": 1000, "nonzero_parameters": 1000, "artifact_bytes": 4100}
    after = {"metrics": {"accuracy": accuracy}, "parameters": 1000, "nonzero_parameters": 40, "artifact_bytes": size}
    report = {"baseline": before, "compressed": after}
    (place / "report.json").write_text(json.dumps(report), encoding="utf-8")


def test_runs_a_recipe_once_and_goes_on_after_a_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    place = tmp_path / f"{NAME}-3"

    def command(words: list[str]) -> int:
        asked.append(words)
        write_report(place, 0.995, 50)
        return 0

    monkeypatch.setattr(bench, "command", command)
    found = bench.run_recipe(NAME, 3, tmp_path, ("extra=1",))
    assert found == pytest.approx({"dense": 1.0, "error": 0.5, "full": 4000, "bytes": 50, "kept": 4.0})
    assert bench.run_recipe(NAME, 3, tmp_path) == found
    (place / "report.json").unlink()
    (place / "state.json").touch()
    bench.run_recipe(NAME, 3, tmp_path)
    (first, second) = asked
    assert {f"recipes={NAME}", "seed=3", "extra=1"} < set(first)
    assert second == [f"resume={place}"]
    monkeypatch.setattr(bench, "command", lambda words: 1)
    with pytest.raises(RuntimeError, match="failed with seed 4"):
        bench.run_recipe(NAME, 4, tmp_path)


def test_rows_by_hand() -> None:
    one = {"dense": 0.5, "error": 0.7, "full": 6000.0, "bytes": 90.0, "kept": 4.0}
    rows = {row.case: row for row in bench.rows_of(NAME, [one, {**one, "error": 0.9, "bytes": 110.0}])}
    assert rows[f"{NAME}: test error"].value == 0.8
    assert rows[f"{NAME}: test error"].ratio == pytest.approx(1.6)
    assert rows[f"{NAME}: test error"].met
    assert rows[f"{NAME}: file"].goal == 100  # 60 times smaller
    assert rows[f"{NAME}: file"].met
    assert rows[f"{NAME}: times smaller"].value == 60
    assert (rows[f"{NAME}, seed 1: error"].met, rows[f"{NAME}, seed 1: file"].met) == (False, False)


def test_committed_figures_beat_the_paper() -> None:
    content = json.loads((common.RESULTS / "deep_compression.json").read_text(encoding="utf-8"))
    rows = {row["case"]: row for row in content["rows"]}
    for name, goal in bench.GOALS.items():
        assert rows[f"{name}: test error"]["met"]
        assert rows[f"{name}: file"]["met"]
        assert rows[f"{name}: times smaller"]["value"] > goal.times > goal.published
