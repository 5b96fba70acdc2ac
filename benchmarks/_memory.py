"""Resident memory of one fit, measured in a process of its own: ``python -m benchmarks._memory CASE WIDTH STEPS``."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from benchmarks._fits import CASES, deep, fit

_STATUS = Path("/proc/self/status")
_LAYERS = 10


def resident() -> tuple[int, int]:
    """Return resident and highest resident bytes of this process; only the highest is known outside Linux."""
    if _STATUS.exists():
        fields = dict(line.split(":", 1) for line in _STATUS.read_text(encoding="utf-8").splitlines() if ":" in line)
        return int(fields["VmRSS"].split()[0]) * 1024, int(fields["VmHWM"].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return highest, highest


class Watch(Callback):
    """Notes the resident bytes after each batch and after the fit, while optimizer and Trainer are still alive."""

    training = after = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Note them."""
        self.training = resident()[0]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note them."""
        self.after = resident()[0]


def measure_fit(case: str, width: int, steps: int) -> dict[str, int]:
    """Return how many bytes the process grew by: during training, after the fit, and at its peak."""
    fresh = subprocess.run(
        [sys.executable, "-m", "benchmarks._memory", str(CASES.index(case)), str(width), str(steps)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
    )
    if fresh.returncode:
        raise RuntimeError(f"the fit of {case!r} failed:\n{fresh.stderr}")
    grown: dict[str, int] = json.loads(fresh.stdout.splitlines()[-1])
    return grown


def main() -> None:
    """Run one fit and print its memory as JSON."""
    case, width, steps = CASES[int(sys.argv[1])], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    fit(CASES[0], deep(16, 2), (4, 16), 2, Callback())
    start, watch = resident()[0], Watch()
    fit(case, deep(width, _LAYERS), (32, width), steps, watch)
    peak = resident()[1]
    print(json.dumps({"training": watch.training - start, "after": watch.after - start, "peak": peak - start}))


if __name__ == "__main__":
    main()
