"""Weights that a network uses in a function too, beside their layer: found, and named before and after training."""

from __future__ import annotations

import pytest
import torch
from networks import calibrate, quantize
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress import PostTrainingQuantization, compress
from lightning_compress.core.paths import named_layers
from lightning_compress.quantization import convert, convert_in_place, place_quantizers
from lightning_compress.quantization.assignment import Assignment
from lightning_compress.quantization.sites import find_sites
from lightning_compress.quantization.spec import ACTIVATION, WEIGHT


class Autoencoder(nn.Module):
    """Decodes with the transposed weight of the encoder, and looks up words by the embedding's rows."""

    def __init__(self, branches: bool = False) -> None:
        super().__init__()
        self.words, self.encode, self.head = nn.Embedding(9, 6), nn.Linear(6, 8), nn.Linear(6, 6)
        self.branches = branches

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.encode(self.words(x).to(self.head.weight.dtype)))
        if self.branches and len(hidden) < 1:  # fx cannot tell
            return hidden
        decoded = self.head(F.linear(hidden, self.encode.weight.T))
        return F.linear(decoded, self.words.weight)


@pytest.mark.parametrize("branches", [False, True])
def test_both_ways_of_tracing_find_the_reads(branches: bool) -> None:
    found = place_quantizers(Autoencoder(branches), None, torch.tensor([1, 2]))
    assert found.methods == {"": "export" if branches else "fx"}
    assert found.reads == ("words", "encode")


def test_ties_and_questions_of_shape_are_no_reads() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.out = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
            self.out.weight = self.words.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.words(x)) * self.out.weight.shape[0] + self.words.weight.size(1)

    assert place_quantizers(Tied()).reads == ()


def test_a_read_weight_is_named() -> None:
    torch.manual_seed(0)
    net, x = Autoencoder().eval(), torch.arange(9)
    given = Assignment(WEIGHT, ACTIVATION)
    assert find_sites(net, {"encode": given, "head": given}, ACTIVATION).left["encode.weight"].startswith("a function")
    quantize(net, 4)
    calibrate(net, x)
    with torch.no_grad():
        fake = net(x)
        with pytest.warns(UserWarning, match="weight of 'words', 'encode' is also read by a function") as warned:
            converted = convert(net)
        assert len(warned) == 1
        apart = float((converted(x) - fake).abs().max())
        assert apart > 0
        for path in ("words", "encode"):  # and that is all the difference there is
            layer = named_layers(net)[path]
            layer.weight.copy_(named_layers(converted)[path].weight)
        assert float((converted(x) - net(x)).abs().max()) < 1e-3 * apart
        with pytest.warns(UserWarning, match="also read"):
            left = convert_in_place(net).left
    assert {"words.weight", "encode.weight"} <= set(left)
    assert "head.weight" not in left


def test_others_become_integers_without_a_word() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    assert convert_in_place(compress(net, PostTrainingQuantization([torch.randn(8, 3)]))).left == {}
