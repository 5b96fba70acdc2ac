"""A command that is killed between two batches, as several tests of resume need it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

KILLER = """
import os, signal
from pathlib import Path
from lightning.pytorch import Callback


class Killer(Callback):
    '''Kill this process after some batch of the process, once; the victim's name holds the number of that batch.'''

    batches = 0

    def on_train_batch_end(self, *_):
        Killer.batches += 1
        victim = Path("victim")
        if victim.exists() and Killer.batches == int(victim.read_text()):
            victim.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
"""
"""Source of a module `killer`, to be written beside the configuration of a run."""


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-m", "lightning_compress", *words]
    return subprocess.run(call, cwd=folder, env=environment, text=True, capture_output=True)
