"""The benchmark of clustering in miniature, and what it has found."""

import json

import pytest

from benchmarks import _common as common
from benchmarks import clustering


def test_both_reach_the_same_error_on_few_weights() -> None:
    values = clustering.weights(3000)
    assert clustering.ours(values)[1] == pytest.approx(clustering.theirs(values)[1], rel=0.05)


def test_committed_figures_meet_the_goal() -> None:
    content = json.loads((common.RESULTS / "clustering.json").read_text(encoding="utf-8"))
    assert content["rows"][0]["case"] == "10,000,000 weights"
    assert content["rows"][0]["met"]
    assert content["rows"][2]["ratio"] < 1.01
