"""Adapters: channels, sizes and tokens, by hand and against torch's own layers."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.distillation import losses
from lightning_compress.distillation.adapters import Adapters, Regressor, resize, resize_like, seeded_layers


@pytest.mark.parametrize(
    ("student", "teacher", "channel_dim", "kind"),
    [
        ((4, 3), (4, 5), 1, nn.Linear),
        ((4, 3, 6), (4, 5, 6), 1, nn.Conv1d),
        ((4, 3, 6, 6), (4, 5, 3, 3), 1, nn.Conv2d),
        ((4, 3, 4, 4, 4), (4, 5, 2, 2, 2), 1, nn.Conv3d),
        ((4, 7, 3), (4, 9, 5), -1, nn.Conv1d),
        ((4, 6, 6, 3), (4, 3, 3, 5), -1, nn.Conv2d),
    ],
)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_regressor_maps_channels_position_by_position(
    student: tuple[int, ...], teacher: tuple[int, ...], channel_dim: int, kind: type, batch_norm: bool
) -> None:
    regressor = Regressor(student, teacher, channel_dim, batch_norm=batch_norm)
    assert type(regressor.project) is kind
    features = torch.randn(*student, generator=torch.Generator().manual_seed(0))
    found = regressor(features).movedim(channel_dim, -1)
    weight = regressor.project.weight.flatten(1)
    expected = features.movedim(channel_dim, -1) @ weight.T
    if batch_norm:
        axes = tuple(range(expected.dim() - 1))
        mean, variance = expected.mean(axes), expected.var(axes, unbiased=False)
        expected = (expected - mean) / (variance + 1e-5).sqrt()
        assert regressor.project.bias is None
    else:
        expected = expected + regressor.project.bias
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_papers_regressor_gives_the_teachers_size() -> None:
    for size, other in itertools.product([(9,), (9, 8), (5, 4, 3)], [1, 3]):
        target = [max(n - other + 1, 1) for n in size]
        regressor = Regressor((2, 3, *size), (2, 5, *target), kernel="valid")
        assert regressor(torch.zeros(2, 3, *size)).shape == (2, 5, *target)
    tokens = Regressor((2, 9, 3), (2, 7, 5), channel_dim=-1, kernel="valid")
    assert tokens(torch.zeros(2, 9, 3)).shape == (2, 7, 5)
    flat = Regressor((2, 3), (2, 5), kernel="valid")
    assert flat(torch.zeros(2, 3)).shape == (2, 5)


def test_resizing_averages_and_interpolates() -> None:
    maps = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert resize(maps, (2, 2)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert resize(maps, (4, 4)) is maps
    uneven = resize(torch.arange(5.0).reshape(1, 1, 5), (2,))
    assert uneven.flatten().tolist() == [1.0, 3.0]  # adaptive windows 0..2 and 2..4
    line = torch.tensor([0.0, 4.0]).reshape(1, 1, 2)
    assert resize(line, (4,)).flatten().tolist() == [0.0, 1.0, 3.0, 4.0]
    mixed = resize(torch.ones(1, 2, 4, 4), (2, 8))
    assert mixed.shape == (1, 2, 2, 8)
    assert torch.equal(mixed, torch.ones_like(mixed))


@settings(max_examples=20, deadline=None)
@given(old=st.lists(st.integers(1, 6), min_size=1, max_size=3), factor=st.integers(1, 3), channels=st.integers(1, 3))
def test_shrinking_by_a_whole_factor_is_the_mean_of_blocks(old: list[int], factor: int, channels: int) -> None:
    generator = torch.Generator().manual_seed(sum(old))
    large = torch.randn(2, channels, *(factor * n for n in old), generator=generator, dtype=torch.float64)
    found = resize(large, old)
    blocks = large.numpy().reshape(2, channels, *(number for n in old for number in (n, factor)))
    assert np.allclose(found.numpy(), blocks.mean(tuple(range(3, 3 + 2 * len(old), 2))))
    last = resize_like(large.movedim(1, -1), torch.zeros(2, *old, 9), channel_dim=-1)
    assert torch.equal(last, found.movedim(1, -1))


def test_hints_follow_inputs_of_changing_size() -> None:
    """Adapters are built from one batch, but the next may have other heights and widths (multi-scale training)."""
    loss = losses.FitNetsHints()
    adapter = loss.adapt([(2, 3, 16, 16)], [(2, 5, 8, 8)])
    assert adapter is not None
    for size in (4, 8, 12):
        found = loss(*adapter(torch.ones(2, 3, 2 * size, 2 * size), torch.ones(2, 5, size, size)), None, 1.0)
        assert torch.isfinite(found)
        found.backward()


def test_adapters_keep_the_form_and_stop_gradients_into_the_teacher() -> None:
    adapters = Adapters([nn.Linear(2, 3), None], [None, nn.Linear(4, 4)])
    student = (torch.ones(1, 2, requires_grad=True), torch.ones(1, 4, requires_grad=True))
    teacher = (torch.ones(1, 3, requires_grad=True), torch.ones(1, 4, requires_grad=True))
    ours, theirs = adapters(student, teacher)
    assert isinstance(ours, tuple)
    assert isinstance(theirs, tuple)
    sum(part.sum() for part in (*ours, *theirs)).backward()  # type: ignore[union-attr]
    assert all(part.grad is not None for part in student)
    assert all(part.grad is None for part in teacher)
    assert all(parameter.grad is not None for parameter in adapters.parameters())


def test_seeded_layers_do_not_depend_on_the_default_device_or_touch_random_states() -> None:
    state = torch.get_rng_state()
    with seeded_layers(3):
        one = nn.Linear(4, 4)
    with torch.device("meta"), seeded_layers(3):
        other = nn.Linear(4, 4)
    with seeded_layers(4):
        third = nn.Linear(4, 4)
    assert torch.equal(one.weight, other.weight)
    assert not torch.equal(one.weight, third.weight)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (lambda: Regressor((2, 3), (2, 3, 4)), ["`Regressor`", "(2, 3)", "(2, 3, 4)", "tap"]),
        (lambda: Regressor((2,), (2,)), ["`Regressor`", "2 to 5"]),
        (lambda: Regressor((2, 3, 4), (2, 3, 5), kernel="conv"), ["`kernel`", "'valid'"]),
        (lambda: Regressor((2, 3, 4), (2, 3, 5), kernel="valid"), ["`kernel`", "pointwise"]),
        (lambda: resize(torch.zeros(2, 3), (4,)), ["(2, 3)", "(4,)"]),
        (lambda: resize(torch.zeros(2, 3, 4), (4, 4)), ["resized", "(4, 4)"]),
        (lambda: resize(torch.zeros(2, 3, 4, 4), (0, 2)), ["at least 1", "(0, 2)"]),
    ],
)
def test_errors(action: object, words: list[str]) -> None:
    assert callable(action)
    with pytest.raises(ConfigurationError) as error:
        action()
    assert all(word in str(error.value) for word in words), str(error.value)
