"""Two processes over gloo on the CPU decide the same, and resume exactly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_rows import ROWS, Row


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ddp")
    worker = Path(__file__).with_name("ddp_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(worker), str(folder)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_both_ranks_hold_the_same_and_resume_exactly(row: Row, ranks: list[dict[str, Any]]) -> None:
    first, second = (rank[row.name] for rank in ranks)
    for run in ("whole", "resumed"):
        assert _same(first[run], second[run])
    assert _same(first["whole"], first["resumed"])


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    tensors = all(
        a[part].keys() == b[part].keys() and all(torch.equal(a[part][key], b[part][key]) for key in a[part])
        for part in ("state", "callback")
    )
    return tensors and a["history"] == b["history"]
