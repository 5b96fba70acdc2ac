"""Folded files: small parts and metadata in a deflated directory, read back bit for bit, and hostile ones refused."""

from __future__ import annotations

import hashlib
import json
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from test_coding_container import resign

from lightning_compress.coding import container as module
from lightning_compress.coding import directory as folding
from lightning_compress.coding.container import read_container, write_container
from lightning_compress.coding.directory import DIRECTORY, SMALL, fold, unfold
from lightning_compress.coding.packing import NATIVE_DTYPES, Packed
from lightning_compress.coding.state import pack_state, unpack_state
from lightning_compress.core.errors import ArtifactError, ConfigurationError


def many_small(layers: int = 100) -> dict[str, torch.Tensor]:
    """A network of many tensors of all types, and one large one."""
    draw = torch.Generator().manual_seed(0)
    state = {f"layer.{index}.bias": torch.randn(5, generator=draw) for index in range(layers)}
    types = {f"of.{name}": torch.randint(0, 2, (3,), generator=draw).to(dtype) for dtype, name in NATIVE_DTYPES.items()}
    large = torch.randint(-128, 128, (60, 500), generator=draw).to(torch.int8)
    return {**state, **types, "scalar": torch.tensor(7), "empty": torch.empty(0, 3), "large": large, "tied": large,
            "complex": torch.randn(3, generator=draw, dtype=torch.complex128), "ünïcode:": torch.ones(3)}  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_container(tmp_path / "model.safetensors", pack_state(many_small()), {"journal": [1], "note": 'ü "b"'})
    return tmp_path / "model.safetensors"


def plain_bytes(state: dict[str, torch.Tensor], path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the size of a file that is not folded."""
    with monkeypatch.context() as patch:
        patch.setattr(module, "_WORTH_SHARE", 2.0)
        return write_container(path, pack_state(state), {"journal": [1], "note": 'ü "b"'}).file_bytes


def version(path: Path) -> str:
    with safe_open(path, framework="pt") as opened:
        return opened.metadata()["version"]


def test_a_folded_file_is_the_same_and_much_smaller(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    container = read_container(file)
    assert (version(file), container.metadata) == ("3", {"journal": [1], "note": 'ü "b"'})
    back = unpack_state(container.tensors)
    expected = many_small()
    assert list(back) == list(expected)
    for key, tensor in expected.items():
        assert (back[key].dtype, back[key].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(back[key].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    assert plain_bytes(expected, tmp_path / "plain", monkeypatch) - file.stat().st_size > 8000


def test_every_bit_is_accounted_for(file: Path):
    bits = read_container(file).encoded_bits()
    assert sum(bits.values()) == 8 * file.stat().st_size
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    with safe_open(file, framework="pt") as opened:
        directory = opened.get_tensor(DIRECTORY).numel()
    assert bits["other"] == 8 * (header + directory)
    assert header + directory < 3500


def test_a_file_of_the_third_version_still_loads():
    container = read_container(Path(__file__).parent / "version_3.safetensors")
    content = b"".join(
        tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in unpack_state(container.tensors).values()
    )
    assert hashlib.sha256(content).hexdigest() == "223604f5e671ff88b59ff7d59bcd0073509d0e020793575330002f25a4f26237"
    assert container.metadata == {"journal": [1], "note": 'ü "b"'}


def test_large_parts_stay_parts_of_their_own(file: Path):
    with safe_open(file, framework="pt") as opened:
        assert sorted(opened.keys()) == [DIRECTORY, SMALL, "large:values"]


def test_equal_models_give_equal_bytes(file: Path, tmp_path: Path):
    write_container(tmp_path / "again", pack_state(many_small()), {"note": 'ü "b"', "journal": [1]})
    assert (tmp_path / "again").read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("layers", "large", "expected"),
    [(20, 1000, "1"), (100, 1000, "3"), (100, 200_000, "1"), (400, 200_000, "3")],
    ids=["a few bytes", "much", "a small share", "a large share"],
)
def test_files_are_folded_where_it_is_worth_it(layers: int, large: int, expected: str, tmp_path: Path):
    state = {f"layer.{index}.bias": torch.arange(5.0) * index for index in range(layers)}
    state["large"] = torch.randint(-128, 128, (large,), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    write_container(tmp_path / "file", pack_state(state), {})
    assert version(tmp_path / "file") == expected


def test_damage_anywhere_is_noticed(file: Path, tmp_path: Path):
    content = file.read_bytes()
    draw = random.Random(0)
    damaged_file = tmp_path / "damaged"
    for position in draw.sample(range(len(content)), 100):
        damaged = bytearray(content)
        damaged[position] ^= 1 << draw.randrange(8)
        for written in (bytes(damaged), content[:position]):
            damaged_file.write_bytes(written)
            with pytest.raises(ArtifactError):
                read_container(damaged_file)


def test_signed_damage_gives_tensors_of_some_kind_or_one_error(file: Path, tmp_path: Path):
    content = file.read_bytes()
    draw = random.Random(1)
    signed = tmp_path / "signed"
    refused = 0
    for _ in range(200):
        damaged = bytearray(content)
        damaged[draw.randrange(len(content) - 1500, len(content))] ^= 1 << draw.randrange(8)  # mostly the directory
        signed.write_bytes(resign(bytes(damaged)))
        try:
            unpack_state(read_container(signed).tensors)
        except ArtifactError:
            refused += 1
    assert refused > 100


def changed(change: Callable[[dict[str, Any]], None]) -> dict[str, torch.Tensor]:
    """Return folded parts with another directory."""
    parts = fold({"a:values": torch.arange(3.0), "b:values": torch.ones(4, dtype=torch.uint8)}, {"tensors": "{}"})
    content = json.loads(zlib.decompress(bytes(parts[DIRECTORY].numpy())))
    change(content)
    return {**parts, DIRECTORY: as_bytes(zlib.compress(json.dumps(content).encode()))}


def as_bytes(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content.pop("text"), "must have `text` and `parts`"),
        (lambda content: content.update(more=1), "must have `text` and `parts`"),
        (lambda content: content.update(text=[]), "`text` must be strings"),
        (lambda content: content.update(text={"note": 1}), "`text` must be strings"),
        (lambda content: content.update(parts={}), "`parts` must be a list"),
        (lambda content: content["parts"].append(["c:values", "F32"]), "no name, type and shape"),
        (lambda content: content["parts"].append(["c:values", "F4", []]), "no name, type and shape"),
        (lambda content: content["parts"].append(["c:values", "U8", [-1]]), "has no shape"),
        (lambda content: content["parts"].append(["c:values", "U8", [2**70]]), "has no shape"),
        (lambda content: content["parts"].append(["c:values", "U8", [True]]), "has no shape"),
        (lambda content: content["parts"].append(["c:values", "U8", [2**62, 2**62]]), "has no shape"),
        (lambda content: content["parts"].append(["c:values", "U8", [2**40, 2**40, 0]]), "has no shape"),
        (lambda content: content["parts"].append(["c:values", "F64", [2**62]]), "does not fit the file"),
        (lambda content: content["parts"].append(["a:values", "U8", [0]]), "does not fit the file"),
        (lambda content: content["parts"].insert(0, ["c:values", "U8", [1]]), "does not fit the file"),
        (lambda content: content["parts"].pop(), "names 12 of 16 bytes"),
    ],
)
def test_hostile_directories(change: Callable[[dict[str, Any]], None], words: str):
    with pytest.raises(ValueError, match=words):
        unfold(changed(change))


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({}, "must be bytes"),
        ({DIRECTORY: torch.ones(3)}, "must be bytes"),
        ({DIRECTORY: as_bytes(b"no deflate")}, "cannot be inflated"),
        ({DIRECTORY: as_bytes(zlib.compress(b"{}")[:-3])}, "cut off"),
        ({DIRECTORY: as_bytes(zlib.compress(b"{}") + b"more")}, "bytes behind it"),
        ({DIRECTORY: as_bytes(zlib.compress(b" " * (folding.MAX_HEADER_BYTES + 1)))}, "larger than 16777216 bytes"),
        ({DIRECTORY: as_bytes(zlib.compress(b"{"))}, "Expecting property name"),
        ({DIRECTORY: as_bytes(zlib.compress(b"[]"))}, "must have `text` and `parts`"),
    ],
)
def test_what_is_no_directory(parts: dict[str, torch.Tensor], words: str):
    with pytest.raises(ValueError, match=words):
        unfold({SMALL: torch.empty(0, dtype=torch.uint8), **parts})


def test_a_directory_may_be_as_large_as_its_limit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(folding, "MAX_HEADER_BYTES", len('{"text":{"note":"xxx"},"parts":[]}'))
    assert unfold(fold({}, {"note": "xxx"})) == ({}, {"note": "xxx"})
    with pytest.raises(ConfigurationError, match="takes 35 bytes, at most 34 are allowed"):
        fold({}, {"note": "xxxx"})


def test_a_directory_that_is_too_large_is_not_written(tmp_path: Path):
    with pytest.raises(ConfigurationError, match="at most 16777216 are allowed"):
        write_container(tmp_path / "x", {"a": Packed("dense", {"values": torch.ones(1)})}, {"note": "x" * 2**24})
    assert not list(tmp_path.iterdir())


def test_own_entries_in_a_directory_change_nothing(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    state = pack_state(many_small())
    honest = module._text
    monkeypatch.setattr(module, "_text", lambda *given: {**honest(*given), "version": "1", "sha256": "0"})
    write_container(tmp_path / "odd", state, {"journal": [1], "note": 'ü "b"'})
    assert read_container(tmp_path / "odd").metadata == read_container(file).metadata
