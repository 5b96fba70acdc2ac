"""The benchmark of structured pruning in miniature."""

from collections.abc import Iterator

import pytest
import torch

from benchmarks.structured_speed import MACS, OURS, ROUNDED, THEIRS, latency_rows, speed_rows


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_both_sides_meet_the_same_operations(one_thread: None) -> None:
    rows = {row.case: row for row in speed_rows("ResNet-18", {1: 1}, image=64)}
    for label in (THEIRS, OURS, ROUNDED):
        assert rows[f"ResNet-18: {label}, operations"].ratio == pytest.approx(MACS, rel=0.05)
        assert rows[f"ResNet-18: {label}, operations"].ratio <= MACS
    assert rows["ResNet-18: dense, operations"].ratio == 1
    goals = {case for case, row in rows.items() if row.goal is not None}
    assert goals == {
        "ResNet-18: ours, parameters",
        "ResNet-18: ours, channels_last, batch 1",
        "ResNet-18: ours, multiples of 16, channels_last, batch 1",
        *(
            f"ResNet-18: {label} over {THEIRS}, {layout}, batch 1"
            for label in (OURS, ROUNDED)
            for layout in ("contiguous_format", "channels_last")
        ),
    }


@pytest.mark.slow
def test_a_latency_goal_says_what_it_left(one_thread: None) -> None:
    time_row, operations = latency_rows(image=64, seconds=3.0)
    assert "multiples of" in time_row.case
    assert 0 < operations.ratio < 1
    assert time_row.ratio < 0.8
