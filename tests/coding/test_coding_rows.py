"""A codebook for each row: exact for every type, one bit for a weight of a scaled sign, and safe when damaged."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.coding.coded import CODED
from lightning_compress.coding.packing import bits_by_role, pack, unpack
from lightning_compress.coding.rows import MAX_VALUES, plan_rows
from lightning_compress.coding.stream import CODINGS
from lightning_compress.core.errors import ArtifactError


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.int64], ids=str)
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(2, 40), columns=st.integers(2, 90), values=st.integers(1, MAX_VALUES), seed=st.integers(0, 2**32)
)
def test_rows_of_few_values_are_bit_exact(dtype, rows, columns, values, seed):
    generator = torch.Generator().manual_seed(seed)
    books = torch.randint(0, 256, (rows, values, dtype.itemsize), generator=generator, dtype=torch.uint8)
    picks = torch.randint(0, values, (rows, columns), generator=generator)
    tensor = books[torch.arange(rows)[:, None], picks].reshape(-1).view(dtype).reshape(rows, columns)
    for coding in CODINGS:
        packed = CODED["rows"].encode(tensor, CODINGS[coding])
        if rows * columns * dtype.itemsize < 64:
            assert packed is None
            continue
        assert raw(unpack(packed)) == raw(tensor)
        assert sum(bits_by_role(packed).values()) == 8 * packed.parts["data"].numel()
        assert raw(unpack(pack(tensor, coding))) == raw(tensor)


def test_scaled_signs_take_a_bit_each_and_a_codebook_a_filter():
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (256, 64, 3, 3), generator=generator) * 2.0 - 1
    weight = signs * torch.rand(256, 1, 1, 1, generator=generator)
    packed = pack(weight)
    bits = bits_by_role(packed)
    assert packed.packing == "rows"
    assert bits["codebooks"] == 256 * 2 * 32
    assert weight.numel() <= bits["values"] < weight.numel() + 200
    assert pack(signs).packing == "palette"  # one scale for all: no codebook a row
    uneven = torch.where(
        torch.arange(64)[None, :, None, None] < torch.arange(256)[:, None, None, None] % 60, 0.0, weight
    )
    assert raw(unpack(CODED["rows"].encode(uneven, CODINGS["auto"]))) == raw(uneven)


def test_what_has_no_such_rows_is_left_to_others():
    many = torch.arange(4 * 40).reshape(4, 40).float()
    assert CODED["rows"].encode(many, CODINGS["auto"]) is None
    hidden = torch.zeros(400, 40)
    hidden[13] = torch.arange(40)  # not among the rows that are looked at first
    assert CODED["rows"].encode(hidden, CODINGS["auto"]) is None
    for none in (torch.ones(100), torch.ones(1, 100), torch.ones(100, 1), torch.ones(0, 5)):
        assert CODED["rows"].encode(none, CODINGS["auto"]) is None
    assert plan_rows(np.zeros(12, np.uint32), 1, (0,)) is None


def test_damage_is_an_error():
    weight = torch.randint(0, 3, (20, 30), generator=torch.Generator().manual_seed(1)).float()
    weight[::2] = 1.0  # codebooks of one and of three values
    packed = CODED["rows"].encode(weight, CODINGS["none"])
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        data = packed.parts["data"].clone()
        data[random.integers(0, len(data))] = int(random.integers(0, 256))
        try:
            assert unpack(type(packed)("rows", {"data": data}, packed.config)).shape == weight.shape
        except ArtifactError:
            refused += 1
    assert refused > 50
    for shape in ([600], [600, 1], [1, 600], [2, 4]):
        with pytest.raises(ArtifactError):
            unpack(type(packed)("rows", dict(packed.parts), {**packed.config, "shape": shape}))
