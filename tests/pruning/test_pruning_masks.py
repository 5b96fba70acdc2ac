"""Masks: exact counts, exact zeros, and how a group shares a cut."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_compress.core.errors import CompressionError, ConfigurationError
from lightning_compress.pruning import masks as masks_module
from lightning_compress.pruning.allocation import choose_masks, least_kept
from lightning_compress.pruning.masks import apply_mask, kept, lowest_masks, pack_mask, unpack_mask, zero_weights

LAYOUTS = {
    "plain": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 3),
    "strided": lambda x: x[:, ::2],
    "permuted and strided": lambda x: x.permute(2, 0, 3, 1)[1:, :, ::2],
}


def pruned(masks: list[Tensor]) -> int:
    return sum(int((mask == 0).sum()) for mask in masks)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(-3, 3), max_size=9), min_size=1, max_size=5), st.floats(0, 1), st.booleans())
def test_exactly_count_and_never_a_larger_before_a_smaller(
    numbers: list[list[int]], share: float, absolute: bool
) -> None:
    values = [torch.tensor(row, dtype=torch.float32) for row in numbers]
    count = int(share * sum(value.numel() for value in values))
    masks = lowest_masks(values, count, absolute)
    assert pruned(masks) == count
    assert all(mask.dtype == torch.int8 and set(mask.tolist()) <= {0, -1} for mask in masks)
    ranked = [value.abs() if absolute else value for value in values]
    gone = [float(x) for value, mask in zip(ranked, masks, strict=True) for x in value[mask == 0]]
    stay = [float(x) for value, mask in zip(ranked, masks, strict=True) for x in value[mask != 0]]
    assert not gone or not stay or max(gone) <= min(stay)


def test_ties_are_pruned_in_order_of_tensors_and_memory() -> None:
    values = [torch.ones(2, 2), torch.ones(3)]
    assert [mask.tolist() for mask in lowest_masks(values, 3)] == [[[0, 0], [0, -1]], [-1, -1, -1]]
    assert [mask.tolist() for mask in lowest_masks(values, 5)] == [[[0, 0], [0, 0]], [0, -1, -1]]


@pytest.mark.parametrize("count", [0, 1, 100_000, 399_999, 400_000])
def test_ties_across_chunks(count: int) -> None:
    values = [torch.ones(150_000), torch.zeros(50_000), torch.ones(200_000)]
    masks = lowest_masks(values, count)
    assert pruned(masks) == count
    assert pruned([masks[1]]) == min(count, 50_000)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_types(layout: str, dtype: torch.dtype) -> None:
    value = LAYOUTS[layout](torch.randn(4, 6, 5, 3, generator=torch.Generator().manual_seed(0)).to(dtype))
    for count in (1, 50, value.numel() - 1, value.numel()):
        (mask,) = lowest_masks([value], count)
        assert pruned([mask]) == count
        assert mask.shape == value.shape
        assert mask.flatten().tolist() == lowest_masks([value], count)[0].flatten().tolist()
        order = value.flatten().abs().float()
        assert order[mask.flatten() == 0].max() <= (order[mask.flatten() != 0].amin() if count < value.numel() else 9)


def test_empty_and_scalar_tensors() -> None:
    masks = lowest_masks([torch.ones(0), torch.tensor(1.0), torch.tensor(-2.0)], 1)
    assert [mask.tolist() for mask in masks] == [[], 0, -1]


def test_nan_and_too_many() -> None:
    with pytest.raises(CompressionError, match="NaN"):
        lowest_masks([torch.tensor([math.nan, 1.0])], 1)
    with pytest.raises(CompressionError, match=r"1\.\.2, got 3"):
        lowest_masks([torch.ones(2)], 3)


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_apply_sets_positive_zeros_and_nothing_else(layout: str, dtype: torch.dtype) -> None:
    weight = LAYOUTS[layout](torch.randn(4, 6, 5, 3, generator=torch.Generator().manual_seed(0)).to(dtype))
    special = torch.tensor([math.nan, math.inf, -math.inf, -0.0, -1.0, 1e-7], dtype=dtype)
    weight.copy_(special[torch.arange(weight.numel()) % 6].reshape(weight.shape))
    mask = torch.where(torch.arange(weight.numel()).reshape(weight.shape) % 4 < 2, -1, 0).to(torch.int8)
    before = weight.clone()
    narrow = torch.empty_like(weight, dtype=torch.int8).copy_(mask)
    for form in (mask, narrow, *(narrow.to(kind) for kind in (torch.int16, torch.int32, torch.int64))):
        weight.copy_(before)
        apply_mask(weight, form, {})
        gone = weight[mask == 0]
        assert not gone.isnan().any()
        assert not (gone != 0).any()
        assert not gone.signbit().any()
        same = weight[mask != 0], before[mask != 0]
        assert torch.equal(*(torch.nan_to_num(part, nan=7.0) for part in same))
        assert torch.equal(*(part.signbit() for part in same))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3), (2, 3, 2, 2, 2), (600_001,), (0,), (0, 3)])
def test_apply_in_any_shape(shape: tuple[int, ...]) -> None:
    weight = torch.nn.Parameter(torch.ones(shape))
    mask = torch.full(shape, -1, dtype=torch.int8)
    mask.flatten()[::2] = 0
    scratch: dict[torch.dtype, Tensor] = {}
    apply_mask(weight, mask, scratch)
    apply_mask(weight, mask, scratch)
    assert torch.equal(weight, (mask != 0).float())
    assert weight.grad_fn is None


@pytest.mark.parametrize("limit", [0, 5, 6])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_masks_are_widened_while_there_are_few_and_follow_their_weights(
    limit: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masks_module, "_WIDE", limit)
    masks = {key: torch.tensor([0, -1, 0], dtype=torch.int8) for key in ("a", "b")}
    expected = {torch.float16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}[dtype]
    for kind in (dtype, torch.float32, torch.bfloat16):  # converted between two steps
        weights = {key: torch.tensor([1.0, 2.0, -3.0], dtype=kind) for key in ("a", "dense", "b")}
        zero_weights(list(weights.items()), masks)
        assert weights["a"].tolist() == weights["b"].tolist() == [0.0, 2.0, 0.0]
        assert weights["dense"].tolist() == [1.0, 2.0, -3.0]
        assert {mask.dtype for mask in masks.values()} == {expected if limit == 6 else torch.int8}
        assert kept(masks) == 2
        assert torch.equal(pack_mask(masks["a"]), pack_mask(torch.tensor([0, -1, 0], dtype=torch.int8)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_masks_come_back(layout: str) -> None:
    value = LAYOUTS[layout](torch.randn(4, 6, 5, 3, generator=torch.Generator().manual_seed(0)))
    (mask,) = lowest_masks([value], 41)
    again = unpack_mask(pack_mask(mask), value, "fc.weight")
    assert torch.equal(again, mask)
    assert (again.dtype, again.stride()) == (torch.int8, mask.stride())
    assert pack_mask(mask).numel() == math.ceil(mask.numel() / 8)


def test_a_mask_of_another_size_names_the_layer() -> None:
    with pytest.raises(ConfigurationError, match=r"'fc.weight' has 2 bytes, but the weight is \(3, 3, 3\)"):
        unpack_mask(torch.zeros(2, dtype=torch.uint8), torch.ones(3, 3, 3), "fc.weight")


@pytest.mark.parametrize(
    ("size", "floor", "expected"),
    [(1000, 0.01, 10), (3, 0.01, 1), (100, 0.07, 7), (100, 0.0, 1), (1, 0.9, 1), (0, 0.5, 0), (7, 0.5, 4)],
)
def test_least_kept(size: int, floor: float, expected: int) -> None:
    assert least_kept(size, floor) == expected


def counts(masks: dict[str, Tensor]) -> dict[str, int]:
    return {key: int((mask == 0).sum()) for key, mask in masks.items()}


def test_a_floor_moves_the_rest_to_the_others() -> None:
    group = {"small": torch.arange(1.0, 11.0), "large": torch.arange(101.0, 111.0)}
    assert counts(choose_masks(group, 0.5, "global", 0.0)) == {"small": 9, "large": 1}
    assert counts(choose_masks(group, 0.5, "global", 0.3)) == {"small": 7, "large": 3}
    assert counts(choose_masks(group, 0.7, "global", 0.3)) == {"small": 7, "large": 7}
    assert counts(choose_masks(group, 0.9, "global", 0.3)) == {"small": 7, "large": 7}  # the floor wins
    assert counts(choose_masks(group, 0.5, "layer", 0.0)) == {"small": 5, "large": 5}
    assert counts(choose_masks(group, 1.0, "layer", 0.3)) == {"small": 7, "large": 7}


def test_three_rounds_of_redistribution() -> None:
    group = {"a": torch.arange(1.0, 5.0), "b": torch.arange(11.0, 15.0), "c": torch.arange(21.0, 29.0)}
    masks = choose_masks(group, 0.5, "global", 0.5)  # 8 of 16: a gives 2 of 4, b 2 of 4, c the other 4
    assert counts(masks) == {"a": 2, "b": 2, "c": 4}
    assert list(masks) == ["a", "b", "c"]
    assert masks["c"].tolist() == [0] * 4 + [-1] * 4


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=4), min_size=1, max_size=3),
    st.sampled_from([0.0, 0.25, 0.5, 0.75, 0.9]),
    st.sampled_from([0.0, 0.3, 0.5]),
)
def test_global_masks_prune_the_least_magnitude_that_the_floors_allow(
    numbers: list[list[int]], amount: float, floor: float
) -> None:
    group = {str(i): torch.tensor(row, dtype=torch.float32) for i, row in enumerate(numbers)}
    masks = choose_masks(group, amount, "global", floor)
    total = sum(len(row) for row in numbers)
    room = {key: value.numel() - least_kept(value.numel(), floor) for key, value in group.items()}
    wanted = min(round(amount * total), sum(room.values()))
    assert total - kept(masks) == wanted
    assert all(counts(masks)[key] <= room[key] for key in group)
    removed = sum(float(value[masks[key] == 0].sum()) for key, value in group.items())
    prefix = [[sum(sorted(row)[:n]) for n in range(room[str(i)] + 1)] for i, row in enumerate(numbers)]
    best = min(
        sum(sums[n] for sums, n in zip(prefix, taken, strict=True))
        for taken in itertools.product(*(range(len(sums)) for sums in prefix))
        if sum(taken) == wanted
    )
    assert removed == best


def test_unknown_scope() -> None:
    with pytest.raises(ConfigurationError, match=r"`scope` is 'globall'.*did you mean 'global'"):
        choose_masks({"a": torch.ones(2)}, 0.5, "globall", 0.0)
