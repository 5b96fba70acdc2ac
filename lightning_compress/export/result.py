"""What an export gives, and how it fails."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lightning_compress.core.errors import CompressionError


class ExportError(CompressionError, RuntimeError):
    """A network cannot be written for a runtime, or the runtime computes something else."""


@dataclass(frozen=True)
class Exported:
    """A network on disk.

    Args:
        path: The file; OpenVINO keeps its weights beside it.
        target: What it is for.
        bytes: Size on disk, everything included.
        opset: Version of the ONNX operators, for ONNX and OpenVINO.
        dynamic_batch: Whether any number of samples may be given at once.
        difference: Root mean square of what the runtime computes differently on the example inputs, as a share of that
            of the outputs; ``None`` if it was not run.
        left: What stays float in a quantized network, by path, and why; why something asked for was not possible.
    """

    path: Path
    target: str
    bytes: int
    opset: int | None = None
    dynamic_batch: bool = False
    difference: float | None = None
    left: Mapping[str, str] = field(default_factory=dict)
