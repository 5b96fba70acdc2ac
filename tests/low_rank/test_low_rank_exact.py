"""At full rank every method reproduces the layer; to_dense gives it back."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.core.cost import count_macs
from lightning_compress.low_rank.decompose import (
    METHODS,
    cost,
    dense_cost,
    factorize,
    full_ranks,
    usable_ranks,
    why_not,
)
from lightning_compress.low_rank.kinds import build_factorized

CONVS: list[tuple[str, Any, dict[str, Any], tuple[int, ...]]] = [
    ("plain", nn.Conv2d, {"kernel_size": 3}, (9, 8)),
    ("stride", nn.Conv2d, {"kernel_size": 3, "stride": 2, "padding": 1}, (9, 8)),
    ("strides", nn.Conv2d, {"kernel_size": (3, 5), "stride": (1, 3), "padding": (2, 1), "bias": False}, (9, 12)),
    ("dilation", nn.Conv2d, {"kernel_size": 3, "dilation": (2, 1), "padding": (2, 1)}, (9, 8)),
    ("groups", nn.Conv2d, {"kernel_size": 3, "groups": 2, "padding": 1}, (7, 6)),
    ("same", nn.Conv2d, {"kernel_size": (3, 3), "padding": "same", "dilation": 2}, (9, 8)),
    ("same even", nn.Conv2d, {"kernel_size": (4, 2), "padding": "same"}, (9, 8)),
    ("valid", nn.Conv2d, {"kernel_size": (3, 2), "padding": "valid"}, (9, 8)),
    ("reflect", nn.Conv2d, {"kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect"}, (9, 8)),
    ("circular", nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "stride": 2}, (9, 8)),
    ("replicate same", nn.Conv2d, {"kernel_size": 4, "padding": "same", "padding_mode": "replicate"}, (9, 8)),
    ("one axis", nn.Conv2d, {"kernel_size": (1, 5), "stride": (2, 1), "padding": (1, 2)}, (9, 8)),
    ("one by one", nn.Conv2d, {"kernel_size": 1, "stride": 2, "padding": 1}, (9, 8)),
    ("one by one groups", nn.Conv2d, {"kernel_size": 1, "groups": 2}, (9, 8)),
    ("1d", nn.Conv1d, {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2}, (11,)),
    ("1d groups", nn.Conv1d, {"kernel_size": 5, "groups": 2, "bias": False}, (11,)),
    ("3d", nn.Conv3d, {"kernel_size": (3, 2, 3), "stride": (1, 2, 1), "padding": (1, 0, 1)}, (5, 4, 6)),
    ("3d groups", nn.Conv3d, {"kernel_size": (1, 2, 3), "groups": 2, "stride": (2, 1, 1), "padding": 1}, (5, 4, 6)),
    ("transposed", nn.ConvTranspose2d, {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1}, (5, 6)),
    ("transposed groups", nn.ConvTranspose2d, {"kernel_size": (2, 3), "groups": 2, "dilation": (1, 2)}, (5, 6)),
    ("transposed 1d", nn.ConvTranspose1d, {"kernel_size": 4, "stride": 2, "padding": 1, "bias": False}, (7,)),
    ("transposed 3d", nn.ConvTranspose3d, {"kernel_size": (2, 3, 2), "stride": (1, 2, 1)}, (4, 3, 4)),
    ("transposed 1x1", nn.ConvTranspose2d, {"kernel_size": 1, "stride": 2, "output_padding": 1}, (5, 6)),
]
pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel lengths:UserWarning")
CASES = [(method, *case) for method, case in itertools.product(METHODS, CONVS)]


def layer_of(kind: Any, config: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    layer: nn.Module = kind(4, 6, **config)
    return layer.eval()


def fitting() -> list[Any]:
    found = []
    for method, name, kind, config, size in CASES:
        if not why_not(layer_of(kind, config), method):
            found.append(pytest.param(method, kind, config, size, id=f"{method}-{name}"))
    return found


def inputs(size: tuple[int, ...]) -> Tensor:
    return torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("method", "kind", "config", "size"), fitting())
def test_full_rank_reproduces_the_layer(method: str, kind: Any, config: dict[str, Any], size: tuple[int, ...]) -> None:
    layer, x = layer_of(kind, config), inputs(size)
    found = factorize(layer, method, full_ranks(layer, method))
    expected = layer(x)
    assert found.error < 1e-5
    torch.testing.assert_close(found.module(x), expected, atol=1e-5, rtol=1e-5)
    dense = found.module.to_dense()
    assert type(dense) is type(layer)
    torch.testing.assert_close(dense.weight, layer.weight, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dense(x), expected, atol=1e-5, rtol=1e-5)
    assert dense.bias is layer.bias


@pytest.mark.parametrize(("method", "kind", "config", "size"), fitting())
def test_costs_are_those_of_the_modules(method: str, kind: Any, config: dict[str, Any], size: tuple[int, ...]) -> None:
    layer = layer_of(kind, config)
    ranks = usable_ranks(layer, method, [rank // 2 for rank in full_ranks(layer, method)])
    module = build_factorized(layer, method, ranks)
    expected = cost(layer, method, ranks, size)
    assert sum(p.numel() for p in module.parameters()) == expected.parameters
    x = torch.zeros(1, 4, *size)
    assert count_macs(module, x).total == expected.macs
    assert count_macs(layer, x).total == dense_cost(layer, size).macs


@pytest.mark.parametrize(("inputs_", "outputs"), [(12, 20), (20, 12), (7, 7), (1, 5), (30, 24)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("method", ["svd", "tt"])
def test_full_rank_reproduces_linear_layers(method: str, bias: bool, inputs_: int, outputs: int) -> None:
    layer = nn.Linear(inputs_, outputs, bias=bias)
    found = factorize(layer, method, full_ranks(layer, method))
    x = torch.randn(3, 4, inputs_)
    torch.testing.assert_close(found.module(x), layer(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.module(x[0, 0]), layer(x[0, 0]), atol=1e-5, rtol=1e-5)
    dense = found.module.to_dense()
    torch.testing.assert_close(dense(x), layer(x), atol=1e-5, rtol=1e-5)
    assert dense.bias is layer.bias
    assert count_macs(found.module, x).total == 12 * cost(layer, method, found.module.ranks).macs


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_trains_of_any_length(count: int) -> None:
    layer = nn.Linear(48, 36)
    ranks = usable_ranks(layer, "tt", [10_000] * count)
    torch.testing.assert_close(factorize(layer, "tt", ranks).module.to_dense().weight, layer.weight, atol=1e-5, rtol=0)
