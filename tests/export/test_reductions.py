"""Means, maxima and minima over dimensions between quantized layers, as runtimes compute them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from networks import calibrate, quantize, randomize
from torch import Tensor, nn

from lightning_compress.export import export

Reduction = Callable[[Tensor], Tensor]


class Reduced(nn.Module):
    """A convolution, something that reduces what it gives, and a Linear layer."""

    def __init__(self, reduce: Reduction, also: bool = False) -> None:
        super().__init__()
        self.conv, self.relu, self.also = nn.Conv2d(1, 4, 3, padding=1), nn.ReLU() if also else nn.Identity(), also
        self.reduce = reduce
        self.head = nn.Linear(reduce(torch.zeros(1, 4, 6, 6)).shape[-1], 3)

    def forward(self, x: Tensor) -> Any:
        reduced = self.reduce(self.relu(self.conv(x)).relu())
        return (reduced, self.head(reduced)) if self.also else self.head(reduced)


def built(reduce: Reduction, x: Tensor, also: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return calibrate(quantize(randomize(Reduced(reduce, also)).eval()), x)


def outputs(path: Path, x: Tensor) -> list[np.ndarray]:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"input": x.numpy()})


def test_a_mean_that_is_quantized_and_returned_keeps_its_shape(tmp_path) -> None:
    x = torch.randn(5, 1, 6, 6)
    model = built(lambda y: y.mean((2, 3)), x, also=True)
    made = export(model, tmp_path / "net", example_inputs=x[:2])
    with torch.no_grad():
        expected = model(x)
    for mine, theirs in zip(outputs(made.path, x), expected, strict=True):
        assert mine.shape == theirs.shape
        assert np.abs(mine - theirs.numpy()).max() < 0.05 * theirs.std()


@pytest.mark.parametrize(
    "reduce",
    [
        lambda y: y.amax((2, 3)),
        lambda y: torch.cat([y.flatten(2).max(-1).values, y.mean((2, 3))], 1),
        pytest.param(lambda y: (-y).flatten(2).transpose(1, 2).amin(1), marks=pytest.mark.slow),
    ],
)
def test_extremes_are_taken_of_quantized_values(reduce: Reduction, tmp_path) -> None:
    """OpenVINO computes a maximum wrongly when only the quantizer behind it is there."""
    x = torch.randn(5, 1, 6, 6)
    model = built(reduce, x)
    made = export(model, tmp_path / "net", example_inputs=x[:2])
    made_by = {name: node for node in onnx.load(made.path).graph.node for name in node.output}
    extremes = [node for node in made_by.values() if node.op_type in ("ReduceMax", "ReduceMin")]
    for node in extremes:
        while node.op_type in ("ReduceMax", "ReduceMin", "Reshape", "Transpose", "Neg"):
            node = made_by[node.input[0]]
        assert node.op_type == "DequantizeLinear"
    assert extremes
    with torch.no_grad():
        assert np.abs(outputs(made.path, x)[0] - model(x).numpy()).max() < 0.05 * model(x).std()


@pytest.mark.slow
def test_extremes_in_openvino(tmp_path) -> None:
    pytest.importorskip("openvino")
    x = torch.randn(5, 1, 6, 6)
    model = built(lambda y: torch.cat([y.amax((2, 3)), y.mean((2, 3))], 1), x)
    assert export(model, tmp_path / "net", "openvino", example_inputs=x).difference < 1e-3
