"""The benchmark of binary networks in miniature, and what it has found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_benchmarks_sparse_training import Stripes

from benchmarks import _common as common
from benchmarks import binary_mnist as bench


def test_cases_train_and_what_was_trained_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {case: bench.Arm(8, arm.relu, arm.callbacks, arm.against) for case, arm in bench.ARMS.items()}
    monkeypatch.setattr(bench, "ARMS", small)
    data = Stripes()
    data.setup("fit")
    notes = tmp_path / "of" / "0.json"
    first = bench.measure(data, 0, 1, 2, notes)
    assert first.keys() == {*bench.ARMS, bench.STOCHASTIC + bench.BEHIND}
    assert all(0 <= found["error"] <= 100 and "torch" in found["on"] for found in first.values())
    changed = {**first, "BinaryConnect": {"error": 7.0, "on": "elsewhere"}}
    notes.write_text(json.dumps(changed))
    assert bench.measure(data, 0, 1, 2, notes) == changed


def test_what_is_judged() -> None:
    errors = {case: [1.4, 1.6] for case in (*bench.ARMS, bench.STOCHASTIC + bench.BEHIND)}
    found = {row.case: row for row in bench.rows(errors)}
    judged = {case: row.met for case, row in found.items() if row.goal is not None}
    assert judged == {
        "test error, BinaryConnect": True,
        "test error, BinaryConnect, stochastic, tested with float weights": True,
        "test error, XNOR-Net, 4,096 units": False,
    }
    assert found["test error, BinaryConnect: spread of seeds"].value == pytest.approx(0.1414)
    assert found["test error, BinaryConnect"].ratio == pytest.approx(1.0)


def test_committed_figures() -> None:
    content = json.loads((common.RESULTS / "binary_mnist.json").read_text(encoding="utf-8"))
    met = {row["case"]: row["met"] for row in content["rows"] if row["goal"] is not None}
    assert met["test error, BinaryConnect"]
    assert met["test error, BinaryConnect, stochastic, tested with float weights"]
    assert met["test error, XNOR-Net, 4,096 units"]
    assert set(content["environment"]["seeds"].values()) == {3}
