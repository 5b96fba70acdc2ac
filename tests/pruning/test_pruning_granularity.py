"""Groups of weights: against indices written out, and by what a layer then computes."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.pruning.granularity import (
    Granularity,
    Layout,
    expand_mask,
    from_units,
    group_scores,
    layout_of,
    may_go,
    misfit,
    parse_granularity,
    to_units,
)

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(8, 4, bias=False), (3, 8)),
    "conv1d": (nn.Conv1d(4, 6, 3, bias=False), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), bias=False), (2, 4, 5, 5)),
    "conv3d": (nn.Conv3d(2, 4, 2, bias=False), (2, 2, 3, 3, 3)),
    "grouped": (nn.Conv2d(8, 4, 3, groups=2, bias=False), (2, 8, 5, 5)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4, bias=False), (2, 4, 5, 5)),
    "multiplier": (nn.Conv2d(4, 8, 3, groups=4, bias=False), (2, 4, 5, 5)),
    "transposed1d": (nn.ConvTranspose1d(4, 6, 3, bias=False), (2, 4, 5)),
    "transposed2d": (nn.ConvTranspose2d(4, 6, 3, stride=2, bias=False), (2, 4, 3, 3)),
    "transposed3d": (nn.ConvTranspose3d(2, 4, 2, bias=False), (2, 2, 3, 3, 3)),
    "transposed grouped": (nn.ConvTranspose2d(4, 8, 3, groups=2, bias=False), (2, 4, 3, 3)),
}
layers = pytest.mark.parametrize("name", LAYERS)


def places(layer: Any) -> Iterator[tuple[tuple[int, ...], int, int, tuple[int, ...], int, int]]:
    """Yield index, output, input (of the layer), kernel position, and output and input within the group."""
    weight, layout = layer.weight, layout_of(layer)
    for index in np.ndindex(tuple(weight.shape)):
        first, second, *position = index
        group = first // (weight.shape[0] // layout.groups)
        inside = first - group * (weight.shape[0] // layout.groups)
        if layout.transposed:
            yield index, group * weight.shape[1] + second, first, tuple(position), second, inside
        else:
            yield index, first, group * weight.shape[1] + second, tuple(position), inside, second


def group_ids(layer: Any, granularity: Granularity) -> np.ndarray[Any, Any]:
    names: dict[Any, int] = {}
    ids = np.zeros(tuple(layer.weight.shape), dtype=int)
    for index, out, into, position, o, i in places(layer):
        name = {
            "element": index,
            "row": out,
            "filter": out,
            "column": (into, position),
            "kernel": (out, into),
            "channel": into,
            "block": (out - o, o // granularity.a, into - i, i // granularity.b, position),
        }[granularity.kind]
        ids[index] = names.setdefault(name, len(names))
    return ids


@layers
@pytest.mark.parametrize("word", ["element", "row", "column", "kernel", "filter", "channel", "block:2x1", "block:2x2"])
def test_groups_against_indices(name: str, word: str) -> None:
    layer, granularity = LAYERS[name][0], parse_granularity(word)
    layout, weight = layout_of(layer), LAYERS[name][0].weight.detach()
    if misfit(weight.shape, granularity, layout):
        assert {"depthwise", "multiplier"} & {name}
        return
    ids = group_ids(layer, granularity)
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.permutation(weight.numel()).astype(np.float32)).reshape(weight.shape)
    flat = scores.numpy()
    expected = {
        "sum": [flat[ids == i].sum() for i in range(ids.max() + 1)],
        "mean": [flat[ids == i].mean() for i in range(ids.max() + 1)],
        "l2": [np.sqrt((flat[ids == i] ** 2).sum()) for i in range(ids.max() + 1)],
    }
    for how, values in expected.items():
        found = group_scores(scores, granularity, layout, how)
        np.testing.assert_allclose(sorted(found.flatten().tolist()), sorted(values), rtol=1e-6)
    # prune the lower half: the expanded mask is one value a group, and that of the group's score
    found = group_scores(scores, granularity, layout, "sum")
    cut = found.flatten().sort().values[found.numel() // 2]
    mask = expand_mask((found >= cut).to(torch.int8).neg(), granularity, layout, weight)
    assert mask.dtype == torch.int8
    assert mask.shape == weight.shape
    for i, value in enumerate(expected["sum"]):
        assert set(mask.numpy()[ids == i].tolist()) == {-1 if value >= float(cut) else 0}


@layers
def test_units_come_back(name: str) -> None:
    weight, layout = LAYERS[name][0].weight.detach(), layout_of(LAYERS[name][0])
    units = to_units(weight, layout)
    assert torch.equal(from_units(units, layout, weight.shape), weight)
    assert units.dim() == 4


def pruned(layer: Any, word: str, group: int) -> Tensor:
    """Remove one group of a layer of ones; return the mask."""
    granularity, layout = parse_granularity(word), layout_of(layer)
    mask = torch.full_like(group_scores(layer.weight.detach(), granularity, layout), -1, dtype=torch.int8)
    mask.view(-1)[group] = 0
    return expand_mask(mask, granularity, layout, layer.weight.detach())


@layers
def test_a_filter_is_what_makes_one_output(name: str) -> None:
    layer, shape = LAYERS[name]
    channel = -1 if name == "linear" else 1
    for word in ("filter", "row"):
        for output in (0, 1, 3):
            mask = pruned(layer, word, output)
            weight = {"weight": layer.weight.detach().abs() * (mask != 0)}
            result = torch.func.functional_call(layer, weight, torch.ones(shape))
            silent = [i for i in range(result.shape[channel]) if not result.select(channel, i).any()]
            assert silent == [output]


@layers
def test_a_channel_is_all_that_reads_one_input(name: str) -> None:
    layer, shape = LAYERS[name]
    channel = -1 if name == "linear" else 1
    for into in (0, 1):
        weight = {"weight": layer.weight.detach() * (pruned(layer, "channel", into) != 0)}
        x = torch.rand(shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
        torch.func.functional_call(layer, weight, x).square().sum().backward()
        unread = [i for i in range(shape[channel]) if not x.grad.select(channel, i).any()]
        assert unread == [into]


def test_four_weights() -> None:
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    sums = {
        word: group_scores(weight, parse_granularity(word), Layout(), "sum").flatten().tolist()
        for word in ("element", "row", "column", "kernel", "filter", "channel", "block:1x2", "block:2x1", "block:2x2")
    }
    assert sums == {
        "element": [1.0, 2.0, 3.0, 4.0],
        "row": [3.0, 7.0],
        "filter": [3.0, 7.0],
        "column": [4.0, 6.0],
        "channel": [4.0, 6.0],
        "kernel": [1.0, 2.0, 3.0, 4.0],
        "block:1x2": [3.0, 7.0],
        "block:2x1": [4.0, 6.0],
        "block:2x2": [10.0],
    }
    assert group_scores(weight, Granularity("row"), Layout(), "first").flatten().tolist() == [1.0, 3.0]
    assert group_scores(weight, Granularity("row"), Layout(), "l2").flatten().tolist() == pytest.approx([5**0.5, 5.0])


def test_matrices_of_other_layers_have_rows_and_columns() -> None:
    lstm, bilinear = nn.LSTM(3, 2), nn.Bilinear(2, 3, 4)
    assert group_scores(lstm.weight_ih_l0, Granularity("row"), layout_of(lstm)).numel() == 8
    assert group_scores(lstm.weight_ih_l0, Granularity("column"), layout_of(lstm)).numel() == 3
    assert group_scores(bilinear.weight, Granularity("filter"), layout_of(bilinear)).numel() == 4


@layers
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (1, 4), (3, 4)])
def test_n_of_m_against_counting(name: str, n: int, m: int) -> None:
    layer, granularity = LAYERS[name][0], Granularity("n:m", n, m)
    weight, layout = layer.weight.detach(), layout_of(LAYERS[name][0])
    if misfit(weight.shape, granularity, layout):
        assert to_units(weight, layout).shape[2] % m
        return
    free = may_go(weight.abs(), granularity, layout).numpy()
    runs: dict[Any, list[tuple[float, bool]]] = {}
    for index, out, _, position, _, i in places(layer):
        runs.setdefault((out, position, i // m), []).append((abs(float(weight[index])), bool(free[index])))
    for run in runs.values():
        assert len(run) == m
        assert sum(goes for _, goes in run) == m - n
        assert max(value for value, goes in run if goes) <= min(value for value, goes in run if not goes)


def test_n_of_m_ties_go_to_the_earlier_input() -> None:
    assert may_go(torch.ones(1, 4), Granularity("n:m", 2, 4), Layout()).tolist() == [[True, True, False, False]]


def test_memory_format_is_kept() -> None:
    weight = torch.randn(8, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    layout, granularity = Layout(kernel=2), Granularity("filter")
    groups = group_scores(weight, granularity, layout)
    mask = expand_mask(torch.full_like(groups, -1, dtype=torch.int8), granularity, layout, weight)
    assert mask.stride() == weight.stride()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("filtr", "did you mean 'filter'"),
        ("block", r"`granularity` is 'block'.*'block:4x1'"),
        ("block:1x1", "at least two weights"),
        ("block:0x4", "at least two weights"),
        ("4:4", "fewer than all"),
        ("0:4", "at least 1"),
        ("5:4", "fewer than all"),
        (124, "in YAML write it in quotes"),
        (None, "must be a string"),
        ("2:4:8", "`granularity` is '2:4:8'"),
    ],
)
def test_words_that_mean_nothing(word: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        parse_granularity(word)


@pytest.mark.parametrize(
    ("word", "shape", "layout", "reason"),
    [
        ("2:4", (8, 6), Layout(), "its 6 inputs are not a multiple of 4"),
        ("2:4", (8, 1, 3, 3), Layout(8, False, 2), "its 1 inputs per group are not a multiple of 4"),
        ("2:4", (6, 8, 3, 3), Layout(1, True, 2), "its 6 inputs are not a multiple of 4"),
        ("block:4x1", (6, 8), Layout(), "its 6 outputs are not a multiple of 4"),
        ("block:2x3", (6, 8), Layout(), "its 8 inputs are not a multiple of 3"),
        ("filter", (7, 5), Layout(), None),
        ("2:4", (7, 8, 3, 3), Layout(1, False, 2), None),
    ],
)
def test_misfits(word: str, shape: tuple[int, ...], layout: Layout, reason: str | None) -> None:
    assert misfit(shape, parse_granularity(word), layout) == reason


@pytest.mark.parametrize("word", ["element", "filter", "block:4x1", "2:4"])
def test_words_round_trip(word: str) -> None:
    assert str(parse_granularity(word)) == word


def test_unknown_reduction() -> None:
    with pytest.raises(ConfigurationError, match="`how` is 'max'"):
        group_scores(torch.ones(2, 2), Granularity("row"), Layout(), "max")
