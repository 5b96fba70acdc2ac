"""Exported files in the runtimes they were written for, as functions of tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_compress.core.copies import tensors_in
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.export.extras import require
from lightning_compress.export.result import Exported

Run = Callable[..., list[Any]]
"""Takes a network's inputs, in any nesting, and returns its outputs as arrays."""


def open_exported(made: Exported, threads: int = 1) -> Run:
    """Return an exported file as a function, in the runtime that it was written for.

    Args:
        made: What :func:`~lightning_compress.export.export` returned, for the target ``"onnx"`` or ``"openvino"``.
        threads: Of the processor.

    Returns:
        A function of the network's inputs that returns a list of arrays.

    Raises:
        ConfigurationError: For another target, or if the runtime is not installed.
    """
    if made.target not in RUNTIMES:
        raise ConfigurationError(
            f"`made` is for the target {made.target!r}; what can be run from here is {', '.join(RUNTIMES)}"
        )
    return RUNTIMES[made.target][1](made.path, threads)


def open_onnx(path: Path, threads: int = 1) -> Run:
    """Return an ONNX file as onnxruntime runs it on the processor."""
    runtime: Any = require("onnxruntime", "onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]

    def run(*inputs: Any, **named: Any) -> list[Any]:
        arrays = [_array(tensor) for tensor in tensors_in((inputs, named))]
        result: list[Any] = session.run(None, dict(zip(names, arrays, strict=True)))
        return result

    return run


def open_openvino(path: Path, threads: int = 1) -> Run:
    """Return OpenVINO's own format as OpenVINO runs it, in float32 where it is not integers."""
    openvino = require("openvino", "openvino")
    options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(path), "CPU", options)
    request = compiled.create_infer_request()

    def run(*inputs: Any, **named: Any) -> list[Any]:
        results = request.infer(dict(enumerate(_array(tensor) for tensor in tensors_in((inputs, named)))))
        return [results[output].copy() for output in compiled.outputs]

    return run


def _array(tensor: Tensor) -> Any:
    return tensor.detach().cpu().numpy()


RUNTIMES: dict[str, tuple[str, Callable[[Path, int], Run]]] = {
    "onnx": ("onnxruntime", open_onnx),
    "openvino": ("OpenVINO", open_openvino),
}
"""For each target that can be run from here, the runtime's name and what opens a file in it."""
