from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_compress.coding.packing import PACKINGS, Packed, bits_by_role, pack, unpack
from lightning_compress.coding.state import pack_state, unpack_state
from lightning_compress.core.errors import ArtifactError, ConfigurationError

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32,
    torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
]  # fmt: skip


def raw(tensor: Tensor) -> list[int]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], density: float, seed: int) -> Tensor:
    """Random bit patterns (NaN, infinities and -0.0 among them), a share of the elements all zero bits."""
    generator = torch.Generator().manual_seed(seed)
    count = math.prod(shape)
    high = 2 if dtype == torch.bool else 256
    content = torch.randint(0, high, (count, dtype.itemsize), generator=generator, dtype=torch.uint8)
    content *= (torch.rand(count, 1, generator=generator) < density).to(torch.uint8)
    return content.reshape(-1).view(dtype).reshape(shape)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 7), max_size=4).map(tuple),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.integers(0, 2**32),
)
def test_every_packing_is_bit_exact(dtype: torch.dtype, shape: tuple[int, ...], density: float, seed: int):
    tensor = random_tensor(dtype, shape, density, seed)
    candidates = [packed for packing in PACKINGS.values() if (packed := packing.encode(tensor)) is not None]
    assert {"dense", "bitmap"} <= {packed.packing for packed in candidates}
    for packed in (*candidates, pack(tensor)):
        assert (packed.shape, packed.dtype) == (shape, dtype)
        back = unpack(packed)
        assert (back.shape, back.dtype) == (torch.Size(shape), dtype)
        assert raw(back) == raw(tensor)


def test_bitmap_by_hand():
    tensor = torch.tensor([[0.0, 1.5, 0.0], [-0.0, 0.0, 0.0], [0.0, 0.0, 2.0]])
    packed = PACKINGS["bitmap"].encode(tensor)
    assert packed is not None
    assert packed.parts["bitmap"].tolist() == [0b01010000, 0b10000000]  # 010 100 00|1: -0.0 has its sign bit set
    assert packed.parts["values"].tolist() == [1.5, -0.0, 2.0]
    assert packed.config == {"shape": [3, 3]}
    assert bits_by_role(packed) == {"values": 3 * 32, "indices": 16, "codebooks": 0, "other": 0}


def test_special_values_survive():
    nan = torch.tensor([0x7FC00001, -0x400000, 0, -0x80000000], dtype=torch.int32).view(
        torch.float32
    )  # two NaNs, 0, -0
    for name in ("dense", "bitmap"):
        packed = PACKINGS[name].encode(nan)
        assert packed is not None
        assert unpack(packed).view(torch.int32).tolist() == [0x7FC00001, -0x400000, 0, -0x80000000]


@pytest.mark.parametrize(
    ("density", "values", "expected"),
    [(0.1, 0, "sparse"), (0.5, 0, "sparse"), (1.0, 0, "planes"), (1.0, 16, "palette"), (0.8, 3, "palette")],
)
def test_the_smallest_is_taken(density: float, values: int, expected: str):
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(300, 100, generator=generator)
    if values:
        tensor = torch.randint(1, values + 1, (300, 100), generator=generator) * 0.37
    tensor *= torch.rand(300, 100, generator=generator) < density
    packed = pack(tensor + 0.0)  # -0.0 becomes 0.0
    assert packed.packing == expected
    others = [other for packing in PACKINGS.values() if (other := packing.encode(tensor + 0.0)) is not None]
    assert packed.disk_bytes() <= min(other.disk_bytes() for other in others) + 8


def test_masked_weights_keep_the_signs_of_their_zeros():
    # 1, -2, then ten zeros of which the second, third and tenth are negative
    tensor = torch.tensor([1.0, -2.0, 0.0, -0.0, -0.0, *[0.0] * 6, -0.0])
    packed = PACKINGS["signed_bitmap"].encode(tensor)
    assert packed is not None
    assert packed.parts["bitmap"].tolist() == [0b11000000, 0]
    assert packed.parts["signs"].tolist() == [0b01100000, 0b01000000]
    assert packed.parts["values"].tolist() == [1.0, -2.0]
    assert raw(unpack(packed)) == raw(tensor)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fnuz]
)
def test_zeros_of_both_signs_cost_two_bits(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(300, 100, generator=generator)
    masked = (dense * (torch.rand(300, 100, generator=generator) < 0.1)).to(dtype)
    packed, signed = pack(masked), PACKINGS["signed_bitmap"].encode(masked)
    assert packed.packing == "sparse"
    assert raw(unpack(packed)) == raw(masked)
    count = int((masked.float() != 0).sum())
    assert (signed is None) == (dtype == torch.float8_e4m3fnuz)  # it has no -0.0
    if signed is not None:
        bits = sum(bits_by_role(signed).values())
        assert bits <= 30_000 + (30_000 - count + 7) + count * 8 * dtype.itemsize
        assert raw(unpack(signed)) == raw(masked)
        assert sum(bits_by_role(packed).values()) < 0.85 * bits


def test_headers_count_for_small_tensors():
    assert pack(torch.zeros(8)).packing == "dense"  # 32 bytes saved are fewer than a second header entry takes
    assert pack(torch.zeros(8000)).packing == "palette"
    assert pack(torch.rand(4000) < 0.5).packing == "bits"


def test_views_are_packed_as_seen():
    base = torch.arange(12.0).reshape(3, 4)
    for view in (base.t(), base[:, 1:3], base[::2], torch.tensor(3.0).expand(5), torch.tensor([1 + 2j]).conj()):
        assert torch.equal(unpack(pack(view)), view)


@pytest.mark.parametrize(
    "tensor",
    [torch.eye(3).to_sparse(), torch.empty(3, device="meta"), torch.nn.parameter.UninitializedParameter()],
    ids=["sparse", "meta", "lazy"],
)
def test_refuses_what_is_not_plain(tensor: Tensor):
    with pytest.raises(ConfigurationError, match="only plain dense tensors"):
        pack(tensor)
    with pytest.raises(ConfigurationError, match=r"entry 'layer\.weight'"):
        pack_state({"layer.weight": tensor})


BITMAP = torch.tensor([0b11000000], dtype=torch.uint8)
TWO = torch.tensor([1.0, 2.0])


@pytest.mark.parametrize(
    "packed",
    [
        Packed("bitmap", {"bitmap": BITMAP, "values": TWO}, {"shape": [10**12]}),
        Packed("bitmap", {"bitmap": BITMAP, "values": TWO}, {"shape": [2**62, 2**62]}),
        Packed("bitmap", {"bitmap": BITMAP, "values": TWO}, {"shape": [-8]}),
        Packed("bitmap", {"bitmap": BITMAP, "values": TWO}, {"shape": "8"}),
        Packed("bitmap", {"bitmap": BITMAP, "values": TWO}, {"shape": [True]}),
        Packed("bitmap", {"bitmap": BITMAP, "values": TWO}, {}),
        Packed("bitmap", {"bitmap": BITMAP, "values": TWO[:1]}, {"shape": [8]}),
        Packed("bitmap", {"bitmap": BITMAP, "values": TWO.reshape(1, 2)}, {"shape": [8]}),
        Packed("bitmap", {"bitmap": BITMAP.to(torch.int8), "values": TWO}, {"shape": [8]}),
        Packed("bitmap", {"bitmap": BITMAP, "values": TWO}, {"shape": [8], "dtype": "complex64"}),
        Packed("bitmap", {"bitmap": BITMAP, "values": TWO}, {"shape": [8], "dtype": "os.system"}),
        Packed("bitmap", {"bitmap": BITMAP}, {"shape": [8]}),
        Packed("signed_bitmap", {"bitmap": BITMAP, "values": TWO, "signs": BITMAP[:0]}, {"shape": [8]}),
        Packed("signed_bitmap", {"bitmap": BITMAP, "values": TWO, "signs": TWO[:1]}, {"shape": [8]}),
        Packed("bits", {"bitmap": BITMAP}, {"shape": [8], "dtype": "float32"}),
        Packed("bits", {"bitmap": BITMAP}, {"shape": [80], "dtype": "bool"}),
        Packed("dense", {"values": TWO}, {"shape": [3]}),
        Packed("dense", {"values": TWO, "more": TWO}, {}),
        Packed("huffman", {"values": TWO}, {}),
    ],
)
def test_contradictions_are_refused(packed: Packed):
    with pytest.raises(ArtifactError):
        unpack(packed)


def test_tied_tensors_are_stored_once():
    weight = torch.randn(4, 3)
    state = {"a": weight, "b": weight.detach(), "turned": weight.t(), "part": weight[:2], "same": weight.clone()}
    packed = pack_state(state)
    assert [entry.packing for entry in packed.values()] == ["dense", "alias", "dense", "dense", "dense"]
    back = unpack_state(packed)
    assert list(back) == list(state)
    assert back["a"] is back["b"]
    for key, tensor in state.items():
        assert torch.equal(back[key], tensor)


def test_empty_tensors_are_not_tied():
    packed = pack_state({"a": torch.empty(0), "b": torch.empty(0)})
    assert [entry.packing for entry in packed.values()] == ["dense", "dense"]


@pytest.mark.parametrize("of", ["c", "b", None, ["a"]])
def test_an_alias_of_nothing_is_refused(of: object):
    with pytest.raises(ArtifactError, match="alias"):
        unpack_state({"a": pack(TWO), "b": Packed("alias", {}, {"of": of})})
