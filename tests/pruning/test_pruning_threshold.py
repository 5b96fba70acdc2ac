"""The exact k-th smallest, against a sort."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_compress.core.errors import CompressionError
from lightning_compress.pruning.threshold import Threshold, as_array, chunks, kth_smallest, storage_order
from lightning_compress.pruning.threshold import _kth_on_device as kth_on_device


def by_sorting(values: list[Tensor], k: int, absolute: bool) -> Threshold:
    flat = np.concatenate([value.detach().float().reshape(-1).numpy() for value in values])
    flat = np.sort(np.abs(flat) if absolute else flat)
    cut = flat[k - 1]
    below, upto = int((flat < cut).sum()), int((flat <= cut).sum())
    return Threshold(float(cut), k - below, upto > k)


@st.composite
def groups(draw: st.DrawFn) -> tuple[list[Tensor], int, bool]:
    numbers = draw(st.sampled_from([[0.0], [0.0, -0.0, 1.0], [-2.0, -1.0, 0.0, 1.0, 2.0], None]))
    element = st.sampled_from(numbers) if numbers else st.floats(width=32, allow_nan=False)
    dtypes = [torch.float32, torch.float64] + ([torch.float16, torch.bfloat16] if numbers else [])
    sizes = draw(st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(any))
    values = [
        torch.tensor(draw(st.lists(element, min_size=n, max_size=n)), dtype=draw(st.sampled_from(dtypes)))
        for n in sizes
    ]
    return values, draw(st.integers(1, sum(sizes))), draw(st.booleans())


@settings(max_examples=200, deadline=None)
@given(groups())
def test_equals_a_sort(drawn: tuple[list[Tensor], int, bool]) -> None:
    values, k, absolute = drawn
    assert kth_smallest(values, k, absolute) == by_sorting(values, k, absolute)
    assert kth_on_device(values, k, absolute) == by_sorting(values, k, absolute)


def test_the_way_of_accelerators_changes_nothing_and_sees_nan() -> None:
    value = torch.tensor([-3.0, 2.0, math.nan])
    with pytest.raises(CompressionError, match="NaN"):
        kth_on_device([value], 1, True)
    kth_on_device([value[:2]], 1, True)
    assert value[:2].tolist() == [-3.0, 2.0]


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("k", [1, 2, 70_000, 150_000, 299_999, 300_000])
def test_more_values_than_the_sample(k: int, absolute: bool) -> None:
    generator = torch.Generator().manual_seed(k)
    values = [torch.randn(300, 500, generator=generator), 1e-3 * torch.randn(150_000, generator=generator)]
    assert kth_smallest(values, k, absolute) == by_sorting(values, k, absolute)


def adversarial(name: str) -> list[Tensor]:
    n = 400_000
    if name == "all equal":
        return [torch.full((n,), 0.25)]
    if name == "mostly zero":
        value = torch.zeros(n)
        value[::1000] = torch.arange(400) + 1.0
        return [value]
    if name == "rare small values between sampled places":  # the sample of stride 3 sees none of them
        value = torch.ones(n)
        value[1::3] = 1e-3
        return [value]
    if name == "sorted":
        return [torch.linspace(-1, 1, n)]
    if name == "two scales":
        return [1e-20 * torch.arange(1, 200_001), 1e20 * torch.arange(1, 200_001)]
    if name == "infinities":
        value = torch.linspace(-1, 1, n)
        value[::7], value[3::7] = math.inf, -math.inf
        return [value]
    return [torch.arange(200.0) * (i % 7 + 1) for i in range(2_000)]


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "all equal",
        "mostly zero",
        "rare small values between sampled places",
        "sorted",
        "two scales",
        "infinities",
        "many small tensors",
    ],
)
def test_adversarial_distributions(name: str, absolute: bool) -> None:
    values = adversarial(name)
    for k in (1, 1_000, 199_999, 200_000, 399_600, 400_000):
        assert kth_smallest(values, k, absolute) == by_sorting(values, k, absolute), k


def test_five_million_against_numpy() -> None:
    value = torch.randn(5_000_000, generator=torch.Generator().manual_seed(0))
    k = 4_500_000
    assert kth_smallest([value], k, absolute=True).value == np.partition(np.abs(value.numpy()), k - 1)[k - 1]


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("place", [0, 1, 333_332, 999_999])
def test_nan_anywhere_is_an_error(place: int, absolute: bool) -> None:
    value = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    value[place] = math.nan
    for k in (1, 500_000, 1_000_000):
        with pytest.raises(CompressionError, match=r"NaN.*diverged"):
            kth_smallest([torch.zeros(3), value], k, absolute)


def test_nan_in_a_few_values() -> None:
    with pytest.raises(CompressionError, match="NaN"):
        kth_smallest([torch.tensor([1.0, math.nan])], 1)


@pytest.mark.parametrize("k", [-1, 0, 4])
def test_rank_out_of_range(k: int) -> None:
    with pytest.raises(CompressionError, match=r"`k` must lie in 1..3"):
        kth_smallest([torch.ones(3)], k)


def test_nothing_to_rank() -> None:
    with pytest.raises(CompressionError, match="`k`"):
        kth_smallest([torch.ones(0)], 1)


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 3),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": lambda x: x[:, ::2],
    "permuted and strided": lambda x: x.permute(2, 0, 3, 1)[1:, :, ::2],
    "expanded": lambda x: x[:1].expand(5, -1, -1, -1),
    "parameter": torch.nn.Parameter,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    value = LAYOUTS[layout](torch.randn(4, 6, 5, 3, generator=torch.Generator().manual_seed(0)))
    for k in (1, 17, value.numel()):
        assert kth_smallest([value], k, absolute=True) == by_sorting([value], k, True)
    assert sorted(as_array(value).tolist()) == sorted(value.flatten().tolist())


def test_dense_tensors_are_viewed_not_copied() -> None:
    value = torch.randn(4, 6, 5, 3)
    for dense in (value, value.permute(2, 0, 3, 1), value.contiguous(memory_format=torch.channels_last)):
        assert storage_order(dense).data_ptr() == dense.data_ptr()
        assert as_array(dense).ctypes.data == dense.data_ptr()


def test_ranking_leaves_the_values_alone() -> None:
    value = torch.tensor([-3.0, 2.0, -1.0])
    kth_smallest([value], 2, absolute=True)
    assert value.tolist() == [-3.0, 2.0, -1.0]
    list(chunks(as_array(value), absolute=True))
    assert value.tolist() == [-3.0, 2.0, -1.0]
