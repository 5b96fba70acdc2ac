"""The benchmarks of lottery tickets and of dynamic sparse training in miniature."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.data import TensorDataset

from benchmarks import _common as common
from benchmarks import dynamic_sparse_mnist, lottery_mnist
from benchmarks._mnist import error_on_test, mean_rows, new_classifier
from lightning_compress.data import ImageDataModule
from lightning_compress.data.module import Splits
from lightning_compress.data.order import ResumableLoader


class Stripes(ImageDataModule):
    """Images of 28 x 28 with a bright row that tells the class."""

    def __init__(self) -> None:
        super().__init__(batch_size=20, seed=0, num_workers=0, normalize=None, augment=None)

    def load(self) -> Splits:
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(0, 10, (200,), generator=generator)
        images = torch.randint(0, 60, (200, 1, 28, 28), generator=generator, dtype=torch.uint8)
        for image, label in zip(images, labels.tolist(), strict=True):
            image[0, 2 * label + 3 : 2 * label + 6] += 190
        split = images, labels
        return Splits(train=split, val=split, test=split, classes=tuple(map(str, range(10))))


@pytest.fixture
def data() -> Stripes:
    stripes = Stripes()
    stripes.setup("fit")
    return stripes


def test_the_error_counts_every_test_image(data: Stripes):
    module = new_classifier(0)
    assert error_on_test(module, data) > 50
    loader = ResumableLoader(TensorDataset(*data.splits.test), batch_size=7, shuffle=False)
    wrong = sum(int((module(x.float() / 255).argmax(1) != y).sum()) for x, y in loader)
    assert error_on_test(module, data) == wrong / 2


def test_rounds_of_a_ticket_in_miniature(data: Stripes):
    errors = lottery_mnist.run_rounds(data, seed=0, rounds=2, epochs=3)
    assert list(errors) == [*map(lottery_mnist.case_of, (0, 1, 2)), lottery_mnist.control_of(2)]
    assert "64.0%" in lottery_mnist.case_of(2)
    assert all(error < 20 for error in errors.values())


def test_rows_compare_means():
    errors = {"dense": [2.0, 4.0], "sparse": [1.0, 2.0]}
    rows = mean_rows(errors, {"sparse": "dense"}, ["sparse"])
    assert [row.value for row in rows] == [3.0, 1.4142, 1.5, 0.7071]
    assert rows[2].ratio == 0.5
    assert rows[2].met
    assert rows[2].against == "dense, the same seeds and steps"


def test_the_committed_ticket_matches_the_dense_network():
    content = json.loads((common.RESULTS / "lottery_mnist.json").read_text(encoding="utf-8"))
    assert content["environment"]["quick"] is False
    assert content["environment"]["seeds"] == 3
    (judged,) = [row for row in content["rows"] if row["goal"] is not None]
    assert "21.0%" in judged["case"]
    assert judged["met"]


def test_dynamic_methods_in_miniature(data: Stripes):
    errors = dynamic_sparse_mnist.run_methods(data, seed=0, sparsities=(0.5,), epochs=2)
    assert len(errors) == 4
    assert all(error < 40 for error in errors.values())


def test_the_committed_moving_masks_beat_masks_that_stay():
    content = json.loads((common.RESULTS / "dynamic_sparse_mnist.json").read_text(encoding="utf-8"))
    judged = [row for row in content["rows"] if row["goal"] is not None]
    assert len(judged) == 4
    assert all(row["met"] for row in judged)
    assert not content["environment"]["quick"]
