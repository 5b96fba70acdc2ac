"""The benchmark of second-order pruning in miniature."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import second_order_mnist as bench
from lightning_compress.data import MNISTDataModule


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 10, (200,), generator=generator)
    pixels = torch.rand(200, 1, 28, 28, generator=generator) * 0.2
    for row, label in enumerate(labels.tolist()):
        pixels[row, 0, 2 * label + 3 : 2 * label + 6] += 0.8
    return pixels, labels


@pytest.fixture(scope="module")
def net(images: tuple[Tensor, Tensor]) -> nn.Module:
    return bench.train(images, epochs=15, seed=0)


def test_gradients_are_those_of_single_images(net: nn.Module, images: tuple[Tensor, Tensor]):
    few = (images[0][:3], images[1][:3])
    found = list(bench.gradients(net, few))
    weights = [net.get_parameter(f"{name}.weight") for name in bench.LAYERS]
    for index, gradient in enumerate(found):
        loss = F.cross_entropy(net(few[0][index : index + 1]), few[1][index : index + 1])
        wanted = torch.cat([part.flatten() for part in torch.autograd.grad(loss, weights)])
        assert torch.allclose(gradient, wanted, atol=1e-6)
    assert len(found) == 3


def test_every_method_hits_the_share_of_zeros(net: nn.Module, images: tuple[Tensor, Tensor]):
    methods = bench.fisher_pruned(net, images, diagonal=60, full=20)
    dense = bench.test_error(net, images)
    assert dense < 20
    for name, method in methods.items():
        pruned = method(0.5)
        weights = [pruned.get_parameter(f"{layer}.weight") for layer in bench.LAYERS]
        zeros = sum(int((weight == 0).sum()) for weight in weights)
        assert zeros == round(0.5 * sum(weight.numel() for weight in weights)), name
        assert bench.test_error(pruned, images) < 60


def test_silenced_units_are_the_weakest(net: nn.Module):
    small = bench.without_neurons(net, 0.5, lambda w, n: w.norm(dim=1).argsort())
    silent = (small.fc3.weight == 0).all(0)
    norms = torch.cat([net.fc2.weight, net.fc2.bias[:, None]], 1).norm(dim=1)
    assert int(silent.sum()) == 50
    assert small.fc2.weight.shape == net.fc2.weight.shape
    assert norms[silent].mean() < norms[~silent].mean()


def test_rows_compare_with_what_must_be_beaten():
    errors = {
        ("dense", 0.0): [2.0, 2.0],
        ("magnitude", 0.9): [10.0, 12.0],
        ("OBD", 0.9): [8.0, 10.0],
        ("OBS", 0.9): [9.5, 9.5],
        ("WoodFisher", 0.9): [3.0, 3.0],
    }
    rows = {row.case: row for row in bench.rows_of(errors)}
    assert rows["test error, OBD, 90% zeros"].met
    assert rows["test error, OBD, 90% zeros"].goal == 11.0
    assert rows["test error, OBS, 90% zeros"].met is False
    assert rows["test error, WoodFisher, 90% zeros"].met is None
    assert rows["test error, OBD, 90% zeros: spread of seeds"].value == pytest.approx(math.sqrt(2), abs=1e-3)


def test_missing_data_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    monkeypatch.setattr("sys.argv", ["second_order_mnist", "--quick", "--out", str(tmp_path)])
    monkeypatch.setattr(bench, "MNISTDataModule", lambda: MNISTDataModule(tmp_path / "nowhere"))
    bench.main()
    shown = capsys.readouterr().out
    assert shown.startswith("skipped, there is no MNIST: `root`")
    assert not list(tmp_path.glob("*.json"))
