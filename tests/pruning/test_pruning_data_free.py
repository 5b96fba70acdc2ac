"""Merging of neurons: against a direct search, on networks with twins, and what cannot be merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lightning_compress as lc
from lightning_compress import ConfigurationError, NeuronMerging, Select, SelectionError, journal_of
from lightning_compress.models import LeNet300100
from lightning_compress.pruning.data_free import merge_neurons, merge_saliency
from lightning_compress.pruning.neuron_pairs import find_pairs, given_pairs


def slowly(incoming: Tensor, outgoing: Tensor, count: int) -> tuple[list[tuple[int, int]], Tensor]:
    """Look at every pair each time."""
    out, left, pairs = outgoing.clone(), list(range(len(incoming))), []
    for _ in range(count):
        costs = {
            (j, i): float(out[:, j].square().mean() * (incoming[i] - incoming[j]).square().sum())
            for j in left
            for i in left
            if i != j
        }
        gone, stays = min(costs, key=costs.__getitem__)
        out[:, stays] += out[:, gone]
        out[:, gone] = 0
        left.remove(gone)
        pairs.append((gone, stays))
    return pairs, out


def test_saliency_by_hand():
    incoming = torch.tensor([[1.0, 2.0], [1.0, 4.0], [0.0, 2.0]])
    outgoing = torch.tensor([[1.0, 2.0, 0.0], [1.0, 0.0, 2.0]])
    inf = float("inf")
    assert merge_saliency(incoming, outgoing).tolist() == [[inf, 8.0, 2.0], [4.0, inf, 10.0], [1.0, 10.0, inf]]


@settings(max_examples=30, deadline=None)
@given(neurons=st.integers(2, 12), share=st.floats(0, 1), seed=st.integers(0, 10**6))
def test_the_search_is_the_direct_one(neurons: int, share: float, seed: int):
    generator = torch.Generator().manual_seed(seed)
    incoming = torch.randn(neurons, 4, generator=generator, dtype=torch.float64)
    outgoing = torch.randn(3, neurons, generator=generator, dtype=torch.float64)
    count = round(share * (neurons - 1))
    merged = merge_neurons(incoming, outgoing, count)
    pairs, out = slowly(incoming, outgoing, count)
    assert list(merged.pairs) == pairs
    assert torch.allclose(merged.outgoing, out)
    assert len(merged.kept) == neurons - count
    assert torch.allclose(merged.outgoing.sum(1), outgoing.sum(1))


def with_twins(bias: bool = True) -> nn.Sequential:
    """Return a network of which every hidden neuron is there three times."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(5, 12, bias=bias), nn.ReLU(), nn.Dropout(0.1), nn.Linear(12, 9, bias=bias), nn.Tanh(), nn.Linear(9, 2)
    )
    with torch.no_grad():
        for layer in (net[0], net[3]):
            for parameter in layer.parameters():
                parameter.copy_(parameter[: len(parameter) // 3].repeat(3, *[1] * (parameter.dim() - 1)))
    return net.eval()


@pytest.mark.parametrize("bias", [True, False])
def test_twins_merge_without_a_trace(bias: bool, tmp_path: Path):
    net, x = with_twins(bias), torch.randn(20, 5)
    small = lc.compress(net, NeuronMerging(2 / 3))
    assert [(layer.in_features, layer.out_features) for layer in (small[0], small[3], small[5])] == [
        (5, 4),
        (4, 3),
        (3, 2),
    ]
    assert torch.allclose(small(x), net(x), atol=1e-6)
    assert [(edit.verb, edit.path) for edit in journal_of(small)] == [
        ("slice", "0"),
        ("slice", "3"),
        ("slice", "3"),
        ("slice", "5"),
    ]
    lc.save_compressed(small, tmp_path / "file.safetensors")
    bare = lc.load_compressed(with_twins(bias), tmp_path / "file.safetensors").eval()
    assert torch.equal(bare(x), small(x))
    fresh = with_twins(bias)
    lc.install_hooks(fresh)
    fresh.load_state_dict(small.state_dict())
    assert torch.equal(fresh(x), small(x))
    small(x).sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())


def test_amounts_are_per_layer_and_one_neuron_stays():
    net = LeNet300100()
    method = NeuronMerging(0.8)
    small = lc.compress(net, method)
    assert (small.fc1.out_features, small.fc2.out_features, small.fc3.out_features) == (60, 20, 10)
    assert method.history[-1]["neurons"] == 80
    assert method.choose(net).left == {"fc3": "kept: its outputs are those of the model"}
    only = lc.compress(net, NeuronMerging(0.999, Select(include=("fc2",))))
    assert (only.fc1.out_features, only.fc2.out_features, only.fc3.in_features) == (300, 1, 1)
    assert lc.compress(net, NeuronMerging(0.0)).fc1.out_features == 300


class Odd(nn.Module):
    """One layer for each reason not to merge."""

    def __init__(self) -> None:
        super().__init__()
        for name in (
            "fork",
            "a",
            "b",
            "gelu",
            "c",
            "norm",
            "twice",
            "d",
            "tied",
            "e",
            "free",
            "f",
            "mid",
            "out",
            "off",
        ):
            self.add_module(name, nn.Linear(4, 4))
        self.bn = nn.BatchNorm1d(4)
        self.lookup = nn.Module()
        self.lookup.weight = self.tied.weight
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.fork(x)
        x = self.a(x) + self.b(x)
        x = self.c(self.act(self.gelu(x)))
        x = self.bn(self.norm(x))
        x = self.d(torch.relu(self.twice(self.twice(x))))
        x = self.e(self.tied(x).relu())
        x = self.f(torch.relu(self.free(x))) + self.free.bias
        return self.out(torch.tanh(self.mid(x)))


def test_every_reason_is_given():
    model = Odd()
    layers = {name: module for name, module in model.named_children() if isinstance(module, nn.Linear)}
    pairs, reasons = find_pairs(model, layers)
    assert [(pair.first, pair.second) for pair in pairs] == [("c", "norm"), ("mid", "out")]
    for name, words in {
        "fork": "read in 2 places",
        "a": "add reads its outputs",
        "b": "go into add beside others",
        "gelu": "GELU 'act' reads its outputs, which is neither Linear nor ReLU-like",
        "norm": "BatchNorm1d 'bn'",
        "twice": "'twice' is called 2 times",
        "tied": "tied.weight is used elsewhere too",
        "d": "tied.weight is used elsewhere too",
        "f": "add reads its outputs",
        "free": "free.bias is used elsewhere too",
        "out": "those of the model",
        "off": "does not call it",
    }.items():
        assert words in reasons[name], name
    assert set(reasons) | {pair.first for pair in pairs} == set(layers)


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu()) if x.sum() > 0 else self.fc2(self.fc1(-x).relu())


def test_models_that_cannot_be_traced_take_pairs():
    model = Untraceable()
    with pytest.raises(ConfigurationError, match="pairs="):
        lc.compress(model, NeuronMerging(0.5))
    small = lc.compress(model, NeuronMerging(0.5, pairs=[["fc1", "fc2"]]))
    assert (small.fc1.out_features, small.fc2.in_features) == (3, 3)


def test_parametrized_layers_stay():
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(SelectionError, match=r"no layer of Sequential has neurons that can be merged: 0: "):
        lc.compress(net, NeuronMerging(0.5))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"amount": 1}, "`amount`"),
        ({"amount": -0.1}, "`amount`"),
        ({"amount": 0.5, "pairs": []}, "`pairs`"),
        ({"amount": 0.5, "pairs": [("a", "b")], "select": Select()}, "`select` must be left out"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], match: str):
    with pytest.raises(ConfigurationError, match=match):
        NeuronMerging(**arguments)


@pytest.mark.parametrize(
    ("pairs", "match"),
    [
        (["fc1", "fc2"], "two paths each"),
        ([["fc1"]], "two paths each"),
        ([["fc1", "fc9"]], "no module at 'fc9'"),
        ([["fc2", "fc1"]], "2 outputs but 'fc1' 3 inputs"),
        ([["fc1", "fc2"], ["fc1", "fc2"]], "first layer of two pairs"),
    ],
)
def test_pairs_that_do_not_fit(pairs: Any, match: str):
    with pytest.raises(ConfigurationError, match=match):
        given_pairs(Untraceable(), pairs)
    with pytest.raises(ConfigurationError, match="is ReLU, expected Linear"):
        given_pairs(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), [["0", "1"]])


def test_functions_refuse():
    with pytest.raises(ConfigurationError, match="`incoming`"):
        merge_saliency(torch.ones(2, 3), torch.ones(1, 3))
    for count in (-1, 2):
        with pytest.raises(ConfigurationError, match=r"0\.\.1"):
            merge_neurons(torch.ones(2, 3), torch.ones(1, 2), count)
