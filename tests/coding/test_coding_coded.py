from __future__ import annotations

import base64
import hashlib
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_compress.coding import container as container_module
from lightning_compress.coding.coded import CODED
from lightning_compress.coding.container import read_container, write_container
from lightning_compress.coding.packing import PACKINGS, Packed, bits_by_role, pack, unpack
from lightning_compress.coding.simple import SIMPLE
from lightning_compress.coding.state import pack_state, unpack_state
from lightning_compress.coding.stream import CODINGS
from lightning_compress.core.errors import ArtifactError, ConfigurationError

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64]
ALL = [*FLOATS, torch.complex128, torch.float8_e8m0fnu, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int64]


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def shared(shape: tuple[int, ...], values: int, density: float, seed: int = 0) -> Tensor:
    """Weights with few values, and zeros, as pruning and sharing leave them."""
    generator = torch.Generator().manual_seed(seed)
    codebook = torch.randn(values, generator=generator)
    picks = torch.randint(0, values, shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < density, codebook[picks], 0.0)


def entropy(symbols: Tensor) -> float:
    counts = torch.unique(symbols, return_counts=True)[1].double()
    return float(-(counts * (counts / counts.sum()).log2()).sum())


@pytest.mark.parametrize("coding", CODINGS)
@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(ALL),
    n=st.integers(0, 3000),
    values=st.integers(1, 40),
    density=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_few_values_are_bit_exact(coding: str, dtype: torch.dtype, n: int, values: int, density: float, seed: int):
    generator = torch.Generator().manual_seed(seed)
    high = 2 if dtype == torch.bool else 256
    codebook = torch.randint(0, high, (values, dtype.itemsize), generator=generator, dtype=torch.uint8)
    content = codebook[torch.randint(0, values, (n,), generator=generator)]
    content *= (torch.rand(n, 1, generator=generator) < density).to(torch.uint8)
    tensor = content.reshape(-1).view(dtype)
    allowed = CODINGS[coding]
    packings = [packed for packing in CODED.values() if (packed := packing.encode(tensor, allowed)) is not None]
    for packed in (*packings, pack(tensor, coding)):
        back = unpack(packed)
        assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
        assert raw(back) == raw(tensor)
        assert sum(bits_by_role(packed).values()) == 8 * sum(len(raw(part)) for part in packed.parts.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_both_zeros_of_masked_weights(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    masked = torch.randn(97, 53, generator=generator) * (torch.rand(97, 53, generator=generator) < 0.1)
    packed = CODED["sparse"].encode(masked.to(dtype))
    assert packed is not None
    assert raw(unpack(packed)) == raw(masked.to(dtype))
    sign_bits = int((masked == 0).sum())
    assert sum(bits_by_role(packed).values()) < sign_bits + 0.55 * masked.numel() + 0.11 * masked.numel() * 64


@pytest.mark.parametrize(("values", "density"), [(32, 0.1), (32, 1.0), (2, 1.0), (3, 0.5), (16, 0.02), (255, 0.9)])
def test_shared_weights_take_little_more_than_their_entropy(values: int, density: float):
    tensor = shared((500, 400), values, density)
    packed = pack(tensor)
    bits = bits_by_role(packed)
    bound = entropy(tensor)
    assert bound < sum(bits.values()) < 1.02 * bound + 8 * 600 + 32 * values
    assert bits["codebooks"] >= 32 * (values if density == 1 else 1)
    assert raw(unpack(packed)) == raw(tensor)


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, 0.86), (torch.bfloat16, 0.72), (torch.float64, 0.96), (torch.complex64, 0.86)]
)
def test_exponents_of_dense_weights_are_coded(dtype: torch.dtype, most: float):
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(20_000, generator=generator, dtype=dtype if dtype.is_complex else torch.float64).to(dtype)
    packed = pack(tensor)
    assert packed.packing == "planes"
    assert packed.disk_bytes() < most * len(raw(tensor))
    assert raw(unpack(packed)) == raw(tensor)


def test_noise_stays_as_it_is():
    noise = torch.randint(-(2**31), 2**31, (20_000,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    assert pack(noise).packing == "dense"


def test_small_integers_in_wide_types():
    tensor = torch.randint(-3, 5, (5000,), generator=torch.Generator().manual_seed(0))
    packed = pack(tensor)
    assert packed.disk_bytes() < 5000 * 3 / 8 + 300  # eight values: three bits
    assert torch.equal(unpack(packed), tensor)


@pytest.mark.parametrize("kind", ["dense", "palette", "sparse", "signed"])
def test_above_the_chunks(kind: str):
    """More than a million elements, with values that a sample of the first pass misses."""
    generator = torch.Generator().manual_seed(0)
    n = (1 << 20) + 12_345
    tensor = torch.randn(n, generator=generator)
    if kind == "palette":
        tensor = torch.randint(0, 9, (n,), generator=generator) - 0.125
        tensor[-1], tensor[1_000_001] = float("nan"), float("-inf")
    elif kind != "dense":
        mask = torch.rand(n, generator=generator) < 0.3
        tensor = tensor * mask if kind == "signed" else torch.where(mask, tensor, 0.0)
    for coding in CODINGS:
        packed = pack(tensor, coding)
        assert raw(unpack(packed)) == raw(tensor)
        assert packed.packing == {"dense": "planes", "signed": "sparse"}.get(kind, kind) or coding == "none"


def test_each_word_allows_its_coders():
    tensor = shared((300, 300), 32, 0.1)
    sizes = {coding: pack(tensor, coding).disk_bytes() for coding in CODINGS}
    assert sizes["auto"] <= sizes["ans"] < sizes["huffman"] < sizes["none"]
    with pytest.raises(ConfigurationError, match=r"`coding` must be one of 'auto', .* did you mean 'huffman'"):
        pack(tensor, "hufman")
    with pytest.raises(ConfigurationError, match="`coding` must be one of"):
        pack_state({"a": tensor}, None)  # type: ignore[arg-type]


GOLDEN = {
    "auto": (
        "A4oDigMAAgAGEdAAAAD/9JkDaJsj8iJbUoYWCD8iAXkoqZg90iAe5eSChS/TeBb9zFo8cYUFYOvgCotRpp0I1PbdntMIIkTq"
        "vHeIK6W0DQeIFwAAAQQAAEA/AACgvwAAEMAAAFDAAAAExOWxKEyShOWxKRjEoTlsTpGxKE5bFOlsShOWsTlsShORoTlsShjJ"
        "KE5bEpGMShOWxOkbEoTlsU5bEoTkaxOWxKEyRoTlsShjJKE5bEpGxKE5bE6WxKE5axTlsShORrE5bEoQ"
    ),
    "huffman": (
        "A4oDigMAAQAGIAASOAKNtttkbbbbIjbbbZEbbbbIjbbbZG2222RtttsiNtttkRtttsiNtttkbbbbIjbbbZEbbbbIjbbbZG22"
        "22RtttsiNtttkRtttgEEAABAPwAAoL8AABDAAABQwAAABMTlsShMkoTlsSkYxKE5bE6RsShOWxTpbEoTlrE5bEoTkaE5bEoY"
        "yShOWxKRjEoTlsTpGxKE5bFOWxKE5GsTlsShMkaE5bEoYyShOWxKRsShOWxOlsShOWsU5bEoTkaxOWxKEA=="
    ),
    "ans": (
        "A4oDigMAAgAGEdAAAAD/9JkDaJsj8iJbUoYWCD8iAXkoqZg90iAe5eSChS/TeBb9zFo8cYUFYOvgCotRpp0I1PbdntMIIkTq"
        "vHeIK6W0DQeIFwAAAQQAAEA/AACgvwAAEMAAAFDAAAAExOWxKEyShOWxKRjEoTlsTpGxKE5bFOlsShOWsTlsShORoTlsShjJ"
        "KE5bEpGMShOWxOkbEoTlsU5bEoTkaxOWxKEyRoTlsShjJKE5bEpGxKE5bE6WxKE5axTlsShORrE5bEoQ"
    ),
    "none": (
        "A4oDigMAAAAGEllllllllkEllllllllkEgkssssssssgkEllllllllkEgkssssssssgksssssssssgkssssssssgkEllllll"
        "llkEgkssssssssgkEllllllllkEllllllllkEgkssssssssgkEllllllllkEgkssssssssgksssssssssgkssssssssgkEll"
        "llllllkEgksssssssAEEAABAPwAAoL8AABDAAABQwAAABMTlsShMkoTlsSkYxKE5bE6RsShOWxTpbEoTlrE5bEoTkaE5bEoY"
        "yShOWxKRjEoTlsTpGxKE5bFOWxKE5GsTlsShMkaE5bEoYyShOWxKRsShOWxOlsShOWsU5bEoTkaxOWxKEA=="
    ),
}


def example() -> Tensor:
    """Numbers that do not depend on any generator."""
    place = np.arange(2000)
    kept = (place * 7919 % 1013) < 200
    return torch.from_numpy(np.where(kept, (place * place % 7 - 3.25).astype(np.float32), np.float32(0)))


@pytest.mark.parametrize("coding", GOLDEN)
def test_bytes_are_the_same_everywhere(coding: str):
    """Files that were written once must be read for ever, whatever becomes of the library behind a coder."""
    stored = np.frombuffer(base64.b64decode(GOLDEN[coding]), np.uint8)
    packed = pack(example(), coding)
    assert base64.b64encode(packed.parts["data"].numpy().tobytes()).decode() == GOLDEN[coding]
    written = Packed("sparse", {"data": torch.from_numpy(stored.copy())}, packed.config)
    assert raw(unpack(written)) == raw(example())


def test_a_file_of_the_first_version_still_loads():
    container = read_container(Path(__file__).parent / "version_1.safetensors")
    content = b"".join(raw(tensor) for tensor in unpack_state(container.tensors).values())
    assert hashlib.sha256(content).hexdigest() == "b7929b22931ce0a004434032bd0681dab85804280401598cf0aa637ec57e0813"
    assert {packed.packing for packed in container.tensors.values()} == {*SIMPLE, "alias"}


def version(path: Path) -> str:
    header = path.read_bytes()
    text = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]
    return text["version"]


def test_the_version_is_the_lowest_that_will_do(tmp_path: Path):
    write_container(tmp_path / "old", pack_state({"a": torch.arange(3.0)}), {})
    write_container(tmp_path / "new", pack_state({"a": torch.zeros(999)}), {})
    assert (version(tmp_path / "old"), version(tmp_path / "new")) == ("1", "2")


def test_an_old_reader_refuses_a_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_container(tmp_path / "new", pack_state({"a": torch.arange(9.0).repeat(99)}), {})
    monkeypatch.setattr(container_module, "PACKINGS", SIMPLE)
    with pytest.raises(ArtifactError, match="unknown packing 'palette'; install a newer"):
        read_container(tmp_path / "new")
    monkeypatch.setattr(container_module, "VERSION", 1)
    with pytest.raises(ArtifactError, match="got version 2; install a newer"):
        read_container(tmp_path / "new")


def cases() -> dict[str, Packed]:
    """Every packing with every coder."""
    masked = torch.randn(400, generator=torch.Generator().manual_seed(1)) * (torch.arange(400) % 7 < 2)
    tensors = {
        "sparse": shared((40, 30), 12, 0.1), "bitmap": shared((40, 30), 12, 0.7), "signed": masked,
        "palette": shared((40, 30), 12, 1.0), "planes": torch.randn(400, generator=torch.Generator().manual_seed(2)),
        "wide": torch.randint(0, 1500, (4000,), generator=torch.Generator().manual_seed(3)), "flags": masked == 0,
    }  # fmt: skip
    return {
        f"{kind}, {name}, {coding}": packed
        for name, tensor in tensors.items()
        for kind, packing in CODED.items()
        for coding in CODINGS
        if (packed := packing.encode(tensor, CODINGS[coding])) is not None
    }


CASES = cases()


def outcome(packed: Packed) -> bool:
    """Return whether a damaged part gives a tensor of the declared shape; anything but the one error fails the test."""
    try:
        tensor = unpack(packed)
        assert sum(bits_by_role(packed).values()) == 8 * packed.parts["data"].numel()
    except ArtifactError:
        return False
    assert (tensor.shape, tensor.dtype) == (packed.shape, packed.dtype)
    return True


@settings(max_examples=400, deadline=None)
@given(case=st.sampled_from(sorted(CASES)), draw=st.randoms(use_true_random=False), flips=st.integers(1, 4))
def test_damaged_parts_give_a_tensor_or_the_error(case: str, draw: random.Random, flips: int):
    packed = CASES[case]
    data = packed.parts["data"].clone()
    for _ in range(flips):
        # the start says how to read the rest: hit it half of the time
        place = draw.randrange(min(24, data.numel()) if draw.random() < 0.5 else data.numel())
        data[place] = draw.randrange(256)
    outcome(Packed(packed.packing, {"data": data}, packed.config))


@pytest.mark.parametrize("case", sorted(CASES))
def test_cut_and_lengthened_parts_are_refused(case: str):
    packed = CASES[case]
    data = packed.parts["data"]
    for size in {*range(0, data.numel(), max(1, data.numel() // 40)), data.numel() - 1}:
        assert not outcome(Packed(packed.packing, {"data": data[:size]}, packed.config))
    longer = torch.cat([data, torch.zeros(1, dtype=torch.uint8)])
    assert not outcome(Packed(packed.packing, {"data": longer}, packed.config))


@pytest.mark.parametrize("case", sorted(CASES))
def test_lying_shapes_are_survived(case: str):
    """A code need not end where a shape does; what is read has the shape that the model was compared with."""
    packed = CASES[case]
    n = int(np.prod(packed.shape))
    for shape in ([0], [1], [n - 1], [n + 9], [2 * n]):
        outcome(Packed(packed.packing, packed.parts, {**packed.config, "shape": shape}))
    for shape in ([2**31, 2**31], [2**62], [2**62, 2**62], [-1], "12"):
        assert not outcome(Packed(packed.packing, packed.parts, {**packed.config, "shape": shape}))
    for config in ({}, {"shape": [n]}, {"dtype": "float32"}, {"shape": [n], "dtype": "float31"}):
        assert not outcome(Packed(packed.packing, packed.parts, config))


def bomb(*numbers: int, packing: str = "palette", shape: int = 1000) -> Packed:
    data = torch.tensor([*numbers], dtype=torch.uint8)
    return Packed(packing, {"data": data}, {"shape": [shape], "dtype": "uint8"})


@pytest.mark.parametrize(
    "packed",
    [
        bomb(0),  # no codebook
        bomb(255, 255, 255, 255, 255, 255, 255, 255, 255, 1),  # a number without end
        bomb(255, 255, 255, 255, 7),  # a codebook of gigabytes
        bomb(2, 5, 6, 3, 0, 2),  # a coder that is none
        bomb(2, 5, 6, 0, 0, 0),  # a stream without symbols
        bomb(2, 5, 6, 1, 0, 2, 0x11),  # Huffman, whose blocks are missing
        bomb(2, 5, 6, 1, 0, 2, 0x00, 0, 0),  # no lengths
        bomb(3, 5, 6, 7, 1, 0, 3, 0x11, 0x10, 8, 0, 7, shape=8),  # more codes than bits
        bomb(2, 5, 6, 1, 0, 2, 0x22, 8, 0, 7, shape=8),  # fewer codes than bits
        bomb(2, 5, 6, 2, 0, 2, 1, 0, 0, 1, 0, 0, 0),  # frequencies that are all zero
        bomb(2, 5, 6, 2, 0, 2, 1, 1, 1, 0, 0, 0, 0),  # words that end in a zero
        bomb(2, 5, 6, 2, 0, 2, 255, 255, 255, 255, 255, 255, 255, 255, 127),  # words beyond the file
        bomb(13, packing="sparse"),  # an index of thirteen bits
        bomb(3, 255, 255, 3, packing="sparse"),  # more indices than entries
        bomb(1, 1, 232, 7, 1, 0, packing="sparse"),  # signs for a type that has none
    ],
)
def test_hostile_parts_are_refused(packed: Packed):
    assert not outcome(packed)


def test_booleans_are_booleans():
    palette = Packed(
        "palette", {"data": torch.tensor([1, 7, 0, 0, 1], dtype=torch.uint8)}, {"shape": [9], "dtype": "bool"}
    )
    with pytest.raises(ArtifactError, match="neither 0 nor 1"):
        unpack(palette)


def test_all_packings_are_covered():
    assert {case.split(",")[0] for case in CASES} == set(CODED)
    assert set(PACKINGS) == {*SIMPLE, *CODED}
