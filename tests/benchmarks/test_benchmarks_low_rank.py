"""The benchmark of the survey's Table II in miniature."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import _ranks as ranks
from benchmarks import decomposition_time
from benchmarks import survey_table2 as table
from lightning_compress import LowRank, compress, journal_of
from lightning_compress.low_rank.layers import Factorized

FIRST = f"2.5 {ranks.DEFAULT}"


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def toy(monkeypatch):
    def build():
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.Flatten(), nn.Linear(24 * 36, 30)
        )

    entry = ranks.Entry(build, (2.0, 2.5), (1.0, 1.1), {1: 1.0, 16: 1.0})
    monkeypatch.setitem(ranks.ENTRIES, "toy", entry)
    monkeypatch.setitem(table.ROUNDS, "toy", {1: 3, 16: 2})
    return build


@pytest.fixture
def chosen(toy):
    return json.loads(json.dumps(ranks.choose_ranks("toy", image=8, batch=4)))


@pytest.fixture
def options(tmp_path: Path):
    given = table.arguments(["--quick", "--out", str(tmp_path), "--batch", "1"])
    given.image = 8
    return given


def test_rates_are_met_and_both_countings_and_errors_are_printed(chosen, options):
    assert set(chosen) == {f"{rate:g} {way}" for rate in (2.0, 2.5, 4.0, 6.0, 8.0) for way in ranks.WAYS}
    found = {row.case: row for row in table.measure("sizes", "toy", chosen, options)}
    for way in ranks.WAYS:
        assert found[f"toy: 2.5 {way}, compression rate of the whole model"].value >= 2.5
        assert found[f"toy: 2.5 {way}, of the weights of convolutions"].value >= 1
        assert found[f"toy: 2.5 {way}, relative output errors of 3 layers"].value > 0
        assert 0 < found[f"toy: 2.5 {way}, largest relative output error"].value < 1
    assert found["toy: 2.5 speed, squared relative output errors of 3 layers"].ratio <= 1
    assert found["toy: 2.5 equal, squared relative output errors of 3 layers"].ratio == 1


def test_times_are_taken_against_the_dense_network_in_the_same_layout(chosen, options):
    rows = table.measure("times", "toy", chosen, options)
    found = {row.case: row for row in rows}
    assert len(found) == len(rows) == 2 * (1 + 2 * len(ranks.WAYS))
    for layout in table.LAYOUTS:
        assert found[f"toy: dense, {layout}, batch 1"].ratio == 1
        fast = found[f"toy: {FIRST}, {layout}, batch 1"]
        assert found[f"toy: {FIRST}, {layout}, batch 1, speed-up"].value == pytest.approx(1 / fast.ratio)
        assert "output errors sum up to" in fast.against
    assert {case for case, row in found.items() if row.goal is not None} == {f"toy: {FIRST}, channels_last, batch 1"}


def test_pieces_fill_one_file(toy, options, tmp_path):
    rows = [table.Row("toy: a", 1.0, "ms"), table.Row("toy: b", 2.0, "ms")]
    table.publish(rows, True, tmp_path)
    table.publish([table.Row("AlexNet: a", 1.0, "times")], True, tmp_path)
    table.publish([table.Row("toy: a", 3.0, "ms")], True, tmp_path)
    written = json.loads((tmp_path / "survey_table2.json").read_text())["rows"]
    assert [(row["case"], row["value"]) for row in written] == [("AlexNet: a", 1.0), ("toy: b", 2.0), ("toy: a", 3.0)]


@pytest.mark.parametrize("way", ["speed", "accuracy"])
def test_the_callback_chooses_the_same_ranks(toy, chosen, way):
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    for rate in (2.0, 2.5, 6.0):
        factors = {} if way == ranks.DEFAULT else {"favor": way}
        done = compress(
            ranks.network("toy"),
            LowRank(compression_rate=rate, factors=factors, batches=[images]),
            example_inputs=images,
        )
        made = {edit.path: [edit.config["method"], *edit.config["ranks"]] for edit in journal_of(done)}
        assert made == chosen[f"{rate:g} {way}"]["ranks"]


def test_trial_networks_have_the_chosen_ranks(toy):
    dense = ranks.network("toy")
    found = ranks.factorized(dense, {"2": ["spatial_svd", 5]})
    assert isinstance(found[2], Factorized)
    assert found[2].ranks == (5,)
    assert not isinstance(dense[2], Factorized)


@pytest.mark.slow
def test_compiled_networks_are_measured_too(chosen, options):
    rows = {row.case: row for row in table.measure("compiled", "toy", chosen, options)}
    assert set(rows) == {
        f"toy: {what.format(layout)}"
        for layout in ("channels_last", "contiguous")
        for what in (
            "dense, {}, batch 1, compiled and frozen",
            f"{FIRST}, {{}}, batch 1, compiled and frozen",
            f"{FIRST}, {{}}, batch 1, compiled and frozen, speed-up",
        )
    }


@pytest.mark.slow
def test_whole_networks_are_decomposed_alone_and_beside_plain_calls():
    alone = {row.case: row for row in decomposition_time.measure("whole", quick=True)}
    beside = {row.case: row for row in decomposition_time.measure("beside", quick=True)}
    assert set(beside) < set(alone)
    for case, row in beside.items():
        assert row.value == alone[case].value  # measured once in a process
        assert 0 < row.ratio < 1.001
    assert decomposition_time.measure("whole", quick=True)[0].goal is None
