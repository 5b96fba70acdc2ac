"""Two processes that read different calibration batches prune the same weights to the same values."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.slow
def test_the_first_process_decides(tmp_path: Path) -> None:
    script = Path(__file__).with_name("ddp_calibration_script.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first.keys() == {"layer", "global", "2:4", "fisher"}
    for name, state in first.items():
        assert all(torch.equal(value, second[name][key]) for key, value in state.items()), name
        hidden = [state["net.1.weight"], state["net.3.weight"]]
        assert sum(int((weight == 0).sum()) for weight in hidden) == sum(weight.numel() for weight in hidden) // 2
    assert not torch.equal(first["layer"]["net.1.weight"], first["2:4"]["net.1.weight"])
