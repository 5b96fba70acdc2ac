"""Known networks: the sliced model computes what the masked one does, trains, and reloads without a tracer."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

import lightning_compress as lc
from lightning_compress import StructuredPruning
from lightning_compress.core.cost import count_macs, count_parameters
from lightning_compress.core.paths import named_layers
from lightning_compress.models.resnet import resnet20
from lightning_compress.pruning.structured.groups import Zeroing, parameter_in

IMAGES = torch.zeros(2, 3, 32, 32)
LARGER = torch.zeros(2, 3, 64, 64)


class Residual(nn.Module):
    """A residual sum, a depthwise, a grouped and a transposed convolution, and a sigmoid, which is not 0 at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point, self.grouped = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.up, self.act, self.head = nn.ConvTranspose2d(16, 12, 2, 2), nn.PReLU(12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.norm(self.stem(x)))
        x = x + torch.sigmoid(self.point(torch.sigmoid(self.depthwise(x))))
        return self.head(self.act(self.up(torch.sigmoid(self.grouped(x)))).mean((2, 3)))


class Concatenated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 12, 3)
        self.norm, self.join, self.head = nn.BatchNorm2d(20), nn.Conv2d(20, 16, 3), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.relu(self.norm(torch.cat([self.a(x), self.b(x)], 1)))
        return self.head(torch.relu(self.join(joined)).amax((2, 3)))


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.recur = nn.Embedding(50, 24), nn.LSTM(24, 32, batch_first=True)
        self.head = nn.Linear(32, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.recur(self.embed(tokens))[0][:, -1])


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 5))


def vit() -> nn.Module:
    return torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=10)


def googlenet(aux: bool = False) -> nn.Module:
    return torchvision.models.googlenet(init_weights=False, aux_logits=aux, num_classes=10)


FAST: dict[str, tuple[Callable[[], nn.Module], Tensor, float]] = {
    "residual": (Residual, IMAGES, 0.5),
    "concat": (Concatenated, IMAGES, 0.5),
    "mlp": (mlp, IMAGES, 0.5),
    "lstm": (Text, torch.arange(20).reshape(2, 10), 0.5),
    "vit": (vit, IMAGES, 0.8),
    "resnet20": (resnet20, IMAGES, 0.5),
    "resnet18": (torchvision.models.resnet18, LARGER, 0.5),
}


def lively(net: nn.Module) -> nn.Module:
    """Give norms statistics and shifts that a cut could get wrong."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net


def noise(example: Tensor) -> Tensor:
    return torch.rand(example.shape) if example.is_floating_point() else example


@pytest.mark.parametrize("name", FAST)
def test_sliced_equals_masked_and_meets_the_goal(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    build, example, macs = FAST[name]
    net, inputs = lively(build()), noise(example)
    original = copy.deepcopy(net.state_dict())
    callback = StructuredPruning(macs=macs, limits={"floor": 0.05})
    sliced = lc.compress(net, callback, example_inputs=example)

    assert all(torch.equal(value, original[key]) for key, value in net.state_dict().items())
    assert net.training
    assert sliced.training
    before, after = count_macs(net, example).total, count_macs(sliced, example).total
    assert before
    assert after
    assert macs - 0.05 <= after / before <= macs + 1e-9  # small networks have coarse steps
    if name in ("resnet18", "resnet20"):
        assert after / before == pytest.approx(macs, rel=0.02)
    assert callback.history[0]["macs"] == pytest.approx(after / before, abs=1e-6)
    assert callback.history[0]["parameters"] == pytest.approx(
        count_parameters(sliced).total / count_parameters(net).total, abs=1e-6
    )

    masked = copy.deepcopy(net)
    Zeroing(callback._groups, callback._cuts)(parameter_in(named_layers(masked)))
    with torch.no_grad():
        expected, got = masked.eval()(inputs), sliced.eval()(inputs)
    assert float((expected - got).abs().max()) <= 1e-5 * float(expected.abs().max())

    sliced.train()
    sliced.requires_grad_(True)(inputs).square().sum().backward()
    assert [n for n, p in sliced.named_parameters() if p.grad is None] == []

    lc.save_compressed(sliced, tmp_path / "cut.safetensors")
    bare = lc.load_compressed(build(), tmp_path / "cut.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(bare(inputs), lc.load_compressed(build(), tmp_path / "cut.safetensors").eval()(inputs))
    assert [tuple(p.shape) for p in bare.parameters()] == [tuple(p.shape) for p in sliced.parameters()]


@pytest.mark.parametrize(
    ("name", "reasons"),
    [
        ("resnet20", {"linear": "model's outputs"}),
        ("vit", {"conv_proj": "LayerNorm", "encoder.layers.encoder_layer_0.self_attention.out_proj": "attention"}),
        ("resnet18", {"fc": "model's outputs"}),
        ("lstm", {"head": "model's outputs"}),
    ],
)
def test_what_stays_is_named(name: str, reasons: dict[str, str]) -> None:
    build, example, _ = FAST[name]
    found = lc.coupled_groups(build(), example)
    for path, reason in reasons.items():
        assert reason in found.left[path]
    cut = {path for group in found.groups for path in group.producers}
    assert not cut & set(found.left)


class Padded(nn.Module):
    """Channels are padded on one side, by a number that is fixed or follows from the widths."""

    def __init__(self, fixed: int | None) -> None:
        super().__init__()
        self.fixed, self.stem = fixed, nn.Conv2d(3, 8, 3, padding=1)
        self.wide, self.head = nn.Conv2d(8, 12, 3, padding=1), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        wide = self.wide(x)
        missing = wide.shape[1] - x.shape[1] if self.fixed is None else self.fixed
        return self.head((wide + nn.functional.pad(x, (0, 0, 0, 0, 0, missing))).mean((2, 3)))


def test_padded_channels_are_groups_of_their_own() -> None:
    groups = {group.name: group for group in lc.coupled_groups(resnet20(), IMAGES).groups}
    assert groups["conv1"].channels == 16  # of all three stages: where they lie in the third
    assert {t.path: t.positions[0] for t in groups["conv1"].touches}["layer3.2.conv2"] == 24
    padded = {t.path: t.cut([0]) for t in groups["layer2.0.conv2"].touches}
    assert padded["layer2.1.conv2"] == [0, 24]  # one before, one behind, so that both sides stay even
    assert padded["layer3.0.conv2"] == [16, 40]
    assert groups["layer3.0.conv2"].channels == 16

    for fixed, expected in ((None, [("stem", 8), ("wide", 4)]), (4, [("stem", 8)])):
        found = lc.coupled_groups(Padded(fixed), IMAGES)
        assert [(group.name, group.channels) for group in found.groups] == expected


@pytest.mark.slow
def test_parts_that_run_in_training_only_keep_what_they_read() -> None:
    found = lc.coupled_groups(googlenet(aux=True), torch.zeros(2, 3, 224, 224))
    assert "training mode only" in found.left["inception4a.branch1.conv"]
    assert "inception3a.branch1.conv" not in found.left


def test_reload_needs_no_torch_pruning(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = lc.compress(resnet20(), StructuredPruning(parameters=0.6), example_inputs=IMAGES).eval()
    lc.save_compressed(net, tmp_path / "cut.safetensors")
    with torch.no_grad():
        torch.save({"y": net(torch.ones(1, 3, 32, 32))}, tmp_path / "y.pt")
    script = (
        "import sys; sys.modules['torch_pruning'] = None\n"
        "import torch, lightning_compress as lc\n"
        "from lightning_compress.models.resnet import resnet20\n"
        f"folder = {str(tmp_path)!r}\n"
        "net = lc.load_compressed(resnet20(), folder + '/cut.safetensors').eval()\n"
        "y = torch.load(folder + '/y.pt', weights_only=True)['y']\n"
        "assert torch.allclose(net(torch.ones(1, 3, 32, 32)), y, rtol=1e-5, atol=1e-6)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_rounding_select_and_scope() -> None:
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=10)
    select = lc.Select(exclude=("layer4",))
    callback = StructuredPruning(macs=0.5, limits={"round_to": 16}, ranking={"scope": "layer"}, select=select)
    with pytest.raises(lc.ConfigurationError, match=r"asks for 0.2 of the macs"):
        lc.compress(net, StructuredPruning(macs=0.2, select=lc.Select(include=("layer1",))), example_inputs=LARGER)
    cut = lc.compress(net, callback, example_inputs=LARGER)
    widths = {path: layer.out_channels for path, layer in cut.named_modules() if isinstance(layer, nn.Conv2d)}
    assert all(width % 16 == 0 for width in widths.values())
    assert widths["layer4.0.conv1"] == widths["layer4.1.conv2"] == 512
    assert widths["layer3.0.conv1"] < 256
    assert callback.history[0]["macs"] <= 0.5
