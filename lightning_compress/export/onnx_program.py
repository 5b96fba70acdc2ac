"""The target ``onnx``: operators that every runtime has, quantized ones as QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.core.isolation import batch_size_of
from lightning_compress.export.extras import require
from lightning_compress.export.onnx_graph import finish
from lightning_compress.export.preparation import Prepared
from lightning_compress.export.projections import move_projections
from lightning_compress.export.result import Exported, ExportError
from lightning_compress.export.runtimes import open_onnx
from lightning_compress.export.verification import require_same

OPSET = 20
"""Version of the operators; 21 where 4-bit integers are stored."""
_PROTOBUF_LIMIT = 2**31 - 2**24


def write_onnx(prepared: Prepared, path: Path, *, dynamic_batch: bool, verify: bool, int4: bool) -> Exported:
    """Write ``prepared`` as one ONNX file, check it with onnx, and run it with onnxruntime.

    Args:
        prepared: The network.
        path: The file.
        dynamic_batch: Whether the first dimension of each input may change.
        verify: Whether to run it.
        int4: Whether weights that 4 bits can hold are stored in 4 bits (opset 21).

    Raises:
        ConfigurationError: If onnx, onnxscript or onnxruntime is missing.
        ExportError: If the network cannot be traced or the file computes something else.
    """
    onnx = require("onnx", "onnx")
    require("onnxscript", "onnx")
    opset = OPSET + 1 if int4 else OPSET
    move_projections(prepared.module)
    left = dict(prepared.left)
    shapes = shapes_of(prepared) if dynamic_batch else None
    program, reason = _try(prepared, opset, shapes)
    if program is None and shapes is not None:
        left[""] = f"the batch size is fixed: {reason}"
        shapes = None
        program, reason = _try(prepared, opset, None)
    if program is None:
        raise ExportError(f"the model cannot be exported: {reason}. {HELP}")
    dynamic = shapes is not None and _any_batch(program.model)
    if dynamic_batch and not dynamic:
        left.setdefault("", f"the batch size is fixed: {type(prepared.module.model).__name__} computes with that one")
    finish(program.model, int4)
    size = sum(tensor.numel() * tensor.element_size() for tensor in prepared.module.state_dict().values())
    program.save(str(path), external_data=size > _PROTOBUF_LIMIT)
    onnx.checker.check_model(str(path))
    difference = None
    if verify:
        difference = require_same(run_onnx(path, prepared), prepared, "onnxruntime")
    return Exported(path, "onnx", path.stat().st_size, opset, dynamic, difference, left)


HELP = (
    "Its forward must be traceable by torch.export: no branches on values of tensors, no numpy. The weights alone can "
    "still be quantized and saved with save_compressed"
)
"""What to do about a network that cannot be traced."""


def run_onnx(path: Path, prepared: Prepared) -> list[Any]:
    """Return what onnxruntime computes for the example inputs."""
    return open_onnx(path)(*prepared.inputs)


def _any_batch(model: Any) -> bool:
    """Return whether the first dimension of some input is not a number."""
    shapes = [value.shape for value in model.graph.inputs if value.shape is not None and len(value.shape)]
    return any(not isinstance(shape[0], int) for shape in shapes)


class Together(nn.Module):
    """A network whose positional arguments come as one tuple.

    Args:
        model: The network.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: tuple[Any, ...]) -> Any:
        """Return the network's output."""
        return self.model(*inputs)


def _try(prepared: Prepared, opset: int, shapes: Any) -> tuple[Any, str]:
    """Return the exported program, or why there is none."""
    module: nn.Module = prepared.module
    inputs = prepared.inputs
    if isinstance(inputs[-1], Mapping):  # a last one that is a mapping is taken for keywords
        module, inputs = Together(module), (inputs,)
    try:
        with _quietly():
            program = torch.onnx.export(
                module,
                inputs,
                dynamo=True,
                external_data=False,
                opset_version=opset,
                input_names=list(prepared.names),
                dynamic_shapes=shapes,
                verbose=False,
            )
    except Exception as error:  # torch raises many types here
        return None, reason_of(error)
    return program, ""


def reason_of(error: BaseException) -> str:
    """Return the first line of the innermost cause, which names the operation."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]


def shapes_of(prepared: Prepared) -> Any:
    """Return which dimensions may change: the first of each input that is as long as the batch."""
    batch = batch_size_of(prepared.inputs)
    dimension = torch.export.Dim("batch")

    def of(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {0: dimension} if value.dim() and value.shape[0] == batch else {}
        if isinstance(value, tuple | list):
            return type(value)(map(of, value))
        return {key: of(item) for key, item in value.items()} if isinstance(value, dict) else None

    return (tuple(map(of, prepared.inputs)),)  # of the one argument `*inputs`


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep the exporter's progress and its hints from the user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
