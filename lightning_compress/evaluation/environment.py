"""What measured figures depend on: versions, platform, processor, threads."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

import lightning_compress


def describe_environment() -> dict[str, Any]:
    """Return what the figures depend on: versions, platform, processor, threads."""
    return {
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "lightning_compress": lightning_compress.__version__,
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
