"""The benchmark of merging in miniature."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import merging_mnist
from lightning_compress.data import MNISTDataModule
from lightning_compress.models import LeNet300100


@pytest.fixture
def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 10, (256,), generator=generator)
    pixels = torch.rand(256, 1, 28, 28, generator=generator) * 0.2
    for row, label in enumerate(labels.tolist()):
        pixels[row, 0, 2 * label + 3 : 2 * label + 6] += 0.8
    return pixels, labels


def test_merging_and_its_rivals_have_the_small_size(images: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    net = merging_mnist.train(LeNet300100(), images, epochs=4, seed=0)
    cut = merging_mnist.without_weakest(net, 0.8)
    assert (cut.fc1.out_features, cut.fc2.out_features) == (60, 20)
    scratch = merging_mnist.fresh(cut, seed=1)
    sizes = [sum(p.numel() for p in each.parameters()) for each in (cut, scratch)]
    assert sizes[0] == sizes[1] == 785 * 60 + 61 * 20 + 21 * 10
    tuned = merging_mnist.train(cut, images, epochs=2, seed=0)
    assert not torch.equal(tuned.fc1.weight, cut.fc1.weight)


def test_a_seed_gives_all_figures(images: tuple[Tensor, Tensor]) -> None:
    figures: merging_mnist.Figures = {}
    for seed in (1, 2):
        merging_mnist.one_seed(images, images, seed, True, figures)
    assert all(len(values) == 2 for values in figures.values())
    rows = {row.case: row for row in merging_mnist.rows_of(figures)}
    assert rows["hidden units, small"].value == 80
    assert rows["hidden units, small"].met
    assert rows["parameters, small"].ratio == pytest.approx(48_530 / 266_610)
    assert rows["test error, merged"].goal == pytest.approx(rows["test error, weakest units cut"].value)
    assert rows["test error, merged, fine-tuned"].against == "small network from scratch, the same seeds"


def test_missing_data_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.argv", ["merging_mnist", "--quick", "--out", str(tmp_path)])
    monkeypatch.setattr(merging_mnist, "MNISTDataModule", lambda: MNISTDataModule(tmp_path / "nowhere"))
    merging_mnist.main()
    assert capsys.readouterr().out.startswith("skipped, there is no MNIST: `root`")
    assert not list(tmp_path.glob("*.json"))
