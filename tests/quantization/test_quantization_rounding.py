"""Rounding by Hessian and by descent, equalization and bias correction, against independent references."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from networks import Residual, Small, randomize
from torch import Tensor, nn

from lightning_compress import ConfigurationError
from lightning_compress.core.hessians import damp, layer_hessian
from lightning_compress.quantization.post_training.adaround import ada_round
from lightning_compress.quantization.post_training.bias import bias_shifts, output_means, shift_output
from lightning_compress.quantization.post_training.chains import Pair, find_pairs
from lightning_compress.quantization.post_training.equalization import (
    equalize,
    equalize_pair,
    equalizing_scales,
    input_view,
    output_peaks,
)
from lightning_compress.quantization.post_training.rounding import Grid, gptq_round, output_error, without_bias


def problem(seed: int, rows: int, columns: int) -> tuple[Tensor, Tensor, Grid]:
    """Return weights, the Hessian of correlated inputs, and a grid of 3 bits."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(200, columns, dtype=torch.float64, generator=generator)
    inputs = inputs @ torch.randn(columns, columns, dtype=torch.float64, generator=generator)
    weight = torch.randn(rows, columns, dtype=torch.float64, generator=generator)
    scale = weight.abs().amax(1, keepdim=True) / 3
    return weight, 2 * inputs.T @ inputs / 200, Grid(scale, torch.zeros_like(scale), (-3, 3))


def brain_surgeon(row: np.ndarray, hessian: np.ndarray, scale: float) -> np.ndarray:
    """Round one row in the order of the diagonal, and solve for what is left anew after each column."""
    order = np.argsort(-np.diag(hessian), kind="stable")
    left, done = row.astype(float).copy(), np.zeros_like(row)
    for place, j in enumerate(order):
        done[j] = np.clip(np.round(left[j] / scale), -3, 3) * scale
        later = order[place + 1 :]
        if len(later):  # least squares: H_ll x = H_ll w_l + H_lj (w_j - q)
            inner = hessian[np.ix_(later, later)]
            left[later] += np.linalg.solve(inner, hessian[later, j] * (left[j] - done[j]))
    return done


@pytest.mark.parametrize("columns", [5, 140])
def test_gptq_is_the_least_squares_solution_column_by_column(columns: int) -> None:
    weight, hessian, grid = problem(1, 3, columns)
    found = gptq_round(weight, hessian, grid, damping=1e-3)
    damped, nearest, gained = damp(hessian, 1e-3).numpy(), grid.nearest(weight), 0
    for r, (row, scale) in enumerate(zip(weight, grid.scale, strict=True)):
        wanted = torch.from_numpy(brain_surgeon(row.numpy(), damped, float(scale)))
        errors = [output_error((values - row)[None], hessian) for values in (wanted, nearest[r])]
        gained += errors[0] < errors[1]
        torch.testing.assert_close(found[r], wanted if errors[0] < errors[1] else nearest[r], atol=1e-9, rtol=0)
    assert gained >= 1


@pytest.mark.parametrize("function", [gptq_round, ada_round])
@pytest.mark.parametrize("seed", range(4))
def test_lies_between_nearest_and_the_best_of_all(function, seed: int) -> None:
    weight, hessian, grid = problem(seed, 1, 6)
    best = min(
        output_error(grid.clamp(torch.floor(weight / grid.scale) + torch.tensor([up])) * grid.scale - weight, hessian)
        for up in itertools.product((-1.0, 0.0, 1.0, 2.0), repeat=6)
    )
    nearest = output_error(grid.nearest(weight) - weight, hessian)
    error = output_error(function(weight, hessian, grid) - weight, hessian)
    assert best - 1e-9 <= error <= nearest + 1e-9


@pytest.mark.parametrize("function", [gptq_round, ada_round])
def test_zeros_stay_zeros_and_much_is_gained(function) -> None:
    weight, hessian, grid = problem(7, 16, 48)
    weight[:, ::3] = 0
    rounded = function(weight, hessian, grid)
    assert (rounded[:, ::3] == 0).all()
    integers = rounded / grid.scale
    assert torch.equal(integers, integers.round().clamp(-3, 3)) or (integers - integers.round()).abs().max() < 1e-9
    assert output_error(rounded - weight, hessian) < 0.85 * output_error(grid.nearest(weight) - weight, hessian)


def test_affine_grid_reaches_from_end_to_end() -> None:
    grid = Grid(torch.tensor([[0.5]]), torch.tensor([[1]]), (0, 3))
    assert grid.nearest(torch.tensor([[-9.0, -0.3, 0.6, 9.0]])).tolist() == [[-0.5, -0.5, 0.5, 1.0]]


def test_refuses_inputs_that_are_all_zero() -> None:
    weight, hessian, grid = problem(0, 1, 3)
    with pytest.raises(ConfigurationError, match="all zero or not finite"):
        gptq_round(weight, hessian * 0, grid)


def test_best_bias_is_that_of_least_squares() -> None:
    layer, inputs = nn.Linear(5, 3).double(), torch.randn(40, 5, dtype=torch.float64) + 1
    change = torch.randn(3, 5, dtype=torch.float64) * 0.1
    hessian, means = without_bias(layer_hessian(layer, inputs) / 40)
    torch.testing.assert_close(means[0], inputs.mean(0))
    errors = inputs @ change.T
    assert output_error(change, hessian[0]) == pytest.approx(float((errors - errors.mean(0)).square().mean(0).sum()))


def test_equalized_pairs_have_equal_ranges_by_hand() -> None:
    assert equalizing_scales(torch.tensor([4.0, 9.0]), torch.tensor([1.0, 1.0])).tolist() == [2.0, 3.0]
    first, second = nn.Linear(2, 2), nn.Linear(2, 1)
    first.weight.data, second.weight.data = torch.tensor([[4.0, -1.0], [0.5, 1.0]]), torch.tensor([[1.0, 4.0]])
    first.bias.data.fill_(2.0)
    assert equalize_pair(first, second).tolist() == [2.0, 0.5]
    assert first.weight.tolist() == [[2.0, -0.5], [1.0, 2.0]]
    assert first.bias.tolist() == [1.0, 4.0]
    assert second.weight.tolist() == [[2.0, 2.0]]


class Chain(nn.Module):
    """Every kind of pair: with and without batch norm, depthwise, grouped, pooled, flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.depth = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU())
        self.group = nn.Conv2d(8, 12, 3, groups=2, padding=1)
        self.point = nn.Conv2d(12, 6, 1)
        self.fc = nn.Linear(6 * 9, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.group(self.depth(self.stem(x))))
        x = nn.functional.max_pool2d(torch.relu(self.point(x)), 2)
        return self.head(nn.functional.leaky_relu(self.fc(x.flatten(1))))


def test_a_chain_of_all_kinds_stays_the_same_function() -> None:
    torch.manual_seed(0)
    net = randomize(Chain()).eval()
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):  # channels of very different sizes
                layer.weight.mul_(
                    torch.exp(torch.randn(len(layer.weight)) * 2).view(-1, *[1] * (layer.weight.dim() - 1))
                )
    layers = dict(net.named_modules())
    pairs = find_pairs(net, ["stem.0", "depth.0", "group", "point", "fc", "head"])
    assert [(pair.first, pair.second) for pair in pairs] == [
        ("stem.0", "depth.0"),
        ("depth.0", "group"),
        ("group", "point"),
        ("point", "fc"),
        ("fc", "head"),
    ]
    x = torch.randn(5, 1, 6, 6)
    before = net(x)
    spread = output_peaks(net.fc).max() / output_peaks(net.fc).min()
    assert equalize(net, layers, pairs, x, sweeps=40) == {}
    torch.testing.assert_close(net(x), before, rtol=1e-3, atol=1e-3 * float(before.detach().abs().max()))
    assert output_peaks(net.fc).max() / output_peaks(net.fc).min() < spread
    torch.testing.assert_close(  # the last pair is at rest: both ranges are the same in every channel
        output_peaks(net.fc), input_view(net.head, 10).abs().amax((1, 3)).flatten(), rtol=0.05, atol=0
    )


def test_no_pair_across_what_a_scale_does_not_pass() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU6(), nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    assert find_pairs(net, ["0", "2", "4"]) == []
    assert [(p.first, p.second, p.norm) for p in find_pairs(Residual(4), ["conv1", "conv2"])] == [
        ("conv1", "conv2", "bn1")
    ]
    assert find_pairs(Small(), ["stem.0", "block.0.conv1"]) == []  # the block's input is also added to its output


def test_a_pair_that_would_change_the_network_is_put_back() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    net[0].weight.data.mul_(9)
    x, before = torch.randn(6, 2), {key: value.clone() for key, value in net.state_dict().items()}
    left = equalize(net, dict(net.named_children()), [Pair("0", "2")], x)
    assert left == {"2": "not equalized with 0: the network would compute something else"}
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_bias_correction_brings_every_mean_back() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(2, 4, 3, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 3, 1)).eval()
    batch = torch.randn(16, 2, 9) + 1
    layers = {"0": net[0], "3": net[3]}
    wanted = output_means(net, layers, [batch])
    for layer in layers.values():
        layer.weight.data.add_(0.2)
    shifts = bias_shifts(net, layers, wanted, [batch])
    assert shift_output(net[0], net[1], shifts["0"])
    assert shift_output(net[3], None, shifts["3"])
    torch.testing.assert_close(net(batch).mean((0, 2)), wanted["3"][0].float(), atol=1e-5, rtol=1e-4)
    assert not shift_output(nn.Conv1d(1, 1, 1, bias=False), None, torch.zeros(1))
