from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_compress.coding.bits import pack_bits, unpack_bits
from lightning_compress.core.errors import ConfigurationError


def test_by_hand():
    mask = torch.tensor([[True, False, True], [True, False, False], [False, False, True]])
    # 101 100 00|1 -> 0b10110000, 0b10000000
    assert pack_bits(mask).tolist() == [0b10110000, 0b10000000]


@given(st.lists(st.booleans(), max_size=70))
def test_round_trip(flags: list[bool]):
    mask = torch.tensor(flags, dtype=torch.bool)
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8
    assert packed.numel() == (len(flags) + 7) // 8
    assert unpack_bits(packed, len(flags)).tolist() == flags


def test_unpacked_bits_can_be_written():
    mask = unpack_bits(torch.tensor([255], dtype=torch.uint8), 5)
    mask[0] = False
    assert mask.tolist() == [False, True, True, True, True]


def test_refuses_other_types():
    with pytest.raises(ConfigurationError, match="`mask` must be a boolean"):
        pack_bits(torch.ones(3))


@pytest.mark.parametrize(("packed", "n"), [([1, 2], 8), ([1], 9), ([], 1), ([1], -1)])
def test_refuses_the_wrong_size(packed: list[int], n: int):
    with pytest.raises(ConfigurationError, match="`packed` must be"):
        unpack_bits(torch.tensor(packed, dtype=torch.uint8), n)
