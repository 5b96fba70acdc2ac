"""The benchmarks of distillation in miniature."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import _students as students
from benchmarks import distillation_overhead as overhead
from benchmarks._turns import time_in_turns
from lightning_compress.data import DigitsDataModule
from lightning_compress.models import DigitsCNN


def tiny():
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))


def test_rows_compare_each_way_with_what_it_must_beat():
    errors = {"teacher": [1.0], "alone": [2.0, 4.0], "taught": [1.0, 2.0]}
    rows = {row.case: row for row in students.rows_of(errors, {"taught": "alone"})}
    assert rows["test error, alone"].value == 3.0
    assert rows["test error, alone"].goal is None
    taught = rows["test error, taught"]
    assert (taught.value, taught.against, taught.ratio, taught.goal, taught.met) == (1.5, "alone", 0.5, 3.0, True)
    assert rows["taught: gain over alone"].value == 1.5
    assert rows["taught: the larger spread of seeds, of it and alone"].value == pytest.approx(2**0.5, abs=1e-3)
    assert rows["test error, alone, seed 2"].value == 4.0
    assert "test error, teacher: spread of seeds" not in rows


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_a_student_is_trained_for_its_batches_and_tested():
    data = DigitsDataModule(batch_size=50)
    loader, net = data.train_dataloader(), DigitsCNN(width=8)
    module = students.classifier(net, torch.optim.Adam, peak=1e-2, steps=40)
    before = students.test_error(net, data.test_dataloader())
    students.fit(module, loader, epochs=2, batches=20)
    assert module.trainer.global_step == 40
    assert module.optimizers().param_groups[0]["lr"] < 1e-4
    assert students.test_error(net, data.test_dataloader()) < before - 30


def test_overhead_rows_judge_processor_time_against_the_least_possible():
    one = np.ones(5)
    times = {overhead.ALONE: one, overhead.FORWARD: 2 * one, overhead.LIVE: 3.3 * one, overhead.CACHED: 1.02 * one}
    rows = overhead.rows_of("x", {case: (time, time) for case, time in times.items()})
    judged = {row.case: row for row in rows if row.goal is not None}
    live, cached = judged.values()
    assert all("processor time" in case for case in judged)
    assert (live.value, live.against, live.met) == (
        pytest.approx(1.1),
        "student alone + forward pass of the teacher",
        False,
    )
    assert (cached.value, cached.against, cached.met) == (pytest.approx(1.02), "student alone", True)


@pytest.mark.slow
def test_every_case_of_the_overhead_is_timed():
    fits = {case: partial(overhead.timed, case, tiny, tiny) for case in overhead.CASES}
    times = time_in_turns(fits, rounds=1, burst=3)
    assert set(times) == set(overhead.CASES)
    assert all((wall > 0).all() and (cpu > 0).all() for wall, cpu in times.values())
