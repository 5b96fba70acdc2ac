import copy

import pytest
import torch
from torch import nn

from lightning_compress.evaluation.flips import count_flips, prediction_flip_rate


class Constant(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x):
        return self.output


def models(one, two):
    return Constant(one), Constant(two)


def test_four_samples_by_hand():
    one = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    two = torch.tensor([[2.0, 0.0], [0.0, 9.0], [0.0, 1.0], [0.0, 1.0]])
    assert prediction_flip_rate(*models(one, two), [torch.zeros(4, 1)]) == 0.25


def test_batches_are_weighted_by_their_size():
    torch.manual_seed(0)
    one, two = nn.Linear(3, 5), nn.Linear(3, 5)
    x = torch.randn(10, 3)
    expected = (one(x).argmax(1) != two(x).argmax(1)).float().mean().item()
    assert prediction_flip_rate(one, two, [(x[:7], "label"), [x[7:], 0]]) == pytest.approx(expected)
    assert expected > 0


def test_every_position_of_a_dense_prediction_counts():
    one, two = torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2)
    one[:, 0], two[:, 0] = 1, 1
    two[0, 1, 0, 0] = 5
    flips = count_flips(*models(one, two), [torch.zeros(1)])
    assert (flips.changed, flips.total, flips.rate) == (1, 4, 0.25)


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_one_output_is_classed_by_its_sign(shape):
    one, two = torch.tensor([1.0, -1.0, 2.0, -2.0]), torch.tensor([1.0, 1.0, 2.0, -2.0])
    assert prediction_flip_rate(*models(one.view(shape), two.view(shape)), [torch.zeros(1)]) == 0.25


@pytest.mark.parametrize(
    ("one", "two", "reason"),
    [
        (torch.tensor([0.1, 0.9]), torch.tensor([0.9, 0.9]), "no output is negative"),
        ([torch.zeros(2, 2)], [torch.zeros(2, 2)], "the output is a list"),
        (torch.zeros(2, 2, dtype=torch.long), torch.zeros(2, 2, dtype=torch.long), "torch.int64"),
        (torch.tensor(1.0), torch.tensor(1.0), "not scores"),
        (torch.zeros(2, 2), torch.zeros(3, 2), "different shapes"),
    ],
)
def test_unknown_with_a_reason(one, two, reason):
    flips = count_flips(*models(one, two), [torch.zeros(1)])
    assert flips.rate is None
    assert reason in flips.reason


@pytest.mark.parametrize(
    ("shape", "targets", "flips"),
    [
        ((4,), torch.tensor([0.2, -1.5, 3.0, 0.7]), False),
        ((4, 1), torch.tensor([[7], [0], [3], [1]]), False),
        ((4, 1), torch.tensor([[1.0], [0.0], [0.0], [1.0]]), True),
        ((4,), torch.tensor([1, -1, 1, -1]), True),
        ((2, 2), torch.tensor([[0.3, -2.0], [1.5, 0.1]]), False),
        ((2, 2), torch.tensor([0.3, -2.0]), False),
        ((2, 2), torch.tensor([0.0, 1.0]), True),
        ((2, 2), torch.tensor([1, 0]), True),
        ((2, 2), torch.tensor([[0.9, 0.1], [0.25, 0.75]]), True),
        ((2, 2), torch.tensor([[1.0, 1.0], [0.0, 1.0]]), True),
    ],
)
def test_quantities_do_not_flip(shape, targets, flips):
    one, two = torch.tensor([1.0, -1.0, 2.0, -2.0]).view(shape), torch.tensor([1.0, 1.0, -2.0, -1.0]).view(shape)
    found = count_flips(*models(one, two), [(torch.zeros(1), targets)])
    assert (found.rate is not None) == flips
    assert flips or found.reason == "the targets are quantities, not classes, so no prediction can flip"


def test_a_batch_without_a_tensor_and_no_batch_at_all():
    net = nn.Linear(1, 2)
    assert "dict" in count_flips(net, net, [{"x": torch.zeros(1, 1)}]).reason
    assert "no batch" in count_flips(net, net, []).reason


def test_own_predict():
    net, other = nn.Linear(2, 2), nn.Linear(2, 2)
    batches = [{"x": torch.randn(6, 2)}]
    assert prediction_flip_rate(net, other, batches, lambda model, batch: model(batch["x"]).argmax(1) * 0) == 0.0


def test_modes_are_given_back():
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.9)).train()
    assert prediction_flip_rate(net, net, [torch.randn(50, 2)]) == 0.0
    assert net.training
    assert net[1].training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_other_types_get_inputs_of_theirs(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    other = copy.deepcopy(net).to(dtype)
    assert prediction_flip_rate(net, other, [torch.eye(4)]) == 0.0
