"""Networks that a tracer misreads: gates, shuffled channels, several outputs by name, weights computed by hooks."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import lightning_compress as lc
from lightning_compress import StructuredPruning, coupled_groups
from lightning_compress.core.copies import tensors_in
from lightning_compress.core.cost import count_macs
from lightning_compress.core.isolation import call
from lightning_compress.core.paths import named_layers
from lightning_compress.pruning.structured.bound import Bound
from lightning_compress.pruning.structured.groups import Zeroing, parameter_in


class Gated(nn.Module):
    """Gated convolutions over time, as torch's function and as a product of halves."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate = nn.Conv1d(4, 32, 3, padding=1), nn.GLU(1)
        self.second, self.head = nn.Conv1d(16, 48, 3, padding=1), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.second(self.gate(self.first(x))).chunk(2, 1)
        return self.head((value * F.silu(gate)).mean(-1))


class Shuffled(nn.Module):
    """A unit of ShuffleNet: half of the channels passes by, the other half goes through a bottleneck."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 4)
        depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False)
        layers = [nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU(), depthwise, nn.BatchNorm2d(24)]
        self.unit = nn.Sequential(*layers, nn.Conv2d(24, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            kept, changed = self.stem(x[:, :3]).chunk(2, 1)
            joined = torch.cat([kept, self.unit(changed)], 1)
            batch, channels, height, width = joined.shape
            x = joined.view(batch, 2, channels // 2, height, width).transpose(1, 2).flatten(1, 2)
        return self.head(x.mean((2, 3)))


class Weighed(nn.Module):
    """One channel weighs all others, in space and as attention over time; registered before what it weighs."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.attend, self.head = nn.Conv1d(16, 1, 1), nn.Linear(24, 1), nn.Linear(24, 1)
        self.first, self.second = nn.Conv1d(4, 16, 3), nn.Conv1d(16, 24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = self.second(x * torch.sigmoid(self.gate(x))).transpose(1, 2)
        return self.head((self.attend(x).softmax(1) * x).sum(1))


class Named(nn.Module):
    """Outputs by name and size, from one layer that runs twice, and inputs by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 4, 1)

    def forward(self, *, images: Tensor, scale: Tensor) -> dict[str, Any]:
        x = self.first(images * scale)
        x = torch.relu(self.again(torch.relu(self.again(x))))
        return {"large": self.head(x), "others": [self.head(F.avg_pool2d(x, 2))]}


IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
CASES: dict[str, tuple[Callable[[], nn.Module], Any, list[str]]] = {
    "gated": (Gated, torch.rand(2, 4, 20), ["first", "second"]),
    "shuffled": (Shuffled, IMAGES[..., :8, :8], ["unit.0"]),
    "weighed": (Weighed, torch.rand(2, 4, 20), ["first", "second"]),
    "named": (Named, {"images": IMAGES[..., :12, :12], "scale": torch.tensor(2.0)}, ["first"]),
}
LARGE: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "convnext_tiny": (torchvision.models.convnext_tiny, IMAGES),
    "efficientnet_b0": (torchvision.models.efficientnet_b0, IMAGES),
    "mnasnet": (torchvision.models.mnasnet0_5, IMAGES),
    "regnet_x": (torchvision.models.regnet_x_400mf, IMAGES),
    "shufflenet": (torchvision.models.shufflenet_v2_x0_5, IMAGES),
    "lraspp": (
        lambda: torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights_backbone=None, num_classes=5),
        IMAGES,
    ),
}


def lively(net: nn.Module) -> nn.Module:
    """Give norms statistics and shifts, and scales of layers values, that a cut could get wrong."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        if hasattr(module, "layer_scale"):
            nn.init.uniform_(module.layer_scale, 0.2, 1.0)
    return net


def outputs(net: nn.Module, inputs: Any) -> list[Tensor]:
    with torch.no_grad():
        return list(tensors_in(call(net.eval(), inputs)))


def check(build: Callable[[], nn.Module], inputs: Any, path: Path) -> StructuredPruning:
    torch.manual_seed(0)
    net, callback = lively(build()), StructuredPruning(macs=0.6, limits={"floor": 0.05})
    cut = lc.compress(net, callback, example_inputs=inputs)
    before, after = count_macs(net, inputs).total, count_macs(cut, inputs).total
    assert before
    assert after / before <= 0.6

    masked = copy.deepcopy(net)
    Zeroing(callback._groups, callback._cuts)(parameter_in(named_layers(masked)))
    lc.save_compressed(cut, path)
    bare = lc.load_compressed(build(), path)
    found = zip(outputs(masked, inputs), outputs(cut, inputs), outputs(bare, inputs), strict=True)
    for expected, sliced, reloaded in found:
        assert float((expected - sliced).abs().max()) <= 1e-5 * float(expected.abs().max())
        assert float((reloaded - sliced).abs().max()) <= 1e-6 * float(sliced.abs().max())
    sum(tensor.square().sum() for tensor in tensors_in(call(bare.train(), inputs))).backward()
    assert [name for name, p in bare.named_parameters() if p.grad is None] == []
    return callback


@pytest.mark.parametrize("name", CASES)
def test_small_ones_are_cut_right(name: str, tmp_path: Path) -> None:
    build, inputs, cut = CASES[name]
    callback = check(build, inputs, tmp_path / "cut")
    assert [group.name for group in callback._groups] == cut


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_large_ones_are_cut_right(name: str, tmp_path: Path) -> None:
    check(*LARGE[name], tmp_path / "cut")


def test_why_channels_behind_a_shuffle_stay_is_said() -> None:
    left = coupled_groups(Shuffled(), IMAGES[..., :8, :8]).left
    assert "shuffled or reshaped" in left["unit.5"]
    assert "shuffled" not in coupled_groups(Gated(), torch.rand(2, 4, 20)).left["head"]


def test_layers_of_one_channel_are_named() -> None:
    left = coupled_groups(Weighed(), torch.rand(2, 4, 20)).left
    assert left == dict.fromkeys(("gate", "attend", "head"), "it has one output channel only")


def test_weights_that_hooks_compute_are_kept_and_named() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(net[2])
    found = coupled_groups(net, IMAGES[..., :12, :12])
    assert "computed by a hook" in found.left["0"]
    assert "computed by a hook" in found.left["2"]
    assert not found.groups


def test_indices_that_multiply_are_followed_so_far_only() -> None:
    """As in attention in windows, where each reshape of a picture takes an index to many."""
    windows = SimpleNamespace(index_mapping=[None, lambda indices: indices * 64])
    graph = SimpleNamespace(module2node={"reshape": SimpleNamespace(dependencies=[windows])})
    limit = Bound(graph, nn.Linear(1000, 2))
    windows.index_mapping[0] = lambda indices: indices[:300]  # the graph exchanges mappings when it needs them

    def follow(indices: list[int]) -> list[int]:
        for mapping in windows.index_mapping:
            indices = mapping(indices) if mapping else indices
        return indices

    assert len(follow([7] * 200)) == 12_800
    assert not limit.was_hit()
    assert follow([7] * 400) == []
    assert (limit.was_hit(), limit.was_hit()) == (True, False)
    windows.index_mapping = [None, lambda indices: indices * 64]
    Bound(graph, nn.Linear(2, 5000))  # a wider layer may have more of them
    assert len(follow([7] * 300)) == 19_200
