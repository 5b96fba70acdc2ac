"""The counts of the survey's Table II, to the digit, from the ranks that Tai et al. published."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torchvision.models import vgg16

from lightning_compress import Edit, apply
from lightning_compress.cli import main
from lightning_compress.low_rank.decompose import cost, dense_cost, factorize
from lightning_compress.low_rank.layers import Factorized
from lightning_compress.low_rank.published import CAFFENET_RANKS, VGG16_RANKS
from lightning_compress.run.shipped import recipe_files


def caffenet() -> nn.Sequential:
    """Return the convolutions of CaffeNet; the second, fourth and fifth see two groups."""
    table = [(3, 96, 11, 1), (96, 256, 5, 2), (256, 384, 3, 1), (384, 384, 3, 2), (384, 256, 3, 2)]
    return nn.Sequential(*(nn.Conv2d(i, o, k, padding=k // 2, groups=g) for i, o, k, g in table))


def vgg() -> nn.Module:
    return vgg16().features


def convolutions(net: nn.Module) -> dict[str, nn.Conv2d]:
    return {path: layer for path, layer in net.named_modules() if isinstance(layer, nn.Conv2d)}


def weights(net: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in convolutions(net).values())


@pytest.mark.parametrize(
    ("build", "ranks", "dense", "factors", "rate"),
    [(caffenet, CAFFENET_RANKS, 2_332_704, 466_312, 5.00), (vgg, VGG16_RANKS, 14_710_464, 5_358_573, 2.75)],
)
def test_published_ranks_give_the_published_counts(build, ranks, dense: int, factors: int, rate: float) -> None:
    with torch.device("meta"):
        net = build()
    layers = convolutions(net)
    assert weights(net) == dense
    assert sum(dense_cost(layer).weights for layer in layers.values()) == dense
    planned = sum(
        cost(layer, "spatial_svd", [rank]).weights for layer, rank in zip(layers.values(), ranks, strict=True)
    )
    for (path, _), rank in zip(layers.items(), ranks, strict=True):
        apply(net, Edit("replace", path, "low_rank", {"method": "spatial_svd", "ranks": [rank]}))
    assert weights(net) == planned == factors
    assert round(dense / factors, 2) == rate


def test_the_closed_form_builds_the_same_layers() -> None:
    for layer, rank in zip(convolutions(caffenet()).values(), CAFFENET_RANKS, strict=True):
        found = factorize(layer, "spatial_svd", [rank])
        assert isinstance(found.module, Factorized)
        parts = found.module.layers()
        assert sum(part.weight.numel() for part in parts) == cost(layer, "spatial_svd", [rank]).weights
        assert [part.groups for part in parts] == [layer.groups] * 2
        assert 0 < found.error < 1


@pytest.mark.parametrize(
    ("name", "sum_of_weights"),
    [
        ("caffenet_tai", "5 layers                      2,332,704 to 466,312 weights, 5.00 times fewer;"),
        pytest.param(
            *("vgg16_tai", "13 layers                   14,710,464 to 5,358,573 weights, 2.75 times fewer;"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_plans_of_the_recipes_show_the_published_counts(
    name: str, sum_of_weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([f"recipes={name}", "task=plan", "hydra.run.dir=run"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  sum ")]
    assert line.split() == ["sum", *sum_of_weights.split(), "biases", "and", "norms", "not", "counted"]


@pytest.mark.parametrize(("name", "ranks"), [("caffenet_tai", CAFFENET_RANKS), ("vgg16_tai", VGG16_RANKS)])
def test_the_ranks_of_the_recipes_are_the_published_ones(name: str, ranks: tuple[int, ...]) -> None:
    rules = OmegaConf.load(recipe_files()[name]).callbacks.low_rank.factors.rules
    assert tuple(rule.rank for rule in rules.values()) == ranks
