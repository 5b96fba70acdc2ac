"""Masks are applied in one pass on one thread and in pieces on several: the bits must be the same."""

import pytest
import torch

from lightning_compress.pruning.masks import apply_mask

TYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2])
def test_masks_clear_and_keep_every_bit_on_any_number_of_threads(threads, count, dtype):
    threads(count)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(600, 701, generator=generator).to(dtype)  # more than one piece, and not a multiple of it
    weight[0, :4] = torch.tensor([float("nan"), float("inf"), -0.0, -1.0])
    keep = torch.rand(600, 701, generator=generator) < 0.1
    keep[0, :4] = torch.tensor([False, False, True, False])
    expected = torch.where(keep, weight, torch.zeros((), dtype=dtype))
    apply_mask(weight, keep.to(torch.int8).neg_())
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    assert torch.equal(weight.view(bits), expected.view(bits))


@pytest.mark.parametrize("count", [1, 2])
def test_masks_follow_the_memory_order_of_channels_last(threads, count):
    threads(count)
    weight = torch.arange(1.0, 121.0).reshape(2, 3, 4, 5).to(memory_format=torch.channels_last)
    mask = torch.zeros_like(weight, dtype=torch.int8)
    mask[1, 2] = -1
    apply_mask(weight, mask)
    assert weight.nonzero()[:, :2].unique(dim=0).tolist() == [[1, 2]]
    assert weight[1, 2].sum() == sum(range(101, 121))
