"""In which operators a quantizer writes itself down while a network is exported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_DECOMPOSED: ContextVar[bool] = ContextVar("decomposed", default=False)


@contextmanager
def decomposed_operators() -> Iterator[None]:
    """Let integer layers and fixed quantizers call torch's ``quantized_decomposed`` operators.

    TorchInductor and ExecuTorch look for these. A library that registers them (torchao, executorch) must have been
    imported.
    """
    token = _DECOMPOSED.set(True)
    try:
        yield
    finally:
        _DECOMPOSED.reset(token)


def written_as() -> str:
    """Return how quantization is written down now: ``"onnx"``, ``"decomposed"``, or ``""`` for plain arithmetic."""
    if torch.onnx.is_in_onnx_export():
        return "onnx"
    return "decomposed" if _DECOMPOSED.get() else ""


def quantize_in_onnx(x: Tensor, scale: Tensor, zero_point: Tensor, bounds: tuple[int, int]) -> Tensor:
    """Return the ONNX nodes that round ``x`` to a grid.

    Args:
        x: Any shape.
        scale: float32, of shape ().
        zero_point: int8 or uint8, of shape ().
        bounds: Least and greatest integer; where they are not those of the type, a Clip keeps to them.
    """
    limits = torch.iinfo(zero_point.dtype)
    real = x.float()
    if bounds != (limits.min, limits.max):
        zero = zero_point.to(scale.dtype)
        real = torch.minimum(torch.maximum(real, (bounds[0] - zero) * scale), (bounds[1] - zero) * scale)
    symbolic = torch.onnx.ops.symbolic
    q = symbolic("QuantizeLinear", (real, scale, zero_point), dtype=zero_point.dtype, shape=x.shape)
    restored: Tensor = symbolic("DequantizeLinear", (q, scale, zero_point), dtype=torch.float32, shape=x.shape)
    return restored.to(x.dtype)


def dequantize_in_onnx(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    """Return the ONNX node that reads an integer weight.

    Args:
        q: int8 or uint8, of any shape.
        scale: float32; one value for each index along ``axis``, or of shape ().
        zero_point: Of the type of ``q`` and the shape of ``scale``.
        axis: Dimension of ``q`` with a scale for each index; ``None`` for one scale.
    """
    attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
    real: Tensor = torch.onnx.ops.symbolic(
        "DequantizeLinear", (q, scale, zero_point), attributes, dtype=torch.float32, shape=q.shape
    )
    return real


def quantize_decomposed(
    x: Tensor, scale: float, zero_point: int, bounds: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """Return ``x`` on a grid through torch's ``quantized_decomposed`` operators."""
    operators = torch.ops.quantized_decomposed
    q = operators.quantize_per_tensor.default(x.float(), scale, zero_point, *bounds, dtype)
    real: Tensor = operators.dequantize_per_tensor.default(q, scale, zero_point, *bounds, dtype)
    return real.to(x.dtype)


def dequantize_decomposed(
    q: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, bounds: tuple[int, int]
) -> Tensor:
    """Return an integer weight as real numbers through torch's ``quantized_decomposed`` operators."""
    operators = torch.ops.quantized_decomposed
    if axis is None:
        axis, scale, zero_point = 0, scale.expand(q.shape[0]), zero_point.expand(q.shape[0])
    real: Tensor = operators.dequantize_per_channel.default(q, scale, zero_point, axis, *bounds, q.dtype)
    return real
