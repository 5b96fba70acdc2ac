"""The benchmark of training in fixed point in miniature, and what it has found."""

from __future__ import annotations

import json

import pytest
from test_benchmarks_sparse_training import Stripes

from benchmarks import _common as common
from benchmarks import fixed_point_mnist as bench


def test_cases_train_and_are_judged() -> None:
    data = Stripes()
    data.setup("fit")
    for arm in bench.ARMS:
        assert 0 <= bench.error_of(data, 0, 0.01, arm, 1, 2) <= 100


def test_what_is_judged() -> None:
    fixed = [bench.case_of(rate, arm) for rate in bench.RATES for arm in bench.ARMS]
    errors = {case: [2.0, 2.2] for case in fixed}
    errors[bench.case_of(bench.RATES[0], "nearest")] = [3.0, 3.2]
    found = {row.case: row for row in bench.rows(errors)}
    stochastic = found[f"test error, {bench.case_of(bench.RATES[0], 'stochastic')}"]
    assert stochastic.met
    assert stochastic.goal == pytest.approx(2.25)
    nearest = next(row for case, row in found.items() if case.startswith("points that nearest"))
    assert nearest.value == pytest.approx(-0.5)
    assert nearest.met


def test_committed_figures_meet_their_goals() -> None:
    content = json.loads((common.RESULTS / "fixed_point_mnist.json").read_text(encoding="utf-8"))
    judged = [row for row in content["rows"] if row["goal"] is not None]
    assert len(judged) == 2
    assert all(row["met"] for row in judged)
