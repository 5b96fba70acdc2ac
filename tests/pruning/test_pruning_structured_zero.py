"""Channels that are zero already: what counts as zero, and that cutting them leaves the output as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn

from lightning_compress import (
    ConfigurationError,
    NeuronMerging,
    Select,
    SelectionError,
    StructuredPruning,
    ZeroChannelRemoval,
    compress,
    journal_of,
    load_compressed,
    save_compressed,
)
from lightning_compress.models import LeNet5
from lightning_compress.pruning.fitting import following_norms
from lightning_compress.pruning.structured import coupled_groups
from lightning_compress.pruning.structured.zero_channels import zero_channels_in


def zero_channels(net: nn.Module, inputs: Tensor) -> dict[str, list[int]]:
    layers = {"": net, **dict(net.named_modules())}
    groups = coupled_groups(net, inputs).groups
    return {group.name: zero_channels_in(group, layers, following_norms(net)) for group in groups}


def conv_net(norm: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    middle = [nn.BatchNorm2d(6)] if norm else []
    return nn.Sequential(nn.Conv2d(1, 6, 3), *middle, nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(16, 2))


IMAGES = torch.randn(3, 1, 6, 6, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_silent_and_unread_channels_are_found() -> None:
    net = conv_net(norm=False)
    net[0].weight[1] = 0  # its bias still makes a constant
    net[0].weight[2], net[0].bias[2] = 0, 0
    net[2].weight[:, 4] = 0
    assert zero_channels(net, IMAGES) == {"0": [2, 4], "2": []}


@torch.no_grad()
def test_a_norm_behind_the_layer_decides() -> None:
    net = conv_net()
    net[0].weight[0], net[0].bias[0] = 0, 0  # its norm shifts it
    net[1].weight[1] = 0
    net[1].weight[2], net[1].bias[2] = 0, 0
    net[1].bias[1] = 0.5
    net[1].bias[0] = 0.5
    assert zero_channels(net, IMAGES)["0"] == [2]
    net[1].weight[0], net[1].bias[0] = 0, 0
    assert zero_channels(net, IMAGES)["0"] == [0, 2]


@torch.no_grad()
def test_one_channel_stays() -> None:
    net = conv_net(norm=False)
    net[0].weight.zero_()
    net[0].bias.zero_()
    assert zero_channels(net, IMAGES)["0"] == [1, 2, 3, 4, 5]


class Sum(nn.Module):
    """Two convolutions whose channels are added: both must be silent."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3), nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.a(x) + self.norm(self.b(x))).mean((2, 3)))


@torch.no_grad()
def test_all_that_make_a_channel_must_be_silent() -> None:
    net = Sum()
    for channel in (0, 1):
        net.a.weight[channel], net.a.bias[channel] = 0, 0
    for channel in (1, 2):
        net.norm.weight[channel], net.norm.bias[channel] = 0, 0
    assert zero_channels(net, IMAGES) == {"a": [1]}


@torch.no_grad()
def test_an_lstm_loses_the_units_it_does_not_use() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recur, self.head = nn.LSTM(3, 5, batch_first=True), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.recur(x)[0][:, -1])

    torch.manual_seed(0)
    net, x = Net(), torch.randn(4, 6, 3)
    for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
        net.recur.get_parameter(name).reshape(4, 5, -1)[:, [1, 3]] = 0
    net.recur.weight_hh_l0[:, [1, 3]] = 0
    small = compress(net, ZeroChannelRemoval(), example_inputs=x)
    assert small.recur.hidden_size == 3
    assert torch.allclose(small(x), net(x), atol=1e-6)


@torch.no_grad()
def test_lenet_shrinks_and_computes_the_same(tmp_path: Any) -> None:
    torch.manual_seed(0)
    net, images = LeNet5().eval(), torch.randn(4, 1, 28, 28)
    for layer, count in ((net.conv1, 15), (net.conv2, 31)):
        layer.weight[:count], layer.bias[:count] = 0, 0
    small = compress(net, ZeroChannelRemoval(), example_inputs=images)
    assert (small.conv1.out_channels, small.conv2.weight.shape, small.fc1.in_features) == (5, (19, 5, 5, 5), 304)
    assert torch.allclose(small(images), net(images), atol=1e-5)
    assert all(edit.verb == "slice" for edit in journal_of(small))
    save_compressed(small, tmp_path / "small.safetensors")
    again = load_compressed(LeNet5().eval(), tmp_path / "small.safetensors")
    assert torch.equal(again(images), small(images))


def test_nothing_to_cut_is_said() -> None:
    net = conv_net()
    with pytest.warns(UserWarning, match="no channel is zero, so nothing is cut"):
        same = compress(net, ZeroChannelRemoval(), example_inputs=IMAGES)
    assert same[0].out_channels == 6
    assert not journal_of(same)


def test_only_selected_layers_are_cut() -> None:
    net = conv_net(norm=False)
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.weight[0], layer.bias[0] = 0, 0
    small = compress(net, ZeroChannelRemoval(Select(include=("2",))), example_inputs=IMAGES)
    assert (small[0].out_channels, small[2].out_channels) == (6, 3)
    with pytest.raises(SelectionError, match="no channels of Sequential can be cut"):
        compress(net, ZeroChannelRemoval(Select(include=("4",))), example_inputs=IMAGES)


class Hidden(BoringModel):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 2))  # type: ignore[assignment]


def test_two_callbacks_never_cut_the_same_model() -> None:
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    for other in (StructuredPruning(0.5), NeuronMerging(0.5), ZeroChannelRemoval(name="again")):
        trainer = Trainer(max_epochs=1, callbacks=[other, ZeroChannelRemoval()], accelerator="cpu", **quiet)
        with pytest.raises(ConfigurationError, match="change the same weights; remove one of them"):
            trainer.fit(Hidden())
