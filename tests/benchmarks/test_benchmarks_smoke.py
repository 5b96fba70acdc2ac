"""The benchmarks in miniature, and the form of what they have written."""

import json
import math
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import _common as common
from benchmarks import artifact, pruning_overhead
from benchmarks._common import Row
from benchmarks._fits import CASES, OURS, PLAIN, THEIRS, mlp, time_steps
from benchmarks._memory import measure_fit, resident

ROOT = Path(common.__file__).parent.parent
KEYS = {"case", "value", "unit", "against", "ratio", "goal", "met"}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check_content(content, name):
    assert set(content) == {"name", "environment", "rows"}
    assert content["name"] == name
    facts = content["environment"]
    assert {"torch", "python", "cpu", "threads", "cores", "quick", "load_average_at_start"} <= set(facts)
    for text in (value for value in facts.values() if isinstance(value, str)):
        assert "/" not in text, f"a path in the environment: {text}"
    assert content["rows"]
    assert len({row["case"] for row in content["rows"]}) == len(content["rows"])
    for row in content["rows"]:
        assert set(row) == KEYS
        assert math.isfinite(row["value"])
        assert row["unit"]
        assert row["ratio"] is None or (row["ratio"] > 0 and row["against"])
        assert row["met"] == (None if row["goal"] is None else row["value"] <= row["goal"])


def refuse(constant):
    raise ValueError(f"{constant} is not JSON")


@pytest.mark.parametrize("path", sorted(common.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_results_have_the_agreed_form(path):
    check_content(json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse), path.stem)


def test_every_benchmark_has_results_and_every_result_a_benchmark():
    modules = {path.stem for path in (ROOT / "benchmarks").glob("[a-z]*.py")}
    assert {path.stem for path in common.RESULTS.glob("*.json")} == modules


def test_ratios_within_rounds_do_not_see_drift():
    drift = np.linspace(1.0, 3.0, 101)
    noise = np.random.default_rng(0).normal(0, 0.01, drift.size)
    found = common.median_of_ratios(1.05 * drift * (1 + noise), drift)
    assert found.low < 1.05 < found.high
    assert found.high - found.low < 0.01
    assert common.median_of_ratios([3.0, 1.0, 2.0], [4.0, 1.0, 1.0]).value == 1.0
    with pytest.raises(ValueError, match="one pair"):
        common.median_of_ratios([1.0], [])


def test_ratio_of_medians_by_hand():
    found = common.ratio_of_medians([3.0, 1.0, 2.0], [4.0, 4.0, 4.0])
    assert found.value == 0.5
    assert 0.25 <= found.low <= 0.5 <= found.high <= 0.75


def test_interval_shrinks_and_covers_with_more_rounds():
    rng = np.random.default_rng(0)
    drift = rng.uniform(1, 2, 1000)
    few, many = (common.ratio_of_medians(1.1 * drift[:n] + rng.normal(0, 0.02, n), drift[:n]) for n in (20, 1000))
    assert many.high - many.low < few.high - few.low
    assert many.low <= 1.1 <= many.high


def test_ratio_needs_pairs():
    with pytest.raises(ValueError, match="one pair of times per round"):
        common.ratio_of_medians([1.0], [1.0, 2.0])


def test_time_calls_tells_work_from_waiting():
    times = common.time_calls({"wait": lambda: time.sleep(0.02), "nothing": lambda: None}, repeats=3)
    wall, cpu = times["wait"]
    assert len(wall) == len(cpu) == 3
    assert wall.min() >= 0.02 > 2 * cpu.max()
    assert times["nothing"][0].max() < 0.02


def test_publish_writes_rows_and_verdicts(tmp_path, capsys):
    rows = [Row("a", 2.0, "s", "b", 0.5, goal=1.0), Row("b", 4.0, "s"), Row("c", 1.0, "x", goal=1.0)]
    path = common.publish("some", rows, common.environment(quick=True), tmp_path)
    content = json.loads(path.read_text(encoding="utf-8"))
    check_content(content, "some")
    assert [row["met"] for row in content["rows"]] == [False, None, True]
    assert "some" in capsys.readouterr().out


@pytest.mark.slow
def test_steps_of_all_cases_are_timed_in_turns():
    times = time_steps(partial(mlp, 32), (8, 64), rounds=3, burst=4)
    assert set(times) == set(CASES)
    for wall, cpu in times.values():
        assert wall.shape == cpu.shape == (3,)
        assert (wall > 0).all()


@pytest.mark.slow
def test_a_fit_that_fails_is_not_waited_for():
    with pytest.raises(RuntimeError, match=r"a timed fit failed:[\s\S]*negative dimension"):
        time_steps(partial(mlp, -1), (2, 4), rounds=1)


@pytest.mark.slow
def test_step_rows_judge_only_the_callback():
    rows = pruning_overhead.step_rows("tiny", partial(mlp, 32), (8, 64), rounds=2, goal=1000.0)
    judged = [row for row in rows if row.goal is not None]
    assert [row.met for row in judged] == [True, True], "one by each estimator"
    assert all(OURS in row.case and "processor time" in row.case for row in judged)
    assert {name for name in CASES if any(name in row.case for row in rows)} == {PLAIN, OURS, THEIRS}


def test_update_rows_in_miniature():
    rows = pruning_overhead.update_rows(20_000, repeats=2)
    assert len(rows) == 6
    assert all(row.value > 0 and row.goal is None for row in rows)


def test_the_weights_to_rank_number_what_is_said():
    total = sum(weight.numel() for weight in pruning_overhead.make_weights(1_000_000).values())
    assert total == pytest.approx(1_000_000, rel=0.01)


def test_artifact_rows_in_miniature(tmp_path):
    rows = artifact.artifact_rows(100_000, 1, tmp_path)
    share = next(row for row in rows if row.goal is not None)
    # a tenth of the values, of which the exponents shrink from eight bits to two, and the entropy of nine zeros in ten
    assert share.value == pytest.approx((0.1 * (24 + 2) + 0.469) / 32, rel=0.05)
    assert {row.unit for row in rows} == {"s", "bytes", "x"}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to read resident memory")
def test_resident_memory_sees_an_allocation():
    before = resident()[0]
    held = torch.ones(50_000_000)
    assert 150e6 < resident()[0] - before < 250e6
    assert held.numel() == 50_000_000


@pytest.mark.parametrize(
    ("words", "folder"),
    [([], common.RESULTS), (["--quick"], common.QUICK), (["--quick", "--out", "here"], Path("here"))],
)
def test_quick_results_do_not_replace_full_ones(words, folder, monkeypatch):
    monkeypatch.setattr("sys.argv", ["benchmark", *words])
    assert common.arguments("A benchmark.").out == folder
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    assert f"{common.QUICK.relative_to(ROOT).as_posix()}/" in ignored


@pytest.mark.slow
def test_memory_of_a_small_fit():
    grown = measure_fit(OURS, width=512, steps=2)
    parameters = 4 * 10 * 512 * 512
    assert grown["peak"] >= grown["training"] > 2 * parameters


@pytest.mark.slow
def test_the_command_runs_and_says_how(tmp_path):
    shown = subprocess.run(
        [sys.executable, "-m", "benchmarks.artifact", "--quick", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    check_content(json.loads((tmp_path / "artifact.json").read_text(encoding="utf-8")), "artifact")
    assert "save_compressed" in shown.stdout
