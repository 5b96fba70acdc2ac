"""Errors for all ranks at once, against factors that are really built and run."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_compress import LowRank, compress, journal_of
from lightning_compress.core.patches import layer_patches
from lightning_compress.low_rank.decompose import factorize, full_ranks, spectra
from lightning_compress.low_rank.errors import error_profile
from lightning_compress.low_rank.looking import look, sample_rows
from lightning_compress.low_rank.tables import in_steps, table_of

LAYERS: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 8, bias=False), "svd", (64, 12)),
    "tall": (lambda: nn.Linear(6, 15, bias=False), "svd", (64, 6)),
    "pointwise": (lambda: nn.Conv2d(6, 10, 1, groups=2, bias=False), "svd", (8, 6, 5, 5)),
    "channels": (lambda: nn.Conv2d(6, 10, 3, stride=2, padding=1, bias=False), "channel_svd", (8, 6, 9, 9)),
    "spatial": (lambda: nn.Conv2d(6, 8, (3, 5), padding="same", bias=False), "spatial_svd", (8, 6, 7, 9)),
    "spatial_groups": (lambda: nn.Conv2d(6, 8, 3, dilation=2, groups=2, bias=False), "spatial_svd", (8, 6, 9, 9)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, padding=1, bias=False), "channel_svd", (8, 6, 12)),
    "conv3d": (lambda: nn.Conv3d(3, 4, (2, 3, 2), bias=False), "spatial_svd", (6, 3, 4, 5, 4)),
}


def inputs_for(size: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    channels = torch.linspace(0.2, 2.0, size[1]).reshape(1, -1, *(1,) * (len(size) - 2))
    return torch.randn(size, generator=generator) * channels + 0.5


@pytest.mark.parametrize("name", LAYERS)
def test_output_errors_are_those_of_the_factors(name: str) -> None:
    build, method, size = LAYERS[name]
    torch.manual_seed(1)
    layer, x = build(), inputs_for(size)
    ranks, errors, _ = error_profile(layer, method, layer_patches(layer, x))
    assert ranks[-1] == full_ranks(layer, method)
    with torch.no_grad():
        whole = layer(x).double()
        built = [
            float((layer_out(factorize(layer, method, rank).module, x) - whole).square().sum() / whole.square().sum())
            for rank in ranks
        ]
    np.testing.assert_allclose(errors, np.minimum.accumulate(built), atol=2e-4)


def layer_out(module: nn.Module, x: Tensor) -> Tensor:
    return module(x).double()


def test_a_transposed_convolution_is_weighed_by_what_single_inputs_spread() -> None:
    torch.manual_seed(1)
    layer, x = nn.ConvTranspose2d(6, 4, 3, stride=3, bias=False), inputs_for((8, 6, 5, 5))
    rows = sample_rows(layer, x, 10_000, torch.Generator().manual_seed(0))
    for method in ("spatial_svd", "channel_svd"):
        ranks, errors, _ = error_profile(layer, method, rows)
        with torch.no_grad():  # with a stride like the kernel nothing overlaps
            whole = layer(x)
            built = [float((factorize(layer, method, rank).module(x) - whole).square().sum()) for rank in ranks]
        np.testing.assert_allclose(errors, np.minimum.accumulate(built) / float(whole.square().sum()), atol=2e-4)


def test_an_embedding_is_weighed_by_how_often_its_rows_are_looked_up() -> None:
    torch.manual_seed(1)
    table, often = nn.Embedding(20, 6), torch.tensor([3, 3, 3, 7, 3, 7])
    ranks, errors, _ = error_profile(table, "svd", often)
    with torch.no_grad():
        whole = table(often)
        built = [float((factorize(table, "svd", rank).module(often) - whole).square().sum()) for rank in ranks]
    np.testing.assert_allclose(errors, np.minimum.accumulate(built) / float(whole.square().sum()), atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_without_data_the_tail_of_the_spectrum_counts(name: str) -> None:
    build, method, _ = LAYERS[name]
    layer = build()
    ranks, errors, _ = error_profile(layer, method)
    energies = spectra(layer, method)[0].double().square().sum(0)
    expected = 1 - energies.cumsum(0) / energies.sum()
    np.testing.assert_allclose(errors, expected.numpy(), atol=1e-6)
    one = ranks[len(ranks) // 2]
    assert factorize(layer, method, one).error ** 2 == pytest.approx(errors[len(ranks) // 2], abs=1e-5)


def test_nothing_is_lost_of_a_layer_that_is_zero() -> None:
    layer = nn.Linear(4, 4, bias=False)
    nn.init.zeros_(layer.weight)
    assert error_profile(layer, "svd").errors.tolist() == [0.0] * 4
    assert error_profile(layer, "svd", torch.zeros(1, 5, 4)).errors.tolist() == [0.0] * 4


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in ("linear", "tall")])
def test_sampled_rows_are_rows_of_the_unfolded_input(name: str) -> None:
    build, _, size = LAYERS[name]
    layer, x = build(), inputs_for(size)
    every = layer_patches(layer, x)
    some = sample_rows(layer, x, 50, torch.Generator().manual_seed(0))
    assert some.shape[0] == every.shape[0]
    for group, rows in enumerate(some):
        assert torch.cdist(rows.double(), every[group].double()).min(1).values.max() < 1e-6


def test_looking_leaves_the_model_and_the_random_state_alone() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(36, 3)).train()
    before, state = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    first = look(net, {"0": net[0], "4": net[4]}, [torch.randn(6, 1, 5, 5)], lambda m, x: m(x), 8)
    torch.set_rng_state(state)
    again = look(net, {"0": net[0], "4": net[4]}, [torch.randn(6, 1, 5, 5)], lambda m, x: m(x), 8)
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in before.items())
    assert net.training
    assert torch.equal(first["0"].rows, again["0"].rows)
    assert not net[0]._forward_pre_hooks


def test_tables_hold_what_is_smaller_and_does_less() -> None:
    conv = nn.Conv2d(8, 16, 3, stride=2, padding=1)
    table = table_of("conv", conv, "spatial_svd", [(16, 16)])
    assert (table.parameters[:-1] < table.parameters[-1]).all()
    assert (table.macs[:-1] < table.macs[-1]).all()
    for pick in (0, len(table.ranks) - 2):
        module = factorize(conv, "spatial_svd", table.ranks[pick]).module
        assert table.parameters[pick] == sum(p.numel() for p in module.parameters())
    assert [rank for (rank,) in in_steps(table, 1, 8).ranks[:-1]] == [
        rank for (rank,) in table.ranks[:-1] if rank % 8 == 0
    ]
    tiny = table_of("tiny", nn.Linear(1, 9), "svd", [(1,)])
    assert (tiny.ranks, tiny.why) == (((),), "it would be larger at every rank")


@pytest.mark.parametrize("name", LAYERS)
def test_factors_follow_from_the_directions_that_the_errors_were_found_with(name: str) -> None:
    build, method, size = LAYERS[name]
    torch.manual_seed(1)
    layer = build()
    ranks, _, directions = error_profile(layer, method, layer_patches(layer, inputs_for(size)))
    for rank in ranks[::4]:
        known = factorize(layer, method, rank, directions=directions)
        assert known.error == pytest.approx(factorize(layer, method, rank).error, abs=1e-6)


def test_square_transposed_convolutions_are_weighed_like_others() -> None:
    torch.manual_seed(1)
    layer, x = nn.ConvTranspose2d(8, 8, 1, bias=False), inputs_for((8, 8, 5, 5))
    rows = sample_rows(layer, x, 10_000, torch.Generator().manual_seed(0))
    ranks, errors, _ = error_profile(layer, "svd", rows)
    with torch.no_grad():
        whole = layer(x)
        built = [float((factorize(layer, "svd", rank).module(x) - whole).square().sum()) for rank in ranks]
    np.testing.assert_allclose(errors, np.minimum.accumulate(built) / float(whole.square().sum()), atol=2e-4)


def test_a_model_is_looked_at_and_factorized_with_one_decomposition_for_each_layer(monkeypatch) -> None:
    calls = []
    real = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda *args: calls.append(args[0].shape) or real(*args))
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 20))
    for batches in (None, [torch.randn(4, 3, 8, 8)]):
        calls.clear()
        done = compress(net, LowRank(2.0, batches=batches), example_inputs=torch.zeros(1, 3, 8, 8))
        assert [tuple(shape) for shape in calls] == [(9, 9), (20, 20)]
        assert "3" in [edit.path for edit in journal_of(done)]


@pytest.mark.parametrize("method", ["svd", "tt"])
def test_parameters_in_tables_are_those_of_the_modules_bias_included(method: str) -> None:
    layer = nn.Linear(48, 36)
    table = table_of("fc", layer, method, [(1,)])
    for ranks, counted in list(zip(table.ranks, table.parameters, strict=True))[:-1]:
        assert counted == sum(p.numel() for p in factorize(layer, method, ranks).module.parameters())
    assert len(table.ranks) > 3


def test_times_rise_with_operations_traffic_calls_and_every_sixteenth_channel() -> None:
    layer = nn.Linear(100, 80, bias=False)
    table = table_of("fc", layer, "svd", [(1,)])
    assert table.time[-1] == 8000 * (1 + 11) + 4 * 180 + 5e5
    assert table.time[9] == 1800 * (1 + 11) + 4 * (180 + 20) + 2 * 5e5
    conv = table_of("conv", nn.Conv2d(64, 64, 3, padding=1), "spatial_svd", [(14, 14)])
    steps = np.diff(conv.time[:-1])
    assert steps[15] == pytest.approx(steps[0] * (1 + 15 * 2 / 3))  # from 16 channels to 17
    assert steps[16] == pytest.approx(steps[0] / 3)
    assert conv.time[31] == pytest.approx(conv.time[0] + 31 * steps[0])
    assert np.diff(conv.macs[:-1]).max() == np.diff(conv.macs[:-1]).min()
