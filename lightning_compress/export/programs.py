"""The targets beside ONNX: OpenVINO, torch's own format, and the quantized operators of torchao and ExecuTorch."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from lightning_compress.core.copies import tensors_in
from lightning_compress.export.extras import require
from lightning_compress.export.onnx_program import HELP, reason_of, shapes_of, write_onnx
from lightning_compress.export.preparation import Prepared, outputs_of
from lightning_compress.export.projections import move_projections
from lightning_compress.export.result import Exported, ExportError
from lightning_compress.export.runtimes import open_openvino
from lightning_compress.export.verification import require_same
from lightning_compress.quantization.operators import decomposed_operators


def write_openvino(prepared: Prepared, path: Path, *, dynamic_batch: bool, verify: bool, int4: bool) -> Exported:
    """Write OpenVINO's own format: ``path`` and the weights beside it.

    Raises:
        ConfigurationError: If openvino or what ONNX needs is missing.
        ExportError: If the network cannot be traced or the file computes something else.
    """
    openvino = require("openvino", "openvino")
    moved = move_projections(prepared.module.model, ahead=True)
    if prepared.quantized:
        prepared.left.update(dict.fromkeys(moved, "OpenVINO has no LSTM with projections: its weights become float"))
    way = write_onnx(prepared, path.with_suffix(".onnx"), dynamic_batch=dynamic_batch, verify=False, int4=int4)
    converted = openvino.convert_model(str(way.path))
    openvino.save_model(converted, str(path), compress_to_fp16=False)
    way.path.unlink()
    difference = None
    if verify:
        results = run_openvino(path, prepared)
        difference = require_same(results, prepared, "OpenVINO")
    return Exported(path, "openvino", 0, way.opset, way.dynamic_batch, difference, way.left)


def run_openvino(path: Path, prepared: Prepared) -> list[Any]:
    """Return what OpenVINO computes for the example inputs, in float32 where it is not integers."""
    return open_openvino(path)(*prepared.inputs)


def write_torch(prepared: Prepared, path: Path, *, dynamic_batch: bool, verify: bool, int4: bool) -> Exported:
    """Write a ``torch.export`` program.

    Raises:
        ExportError: If the network cannot be traced or the file computes something else.
    """
    program, left = _export(prepared, dynamic_batch)
    return _save(program, prepared, path, "torch", verify, left)


def write_torchao(prepared: Prepared, path: Path, *, dynamic_batch: bool, verify: bool, int4: bool) -> Exported:
    """Write a ``torch.export`` program with the quantized operators that TorchInductor knows.

    Raises:
        ConfigurationError: If torchao is missing.
        ExportError: If the network cannot be traced or the file computes something else.
    """
    require("torchao.quantization.pt2e", "torchao")
    with decomposed_operators():
        program, left = _export(prepared, dynamic_batch)
    return _save(program, prepared, path, "torchao", verify, left)


def write_executorch(prepared: Prepared, path: Path, *, dynamic_batch: bool, verify: bool, int4: bool) -> Exported:
    """Write an ExecuTorch program for XNNPACK; its batch size is that of the example inputs.

    Raises:
        ConfigurationError: If executorch is missing.
        ExportError: If the network cannot be traced or lowered.
    """
    exir = require("executorch.exir", "executorch")
    partitioner = require("executorch.backends.xnnpack.partition.xnnpack_partitioner", "executorch")
    with decomposed_operators():
        program, left = _export(prepared, False)
    try:
        lowered = exir.to_edge_transform_and_lower(program, partitioner=[partitioner.XnnpackPartitioner()])
        path.write_bytes(lowered.to_executorch().buffer)
    except Exception as error:
        raise ExportError(f"ExecuTorch cannot lower the model: {reason_of(error)}") from error
    difference = None
    if verify:
        runtime = require("executorch.runtime", "executorch")
        method = runtime.Runtime.get().load_program(str(path)).load_method("forward")
        results = [value.numpy() for value in method.execute(list(tensors_in(prepared.inputs)))]
        difference = require_same(results, prepared, "ExecuTorch")
    return Exported(path, "executorch", 0, None, False, difference, left)


def _export(prepared: Prepared, dynamic_batch: bool) -> tuple[Any, dict[str, str]]:
    """Return the program, with a batch of any size if possible, and what had to be left."""
    left = dict(prepared.left)
    for shapes in ([shapes_of(prepared)] if dynamic_batch else []) + [None]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                program = torch.export.export(prepared.module, prepared.inputs, dynamic_shapes=shapes, strict=False)
            return program, left
        except Exception as error:
            reason = reason_of(error)
            left[""] = f"the batch size is fixed: {reason}"
    raise ExportError(f"the model cannot be exported: {reason}. {HELP}")


def _save(program: Any, prepared: Prepared, path: Path, target: str, verify: bool, left: dict[str, str]) -> Exported:
    torch.export.save(program, path)
    difference = None
    if verify:
        with torch.inference_mode():
            results = outputs_of(torch.export.load(path).module()(*prepared.inputs))
        difference = require_same(results, prepared, "torch")
    return Exported(path, target, 0, None, "" not in left, difference, left)
