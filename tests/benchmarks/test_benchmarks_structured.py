"""The benchmark of structured pruning in miniature."""

import pytest
import torch

from benchmarks.structured_speed import MACS, THEIRS, speed_rows


@pytest.mark.slow
def test_both_sides_meet_the_same_operations() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = {row.case: row for row in speed_rows("ResNet-18", (1,), repeats=1, image=64)}
    finally:
        torch.set_num_threads(threads)
    for label in (THEIRS, "ours", "ours, multiples of 16"):
        assert rows[f"ResNet-18: {label}, operations"].ratio == pytest.approx(MACS, rel=0.05)
        assert rows[f"ResNet-18: {label}, operations"].ratio <= MACS
    assert rows["ResNet-18: dense, operations"].ratio == 1
    assert sum(row.goal is not None for row in rows.values()) == 1
