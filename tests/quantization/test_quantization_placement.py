"""Where quantizers go: on small networks by hand, on large ones by what must hold, traced in two ways."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule
from networks import VISION, Audio, Branching, Functional, Residual, Shortcut, Small, Words
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress import ConfigurationError
from lightning_compress.models import resnet20
from lightning_compress.quantization import Placement, place_quantizers, tracing
from lightning_compress.quantization.graph import kind_of_layer


def places(placement: Placement) -> list[tuple[str, str]]:
    return [(point.path, point.side) for point in placement.points]


def meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return VISION[name]()


def without_fx(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: nn.Module, prefix: str = "") -> None:
        raise RuntimeError("control flow")

    monkeypatch.setattr(tracing, "trace_symbolically", refuse)


def test_a_network_by_hand() -> None:
    placement = place_quantizers(Small())
    assert [(p.path, p.side, p.computes) for p in placement.points] == [
        ("stem.0", "input", "the input"),
        ("stem.2", "output", "Conv2d + BatchNorm2d + ReLU6"),
        ("block.0.conv2", "input", "Conv2d + BatchNorm2d + ReLU"),  # its ReLU is called at two places
        ("block.0.bn2", "output", "Conv2d + BatchNorm2d"),
        ("block.0", "output", "add + ReLU"),
        ("block.1.conv2", "input", "Conv2d + BatchNorm2d + ReLU"),
        ("block.1.bn2", "output", "Conv2d + BatchNorm2d"),
        ("block.1.down", "output", "Conv2d"),
        ("block.1", "output", "add + ReLU"),
        ("left.1", "output", "Conv2d + BatchNorm2d"),  # runtimes do not fuse SiLU
        ("left.2", "output", "SiLU"),
        ("right", "output", "Conv2d"),  # no module returns what the function after it computes
        ("pool", "input", "cat"),
        ("pool", "output", "AdaptiveAvgPool2d"),
    ]
    assert [p.path for p in placement.points if p.unsigned] == [
        "stem.2", "block.0.conv2", "block.0", "block.1.conv2", "block.1",
    ]  # fmt: skip
    assert placement.folds["left.1"] == "left.0"
    assert set(placement.folds) == {"stem.1", "left.1", *(f"block.{i}.bn{j}" for i in (0, 1) for j in (1, 2))}
    assert placement.left == {}
    assert placement.methods == {"": "fx"}


@pytest.mark.parametrize(
    ("name", "points", "folds"),
    [("resnet18", 30, 20), ("mobilenet_v2", 64, 52), ("vgg16", 17, 0), ("googlenet", 68, 57), ("densenet121", 184, 59),
     ("efficientnet_b0", 189, 49), ("vit_b_16", 39, 0)],
)  # fmt: skip
def test_large_networks(name: str, points: int, folds: int) -> None:
    model = meta(name)
    placement = place_quantizers(model)
    assert len(places(placement)) == len(set(places(placement))) == points
    assert len(placement.folds) == folds
    layers = {path: kind_of_layer(module) for path, module in model.named_modules()}
    for path, _ in places(placement):
        assert path in layers
    for norm, layer in placement.folds.items():
        assert (layers[norm], layers[layer]) == ("batch_norm", "convolution")
    if name == "resnet18":
        assert {f"layer{i}.{j}" for i in range(1, 5) for j in (0, 1)} <= {p.path for p in placement.points}
        assert not any(path.endswith(".relu") for path, _ in places(placement))
    if name == "densenet121":
        assert "feeds BatchNorm2d" in placement.left["features.denseblock1.denselayer1"]
    if name == "vit_b_16":
        assert "feeds LayerNorm" in placement.left["encoder.layers.encoder_layer_0"]


@pytest.mark.parametrize(
    "name",
    ["resnet18", *(pytest.param(name, marks=pytest.mark.slow) for name in ("googlenet", "densenet121", "vit_b_16"))],
)
def test_torch_export_finds_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = meta(name)
    symbolic = place_quantizers(model)
    without_fx(monkeypatch)
    exported = place_quantizers(model, example_inputs=torch.zeros(2, 3, 224, 224))
    assert exported.methods == {"": "export"}
    assert places(exported) == places(symbolic)
    assert exported.folds == symbolic.folds


def test_torch_export_numbers_calls_and_knows_keywords(monkeypatch: pytest.MonkeyPatch) -> None:
    without_fx(monkeypatch)
    placement = place_quantizers(Residual(2), example_inputs={"x": torch.zeros(2, 2, 4, 4)})
    expected = [("conv1", "input"), ("conv2", "input"), ("bn2", "output")]
    assert places(placement) == expected
    assert placement.left == {"": "add_: stays float, as it feeds the network's output"}


@pytest.mark.parametrize("export", [False, True], ids=["fx", "export"])
def test_what_functions_compute_is_quantized_where_a_block_takes_it(
    export: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if export:
        without_fx(monkeypatch)
    placement = place_quantizers(Functional(), example_inputs=torch.zeros(2, 1, 16, 16))
    assert places(placement) == [
        ("conv", "input"),
        ("layer1.0", "input"),  # its convolution and its shortcut take what the ReLU and the pool return
        ("layer1.0.conv2", "input"), ("layer1.0.bn2", "output"), ("layer1.0", "output"),
        ("layer1.1.conv2", "input"), ("layer1.1.bn2", "output"), ("layer1.1", "output"),
        ("layer2.conv2", "input"), ("layer2.bn2", "output"), ("layer2.shortcut.1", "output"), ("layer2", "output"),
        ("head", "input"),
    ]  # fmt: skip
    assert (placement.points[1].computes, placement.points[1].unsigned) == ("Conv2d + BatchNorm2d + relu", True)
    assert placement.left == {}


class Around(nn.Module):
    """Values that functions compute, and modules that do not take them alone, or not once."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.block = Shortcut(2, 2)
        self.other = Shortcut(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        if self.how == "used outside":
            return self.other(self.block(x) + x)
        if self.how == "called twice":
            return self.block(x) + self.other(self.block(x))
        return self.block(x) + self.other(x)


@pytest.mark.parametrize("how", ["used outside", "called twice", "taken by two"])
def test_blocks_that_do_not_take_a_value_alone_and_once_leave_it_to_their_layers(how: str) -> None:
    placement = place_quantizers(Around(how))
    assert ("block", "input") not in places(placement)
    assert ("block.conv1", "input") in places(placement)
    assert "Conv2d + relu: stays float, as add takes it as it is" in placement.left[""]


def test_audio_and_words() -> None:
    audio = place_quantizers(Audio())
    assert places(audio) == [
        ("features.0", "input"), ("features.2", "output"), ("features.5", "output"), ("head", "input"),
    ]  # fmt: skip
    assert audio.folds == {"features.1": "features.0", "features.4": "features.3"}
    assert places(place_quantizers(Words())) == [("head", "input")]


def test_only_chosen_layers_ask_for_integers() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2, 2))
    assert places(place_quantizers(net, ["2"])) == [("1", "output"), ("3", "output")]
    assert places(place_quantizers(net, ["5"])) == [("3", "output")]
    assert places(place_quantizers(net, [])) == []
    with pytest.raises(ConfigurationError, match=r"`layers` names '7', which Sequential does not have"):
        place_quantizers(net, ["7"])


def test_a_layer_used_twice_has_one_quantizer_and_keeps_its_batch_norms() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1)
            self.norms = nn.ModuleList([nn.BatchNorm2d(2), nn.BatchNorm2d(2)])

        def forward(self, x: Tensor) -> Tensor:
            for norm in self.norms:
                x = F.relu(norm(self.conv(x)))
            return x

    placement = place_quantizers(Twice())
    assert places(placement) == [("conv", "input"), ("norms.1", "output")]
    assert placement.folds == {}


def test_what_cannot_be_traced_gets_quantizers_at_its_layers() -> None:
    placement = place_quantizers(Branching())
    assert placement.methods == {"": "layers", "part": "fx"}
    assert places(placement) == [("part.0", "input"), ("part.2", "output"), ("head", "input")]
    assert placement.folds == {"part.1": "part.0"}
    assert "Branching cannot be traced (torch.fx:" in placement.left[""]
    with_example = place_quantizers(Branching(), example_inputs=torch.zeros(1, 1, 16, 16))
    assert "torch.export:" in with_example.left[""]


class Task(LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.net(x)
        return x if mask is None else x * mask


def test_lightning_modules_compiled_parts_and_modes() -> None:
    expected = [(f"net.{path}", side) for path, side in places(place_quantizers(Small()))]
    task = Task(Small())
    task.net.stem.eval()
    modes = [module.training for module in task.modules()]
    assert places(place_quantizers(task)) == expected
    assert [module.training for module in task.modules()] == modes
    wrapped = Task(torch.compile(Small()))
    assert places(place_quantizers(wrapped)) == expected
    task.net.compile()
    assert places(place_quantizers(task)) == expected


def test_layers_that_only_train_are_named() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    net.register_module("auxiliary", nn.Linear(2, 2))

    class Training(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.auxiliary = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + self.auxiliary(x) if self.training else self.fc(x)

    assert place_quantizers(Training()).left == {"auxiliary": "the network does not call it in evaluation mode"}


def test_the_networks_of_recipes_are_traced_as_a_whole() -> None:
    placement = place_quantizers(resnet20())
    assert placement.methods == {"": "fx"}
    assert placement.left == {}
    assert len(placement.folds) == 19
    blocks = [f"layer{i}.{j}" for i in (1, 2, 3) for j in (0, 1, 2)]
    inside = [(f"{block}{part}", side) for block in blocks for part, side in
              ((".conv2", "input"), (".bn2", "output"), ("", "output"))]  # fmt: skip
    assert places(placement) == [("conv1", "input"), ("relu", "output"), *inside, ("linear", "input")]


@pytest.mark.parametrize(("value", "expected"), [(0.0, []), (1.0, [("right", "input")])])
def test_a_border_of_zeros_is_on_the_grid(value: float, expected: list[tuple[str, str]]) -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.act, self.right = nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.right(F.pad(self.act(self.left(x)), (1, 1), value=value))

    for inputs in (None, torch.zeros(2, 1, 8, 8)):
        found = places(place_quantizers(Padded(), example_inputs=inputs))
        assert found == [("left", "input"), ("act", "output"), *expected, ("right", "output")]
