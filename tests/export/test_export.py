"""Exported files against the network they were made of: run by onnxruntime, read by onnx."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from lightning.pytorch import LightningModule
from networks import Audio, Branching, Functional, Residual, Small, Words, calibrate, quantize, randomize
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from lightning_compress import ConfigurationError, IterativePruning, PostTrainingQuantization, compress
from lightning_compress.export import Exported, ExportError, export, onnx_program, verification
from lightning_compress.export.preparation import outputs_of, prepare
from lightning_compress.export.projections import move_projections
from lightning_compress.export.verification import rounding_noise
from lightning_compress.models.resnet import CifarResNet
from lightning_compress.quantization import convert


class Tiny(nn.Module):
    """A residual block, a pool, a Linear layer; small, since every export takes a second or two."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.block = Residual(4)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.block(self.stem(x))).flatten(1))


def quantized(weights: int = 8, activations: int = 8, net: type[nn.Module] = Tiny) -> nn.Module:
    torch.manual_seed(0)
    model = randomize(net()).eval()
    quantize(model, weights, activations)
    return calibrate(model, images(8))


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[nn.Module, Exported]:
    """A quantized network and its file."""
    model = quantized()
    return model, export(model, tmp_path_factory.mktemp("export") / "net.onnx", example_inputs=images(2))


def images(count: int, size: int = 8) -> Tensor:
    return torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(count))


def run(path: Any, *inputs: Tensor) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)})


def same(got: np.ndarray, expected: Tensor, tolerance: float = 0.05) -> bool:
    error = np.sqrt(np.mean((got - expected.detach().numpy()) ** 2))
    return bool(error <= tolerance * float(expected.detach().square().mean().sqrt()))


def test_a_float_network_with_any_batch_size(tmp_path) -> None:
    model = randomize(Tiny()).eval()
    made = export(model, tmp_path / "deep" / "net", example_inputs=images(1))
    assert made.path == tmp_path / "deep" / "net.onnx"
    assert made == Exported(made.path, "onnx", made.path.stat().st_size, 20, True, made.difference, {})
    assert made.difference < 1e-5
    onnx.checker.check_model(str(made.path))
    with torch.no_grad():
        assert same(run(made.path, images(5))[0], model(images(5)), 1e-5)
    assert [path.name for path in made.path.parent.iterdir()] == ["net.onnx"]


def test_a_quantized_network_has_its_integers_on_disk(written) -> None:
    model, made = written
    graph = onnx.load(made.path).graph
    sizes = {onnx.TensorProto.INT8: 0, onnx.TensorProto.FLOAT: 0}
    for item in graph.initializer:
        sizes[item.data_type] = sizes.get(item.data_type, 0) + int(np.prod(item.dims))
    weights = sum(p.numel() for p in Tiny().parameters() if p.dim() > 1)
    assert sizes[onnx.TensorProto.INT8] >= weights
    assert sizes[onnx.TensorProto.FLOAT] < 60  # scales and biases
    with torch.no_grad():
        for count in (1, 7):
            assert same(run(made.path, images(count))[0], model(images(count)))
    kinds = [node.op_type for node in graph.node]
    assert "BatchNormalization" not in kinds
    assert kinds.count("QuantizeLinear") == 7
    assert made.left == {}


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(),
        nn.Linear(256, 256),
    )  # fmt: skip


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.ConvTranspose2d(16, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize(
    ("net", "shape"), [(perceptron, (64, 256)), (convolutional, (16, 1, 8, 8))], ids=["linear", "convolutional"]
)
def test_networks_of_few_bits_are_the_same_in_onnxruntime_and_by_the_definition_of_the_operators(
    net: Any, shape: tuple[int, ...], bits: int, tmp_path
) -> None:
    torch.manual_seed(0)
    x, model = torch.randn(shape), net().eval()
    calibrate(quantize(model, bits, bits), x)
    with torch.no_grad():
        expected = model(x)
    made = export(model, tmp_path / "net", example_inputs=x)
    by_definition = ReferenceEvaluator(str(made.path)).run(None, {"input": x.numpy()})[0]
    assert same(by_definition, expected, 1e-4)  # biases in steps of the products' scale: 0.07 to 0.1
    assert same(run(made.path, x)[0], expected, 1e-4)


@pytest.mark.parametrize(("bits", "kept"), [(4, True), (8, False)])
def test_biases_stay_float_where_their_integers_would_be_coarse(bits: int, kept: bool, tmp_path) -> None:
    torch.manual_seed(0)
    x, model = torch.randn(64, 3), nn.Sequential(nn.Linear(3, 4))
    calibrate(quantize(model, bits, bits), x)
    with torch.no_grad():
        quantizer = model[0].input_quantizer
        model[0].bias.copy_(0.5 * quantizer.scale * model[0].weight_quantizer.scale.flatten())  # half of a step
        expected = model(x)
    made = export(model, tmp_path / "net", example_inputs=x)
    kinds = [item.data_type for item in onnx.load(made.path).graph.initializer]
    assert (onnx.TensorProto.INT32 not in kinds) == kept
    assert same(run(made.path, x)[0], expected, 1e-5 if kept else 0.01)


def test_the_model_itself_is_not_changed(written, tmp_path) -> None:
    model, made = written
    before = copy.deepcopy(model.state_dict())
    again = export(convert(model), tmp_path / "again.onnx", example_inputs=images(2))
    assert again.bytes == made.bytes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def fused(path: Any, folder: Any) -> list[str]:
    """Return the operators that onnxruntime really runs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "fused.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "fused.onnx").graph.node]


def test_runtimes_fuse_whole_blocks(written, tmp_path) -> None:
    kinds = fused(written[1].path, tmp_path)
    assert [kinds.count(kind) for kind in ("QLinearConv", "QLinearAdd", "QGemm")] == [3, 1, 1]
    assert not {"Conv", "Add", "Gemm", "MatMul"} & set(kinds)


def test_shortcuts_that_subsample_and_pad_are_fused_too(tmp_path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    model = calibrate(quantize(randomize(CifarResNet(8)).eval()), x)
    kinds = fused(export(model, tmp_path / "net", example_inputs=x).path, tmp_path)
    assert [kinds.count(kind) for kind in ("QLinearConv", "QLinearAdd", "QGemm", "Pad")] == [7, 3, 1, 2]
    assert not {"Conv", "Add", "Gemm", "MatMul"} & set(kinds)


def test_networks_whose_relus_are_functions_are_fused_too(tmp_path) -> None:
    torch.manual_seed(0)
    x = images(4, 16)
    model = calibrate(quantize(randomize(Functional()).eval()), x)
    kinds = fused(export(model, tmp_path / "net", example_inputs=x).path, tmp_path)
    assert [kinds.count(kind) for kind in ("QLinearConv", "QLinearAdd", "QGemm")] == [8, 3, 1]
    assert not {"Conv", "FusedConv", "Add", "Relu", "Gemm", "DequantizeLinear"} & set(kinds)


class Averaged(nn.Module):
    """A convolution whose outputs are averaged over some of their dimensions, and a Linear layer."""

    def __init__(self, dims: int, over: tuple[int, ...], keep: bool) -> None:
        super().__init__()
        self.block = nn.Sequential((nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](1, 4, 3, padding=1), nn.ReLU())
        self.over, self.keep = over, keep
        self.head = nn.Linear(4 if 1 not in over else 6 ** (dims - 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x).mean(self.over, keepdim=self.keep).flatten(1))


@pytest.mark.parametrize(
    ("dims", "over", "keep", "pooled"),
    [
        (1, (-1,), False, True),
        (2, (3, 2), False, True),
        (2, (-1, -2), True, True),
        (3, (2, 3, 4), False, True),
        (2, (1, 3), False, False),
    ],
)
def test_means_over_all_positions_are_pools_of_integers(
    dims: int, over: tuple[int, ...], keep: bool, pooled: bool, tmp_path
) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 1, *[6] * dims)
    model = calibrate(quantize(randomize(Averaged(dims, over, keep)).eval()), x)
    path = export(model, tmp_path / "net", example_inputs=x[:2]).path
    kinds = fused(path, tmp_path)
    assert kinds.count("QLinearGlobalAveragePool") == pooled
    assert kinds.count("ReduceMean") == (not pooled)
    assert kinds.count("QGemm") == 1
    with torch.no_grad():
        assert same(run(path, x)[0], model(x))


@pytest.mark.parametrize("bits", [4, pytest.param(2, marks=pytest.mark.slow)])
def test_few_bits(bits: int, tmp_path) -> None:
    model = quantized(bits, 4)  # activations of four bits are clipped
    made = export(model, tmp_path / "net.onnx", example_inputs=images(2))
    stored = export(model, tmp_path / "int4.onnx", example_inputs=images(2), int4=True)
    assert (made.opset, stored.opset) == (20, 21)
    kinds = [item.data_type for item in onnx.load(stored.path).graph.initializer]
    assert kinds.count(onnx.TensorProto.INT4) >= 4
    with torch.no_grad():
        expected = model(3 * images(3))
    assert same(run(made.path, 3 * images(3))[0], expected)
    assert same(run(stored.path, 3 * images(3))[0], expected)


@pytest.mark.parametrize(
    ("net", "inputs"),
    [
        pytest.param(Small, images(3, 16), marks=pytest.mark.slow),
        pytest.param(Audio, torch.randn(3, 1, 64), marks=pytest.mark.slow),
        (Words, torch.randint(0, 20, (3, 7))),
    ],
)
def test_other_kinds_of_networks(net: type[nn.Module], inputs: Tensor, tmp_path) -> None:
    torch.manual_seed(0)
    model = calibrate(quantize(randomize(net()).eval()), inputs)
    made = export(model, tmp_path / "net.onnx", example_inputs=inputs)
    assert made.dynamic_batch
    with torch.no_grad():
        assert same(run(made.path, inputs[:2])[0], model(inputs[:2]))


class Pair(LightningModule):
    """Takes keywords, gives several outputs, and logs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        self.example_input_array = {"x": torch.randn(2, 4), "y": torch.randn(2, 4)}

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"sum": self.net(x) + self.net(y), "x": self.net(x)}


def test_lightning_modules_keywords_and_pruned_networks(tmp_path) -> None:
    model = compress(Pair(), IterativePruning(0.5))
    made = export(model, tmp_path / "net.onnx")
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    with torch.no_grad():
        expected = model(x, y)
    got = run(made.path, x, y)
    assert [item.name for item in onnx.load(made.path).graph.input] == ["x", "y"]
    assert all(same(mine, theirs, 1e-5) for mine, theirs in zip(got, expected.values(), strict=True))


@pytest.mark.parametrize("bits", [None, 8])
def test_a_mapping_may_be_one_positional_argument(bits: int | None, tmp_path) -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 2), nn.Linear(3, 2)

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return self.one(batch["x"]) - self.two(batch["y"])

    torch.manual_seed(0)
    model, batch = Whole().eval(), {"x": torch.randn(5, 4), "y": torch.randn(5, 3)}
    if bits:
        calibrate(quantize(model, bits), batch)
    for example in ((batch,), batch, {"batch": batch}) if bits is None else ((batch,),):
        made = export(model, tmp_path / "net", example_inputs=example)
        assert made.dynamic_batch
        assert [item.name for item in onnx.load(made.path).graph.input] == ["x", "y"]
        part = {key: value[:3] for key, value in batch.items()}
        with torch.no_grad():
            assert same(run(made.path, *part.values())[0], model(part))


def test_a_fixed_batch_size_is_said(tmp_path) -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(2, 4) + 1

    made = export(Fixed(), tmp_path / "net.onnx", example_inputs=torch.randn(2, 4))
    assert not made.dynamic_batch
    assert made.left[""].startswith("the batch size is fixed: ")


@pytest.mark.parametrize("target", ["onnx", "torch"])
def test_what_cannot_be_traced_is_said(target: str, tmp_path) -> None:
    with pytest.raises(ExportError, match=r"cannot be exported: .*no branches on values of tensors"):
        export(Branching(), tmp_path / "net", target, example_inputs=images(2, 16))
    assert list(tmp_path.iterdir()) == []


def test_an_input_of_four_bits_that_two_layers_take(tmp_path) -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + self.two(x)

    torch.manual_seed(0)
    x = torch.randn(8, 6)
    model = calibrate(quantize(Fork(), 8, 4), x)
    made = export(model, tmp_path / "net", example_inputs=x)
    with torch.no_grad():
        assert same(run(made.path, x)[0], model(x))


class Projected(nn.Module):
    """Returns all that an LSTM with projections does, from a given state if it is asked to."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8, proj_size=3, **settings)

    def forward(self, x: Tensor, h: Tensor | None = None, c: Tensor | None = None) -> Any:
        output, (h, c) = self.lstm(x, None if h is None else (h, c))
        return output, h, c


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("state", [False, True], ids=["from zero", "from a state"])
@pytest.mark.parametrize("settings", [{}, {"bidirectional": True}, {"bidirectional": True, "num_layers": 2}], ids=str)
def test_recurrent_layers_with_projections(settings: dict[str, Any], state: bool, tmp_path) -> None:
    torch.manual_seed(0)
    model = Projected(bias=bool(settings), batch_first=not state, **settings).eval()
    size = settings.get("num_layers", 1) * (1 + settings.get("bidirectional", False))
    given = (torch.randn(size, 2, 3), torch.randn(size, 2, 8)) if state else ()
    x = torch.randn((5, 2, 6) if state else (2, 5, 6))
    made = export(model, tmp_path / "net", example_inputs=(x, *given))
    assert made.dynamic_batch is not state
    x = x if state else torch.randn(4, 5, 6)
    with torch.no_grad():
        expected = model(x, *given)
    assert all(same(mine, theirs, 1e-5) for mine, theirs in zip(run(made.path, x, *given), expected, strict=True))


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_integer_weights_of_recurrent_layers_with_projections_stay_integers_in_onnx(tmp_path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 5, 6)
    model = compress(Projected(batch_first=True, bidirectional=True), PostTrainingQuantization(x, ends=None)).eval()
    made = export(model, tmp_path / "net", example_inputs=x)
    stored = {tensor.name: tensor.data_type for tensor in onnx.load(made.path).graph.initializer}
    assert sum(kind == onnx.TensorProto.INT8 and "integer_weights" in name for name, kind in stored.items()) >= 6
    with torch.no_grad():
        expected = model(x)
    assert all(same(mine, theirs, 1e-5) for mine, theirs in zip(run(made.path, x), expected, strict=True))


@pytest.mark.parametrize("quantized", [False, True])
def test_projections_moved_ahead_compute_the_same(quantized: bool) -> None:
    """What the way to OpenVINO begins with, where OpenVINO is not installed too."""
    torch.manual_seed(0)
    x = torch.randn(4, 5, 6)
    model = Projected(batch_first=True, bidirectional=True, num_layers=2).eval()
    model = compress(model, PostTrainingQuantization(x, ends=None)) if quantized else model
    with torch.no_grad():
        expected = model(x)
        assert move_projections(model, ahead=True) == ["lstm"]
        assert all(torch.allclose(mine, theirs, atol=1e-6) for mine, theirs in zip(model(x), expected, strict=True))
    assert move_projections(model) == []


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("quantized", [False, True])
def test_recurrent_layers_with_projections_in_openvino(quantized: bool, tmp_path) -> None:
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    x = torch.randn(4, 5, 6)
    model = Projected(batch_first=True, bidirectional=True).eval()
    model = compress(model, PostTrainingQuantization(x, ends=None)) if quantized else model
    made = export(model, tmp_path / "net", "openvino", example_inputs=x)
    assert made.difference < 1e-5
    assert ("lstm" in made.left) is quantized


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_a_state_that_a_projection_cannot_reach_is_an_error(tmp_path) -> None:
    model = Projected().eval()
    nn.init.zeros_(model.lstm.weight_hr_l0.data[0])
    x, h, c = torch.randn(5, 2, 6), torch.randn(1, 2, 3), torch.randn(1, 2, 8)
    with pytest.raises(ExportError, match="a hidden state that its projection cannot reach; start it at zero"):
        export(model, tmp_path / "net", example_inputs=(x, h, c))
    assert export(model, tmp_path / "net", example_inputs=x).difference < 1e-5


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_what_a_runtime_cannot_run_is_said(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(onnx_program, "move_projections", lambda model: [])
    recurrent = nn.LSTM(6, 8, batch_first=True, proj_size=4, bidirectional=True)
    with pytest.raises(ExportError, match=r"`target` 'onnx' cannot be read back or run: .*try another target"):
        export(recurrent, tmp_path / "net", example_inputs=torch.randn(2, 3, 6))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bits", [None, 8])
def test_a_network_that_is_not_a_function_is_refused(bits: int | None, tmp_path) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.linear(x) * self.calls

    model, x = Counting().eval(), torch.randn(2, 2, generator=torch.Generator().manual_seed(0))
    if bits:
        calibrate(quantize(model, bits), x)
        model.calls = 0
    with pytest.raises(ExportError, match="onnxruntime computes something else"):
        export(model, tmp_path / "net", example_inputs=x)


def test_rounding_alone_is_no_error_where_it_moves_outputs_far(monkeypatch, tmp_path) -> None:
    torch.manual_seed(0)
    x = images(4, 16)
    prepared = prepare(calibrate(quantize(randomize(Small()).eval()), x), x)
    monkeypatch.setattr(verification, "_SHARE", 0.02)  # this network is a calm one
    noise = rounding_noise(prepared)
    assert noise > 0
    wrong = [value.numpy() * (1 + 1.9 * noise) for value in outputs_of(prepared.expected)]
    monkeypatch.setattr(verification, "INTEGER_LIMIT", 0.0)
    assert verification.require_same(wrong, prepared, "a runtime") == pytest.approx(1.9 * noise, rel=1e-3)
    with pytest.raises(ExportError, match="a runtime computes something else"):
        verification.require_same([2 * value for value in wrong], prepared, "a runtime")


def test_torch_programs_load_without_this_package(written, tmp_path) -> None:
    model = written[0]
    made = export(model, tmp_path / "net", "torch", example_inputs=images(2))
    with torch.no_grad():
        assert same(torch.export.load(made.path).module()(images(5)).numpy(), model(images(5)), 1e-4)
    names = torch.export.load(made.path).state_dict
    assert sum(value.dtype == torch.int8 for value in names.values()) >= 4


@pytest.mark.parametrize(
    ("target", "module", "extra"),
    [("onnx", "onnxscript", "onnx"), ("openvino", "openvino", "openvino"), ("torchao", "torchao", "torchao"),
     ("executorch", "executorch", "executorch")],
)  # fmt: skip
def test_missing_packages_name_their_extra(target: str, module: str, extra: str, monkeypatch, tmp_path) -> None:
    real = importlib.import_module

    def refuse(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == module:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(ConfigurationError, match=rf"needs '{module}'.*lightning-compress\[{extra}\]"):
        export(nn.Linear(2, 2), tmp_path / "net", target, example_inputs=torch.ones(2, 2))
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_named(tmp_path) -> None:
    layer, x = nn.Linear(2, 2), torch.ones(2, 2)
    for arguments, message in (
        ({"target": "onx"}, "`target` is 'onx'; did you mean 'onnx'"),
        ({"target": "torch", "int4": True}, "`int4` is for the target 'onnx'"),
        ({"example_inputs": None}, "`example_inputs`: an export runs the model once"),
        ({"example_inputs": torch.ones(2, 3)}, "`example_inputs`: the model cannot run on them"),
        ({"example_inputs": torch.ones(0, 2)}, "`example_inputs` must hold .* got no samples"),
        ({"example_inputs": x / 0 - x / 0}, "`example_inputs` must hold .* got NaN"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            export(layer, tmp_path / "net", **{"example_inputs": x, **arguments})
    with pytest.raises(ConfigurationError, match="`path` is the folder"):
        export(layer, tmp_path, example_inputs=x)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=r"`path`: the folder of .* cannot be made"):
        export(layer, tmp_path / "file" / "net", example_inputs=x)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(ConfigurationError, match="`model` must be a torch"):
        export(lambda x: x, tmp_path / "net", example_inputs=x)
    with pytest.raises(ConfigurationError, match="`path` must be the name of a file"):
        export(layer, 3, example_inputs=x)
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(ConfigurationError, match="`path` is the folder"):
        export(layer, tmp_path / "folder.onnx", example_inputs=x)


@pytest.mark.slow
def test_openvino_computes_the_same(written, tmp_path) -> None:
    """The ``[openvino]`` extra is not among the test's; its way through ONNX is covered above."""
    pytest.importorskip("openvino")
    made = export(written[0], tmp_path / "net", "openvino", example_inputs=images(2))
    assert made.difference < 0.05
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.bin", "net.xml"]
    assert made.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_rounded_activations_alone_may_differ_as_integers_do(tmp_path) -> None:
    """Beside float weights too, a value that a runtime rounds the other way is no error of the file."""
    model = compress(Tiny(), PostTrainingQuantization(images(8), weights=None))
    assert prepare(model, images(2)).quantized
    assert not prepare(Tiny(), images(2)).quantized


@pytest.mark.parametrize("convert_first", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_types_that_runtimes_lack_become_float32(convert_first: bool, tmp_path) -> None:
    model, x = quantized().bfloat16(), images(2).bfloat16()
    made = export(convert(model) if convert_first else model, tmp_path / "net", example_inputs=x)
    with torch.no_grad():
        assert same(run(made.path, x.float())[0], model(x).float(), 0.2)
    assert model.head.weight.dtype == torch.bfloat16
    linear = nn.Linear(4, 2).bfloat16()
    assert export(linear, tmp_path / "linear", "torch", example_inputs=torch.ones(2, 4).bfloat16()).difference < 0.1


def test_outputs_of_infinity_are_compared_too() -> None:
    """Masked scores are such."""
    scores = torch.tensor([1.0, -torch.inf])
    assert verification.relative_difference([scores.numpy()], [scores]) == 0.0
    assert not verification.relative_difference([np.array([1.0, 0.0])], [scores]) < np.inf
