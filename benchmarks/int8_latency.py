"""Latency of int8 networks: train, quantize while training, make integers, export, run; beside other quantizers.

ResNet-18 and MobileNetV2 at 224 x 224, batch 1, one thread, random weights and images (latency does not depend on
them). onnxruntime and OpenVINO run the same exported file; ``quantize_static`` of onnxruntime and NNCF get the float
file of the same network. OpenVINO computes in float32 where it is not integers, and gets each network with its batch
fixed to 1, as its guide advises. All are timed in turns in one process; each runtime is compared with itself only.
A network runs nine times in its turn and the last counts, as where one network serves request after request: times
fall for about eight calls. Rows "between others" have single calls, which find the caches full of the other five
networks' weights. OpenVINO's input tensor is filled once, as its own ``benchmark_app`` does: passing an array to each
call would time a copy of it, too, which onnxruntime does not make.

    python -m benchmarks.int8_latency [--quick]
"""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import torchvision.models as zoo
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks._common import Row, Times, arguments, environment, publish, ratio_of_medians, time_calls
from lightning_compress import QuantizationAwareTraining, convert, export
from lightning_compress.models import ImageClassifier

GOALS = {"resnet18": (3.2, 3.4), "mobilenet_v2": (2.0, 2.3)}
"""How many times faster int8 should be than float32: in onnxruntime, in OpenVINO."""
SIZE = 224


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def trained(name: str, steps: int) -> tuple[nn.Module, nn.Module]:
    """Return a network after a few steps of training, in float, and after a few more with quantization, in integers."""
    torch.manual_seed(0)
    module = ImageClassifier(getattr(zoo, name)(weights=None), partial(torch.optim.SGD, lr=1e-3), num_classes=1000)
    data = DataLoader(TensorDataset(images(4 * steps), torch.arange(4 * steps)), batch_size=4)
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    quiet |= {"accelerator": "cpu", "enable_model_summary": False, "max_epochs": 1, "num_sanity_val_steps": 0}
    Trainer(**quiet).fit(module, data)
    plain = ImageClassifier(getattr(zoo, name)(weights=None), num_classes=1000)
    plain.load_state_dict(module.state_dict())
    callback = QuantizationAwareTraining(start={"step": 1}, freeze={"ranges": "80%", "batch_norm": "80%"})
    Trainer(**quiet, callbacks=[callback]).fit(module, data)
    return plain.eval().net, convert(module, images(2)).net


def onnxruntime_call(path: Path, x: np.ndarray[Any, Any]) -> Callable[[], object]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return partial(session.run, None, {session.get_inputs()[0].name: x})


def openvino_call(model: Any, x: np.ndarray[Any, Any]) -> Callable[[], object]:
    import openvino

    core, options = openvino.Core(), {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    read = core.read_model(model) if isinstance(model, str) else model
    read.reshape(list(x.shape))
    request = core.compile_model(read, "CPU", options).create_infer_request()
    request.get_input_tensor().data[:] = x
    return request.infer


def quantize_static(plain: Path, folder: Path) -> Path:
    """Return what onnxruntime's own quantizer makes of a float file: unsigned activations, a scale for each channel."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[Any] = iter([{"input": images(1, seed).numpy()} for seed in range(8)])

        def get_next(self) -> Any:
            return next(self.batches, None)

    before, after = folder / "preprocessed.onnx", folder / "static.onnx"
    quant_pre_process(str(plain), str(before))
    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(str(before), str(after), Reader(), QuantFormat.QDQ, per_channel=True, **types)
    return after


def nncf_model(plain: Path) -> Any:
    import nncf
    import openvino

    return nncf.quantize(
        openvino.convert_model(str(plain)), nncf.Dataset([images(1, seed).numpy() for seed in range(8)])
    )


def calls_of(name: str, steps: int, folder: Path) -> tuple[dict[str, Callable[[], object]], dict[str, int]]:
    """Return what is timed, by name, and the sizes of our files."""
    plain, integers = trained(name, steps)
    x = images(1, 99).numpy()
    wide = export(plain, folder / "float32.onnx", example_inputs=images(2))
    small = export(integers, folder / "int8.onnx", example_inputs=images(2))
    onnx.checker.check_model(str(small.path))
    calls = {
        "onnxruntime float32": onnxruntime_call(wide.path, x),
        "onnxruntime int8": onnxruntime_call(small.path, x),
        "onnxruntime quantize_static": onnxruntime_call(quantize_static(wide.path, folder), x),
        "OpenVINO float32": openvino_call(str(wide.path), x),
        "OpenVINO int8": openvino_call(str(small.path), x),
        "OpenVINO NNCF": openvino_call(nncf_model(wide.path), x),
    }
    return calls, {"float32": wide.bytes, "int8": small.bytes}


def rows_of(name: str, steps: int, rounds: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        calls, sizes = calls_of(name, steps, Path(folder))
        for _ in range(10):
            for call in calls.values():
                call()
        in_a_row, between = (time_calls(calls, rounds, before=before) for before in (8, 0))
    rows = [*compared(name, in_a_row, GOALS[name]), *compared(f"{name} between others", between, (None, None))]
    rows.append(Row(f"{name}, file", sizes["int8"], "bytes", "float32 file", sizes["float32"] / sizes["int8"]))
    return rows


def compared(name: str, times: Mapping[str, tuple[Times, Times]], goals: Sequence[float | None]) -> list[Row]:
    """Return a row for each network, and the shares of other networks' times that ours take; judged if there are goals.

    Args:
        name: What the rows begin with.
        times: Wall and processor seconds by case.
        goals: How many times faster than float32: in onnxruntime, in OpenVINO.
    """
    rows = [Row(f"{name}, {case}", float(1e3 * np.median(wall)), "ms") for case, (wall, _) in times.items()]
    for runtime, other, goal in zip(("onnxruntime", "OpenVINO"), ("quantize_static", "NNCF"), goals, strict=True):
        mine = times[f"{runtime} int8"][0]
        for against, limit in (("float32", goal and 1 / goal), (other, goal and 1.0)):
            ratio = ratio_of_medians(mine, times[f"{runtime} {against}"][0])
            case = f"{name}, {runtime} int8, share of the time of {against} ({ratio.low:.3f} to {ratio.high:.3f})"
            rows.append(Row(case, ratio.value, "x", f"{runtime} {against}", 1 / ratio.value, limit))
    return rows


def main() -> None:
    given = arguments(__doc__)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warnings.simplefilter("ignore")
    for logger in ("lightning.pytorch", "nncf", "torch.onnx", "root"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    names = ["mobilenet_v2"] if given.quick else list(GOALS)
    rows = [row for name in names for row in rows_of(name, 2 if given.quick else 6, 20 if given.quick else 150)]
    versions = {name: version(name) for name in ("onnx", "onnxruntime", "openvino", "nncf")}
    publish("int8_latency", rows, environment(quick=given.quick, threads=1, **versions), given.out)


if __name__ == "__main__":
    main()
