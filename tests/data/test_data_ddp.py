"""Exact resume in two gloo processes, started the way a user would: with torchrun."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("ddp_resume_script.py")


@pytest.mark.slow
def test_resume_is_exact_on_both_ranks(tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": str(SCRIPT.parents[2]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    found = subprocess.run(
        [*command, str(SCRIPT), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stderr[-3000:]
    assert {path.name for path in tmp_path.glob("done-*")} == {"done-0", "done-1"}
