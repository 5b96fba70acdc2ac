from __future__ import annotations

import hashlib
import json
import os
import random
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_compress.coding import container as module
from lightning_compress.coding import packing
from lightning_compress.coding.container import Container, read_container, write_container
from lightning_compress.coding.simple import SIMPLE
from lightning_compress.coding.state import pack_state, unpack_state
from lightning_compress.core.errors import ArtifactError, ConfigurationError


def small_state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sparse = torch.randn(64, 32, generator=generator).relu()
    sparse[torch.rand(64, 32, generator=generator) < 0.8] = 0
    wide = torch.randn(3, generator=generator, dtype=torch.float64)
    return {
        "net.weight": sparse, "net.bias": torch.randn(5, generator=generator), "tied": sparse, "count": torch.tensor(7),
        "wide": wide, "half": wide.bfloat16(), "complex": wide.to(torch.complex128), "flags": wide > 0,
        "empty": torch.empty(0, 3), "with:colon": wide, "ünïcode": torch.ones(3, dtype=torch.uint8),
    }  # fmt: skip


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a file of the first version, whose parts are plain to see; codes have tests of their own."""
    monkeypatch.setattr(packing, "PACKINGS", SIMPLE)
    write_container(tmp_path / "model.safetensors", pack_state(small_state()), {"journal": [], "note": "a \"b\" 'c' ü"})
    return tmp_path / "model.safetensors"


def assert_same(container: Container) -> None:
    back = unpack_state(container.tensors)
    expected = small_state()
    assert list(back) == list(expected)
    for key, tensor in expected.items():
        assert back[key].dtype == tensor.dtype
        assert back[key].shape == tensor.shape
        assert torch.equal(back[key], tensor)


def resign(content: bytes) -> bytes:
    """Put the right checksum into an altered file, as an attacker would."""
    start = content.index(b'"sha256":"') + len(b'"sha256":"')
    blank = content[:start] + b"0" * 64 + content[start + 64 :]
    return content[:start] + hashlib.sha256(blank).hexdigest().encode() + content[start + 64 :]


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the header of a file as parsed, and sign it again."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    body = json.dumps(header, separators=(",", ":")).encode()
    body += b" " * (-len(body) % 8)
    path.write_bytes(resign(len(body).to_bytes(8, "little") + body + content[8 + length :]))


def test_round_trip(file: Path):
    container = read_container(file)
    assert container.metadata == {"journal": [], "note": "a \"b\" 'c' ü"}
    assert_same(container)


def test_size_is_accounted_for(file: Path):
    container = read_container(file)
    bits = container.encoded_bits()
    assert sum(bits.values()) == 8 * file.stat().st_size == 8 * container.file_bytes
    nonzero = int((small_state()["net.weight"] != 0).sum())
    assert bits["indices"] == 64 * 32
    # the sparse matrix, five floats, an int64, three doubles (stored once), three bfloat16, and so on
    assert bits["values"] == 32 * nonzero + 5 * 32 + 64 + 3 * 64 + 3 * 16 + 3 * 128 + 3 * 8 + 3 * 8
    assert bits["other"] == 8 * (8 + int.from_bytes(file.read_bytes()[:8], "little"))


def test_other_readers_can_open_it(file: Path):
    parts = load_file(file)
    assert torch.equal(parts["net.bias:values"], small_state()["net.bias"])


def test_equal_models_give_equal_bytes(file: Path, tmp_path: Path):
    metadata = dict(reversed(read_container(file).metadata.items()))
    write_container(tmp_path / "again", pack_state(small_state()), metadata)
    assert (tmp_path / "again").read_bytes() == file.read_bytes()


def test_no_tensors(tmp_path: Path):
    write_container(tmp_path / "nothing", {}, {})
    assert read_container(tmp_path / "nothing").tensors == {}


def test_a_loaded_file_can_be_replaced(file: Path):
    container = read_container(file)
    write_container(file, container.tensors, container.metadata)
    assert_same(read_container(file))


def test_a_crash_leaves_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch):
    before = file.read_bytes()

    def fail(handle: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(module.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_container(file, {}, {})
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_permissions_are_the_usual_ones(file: Path, tmp_path: Path):
    (tmp_path / "plain").write_bytes(b"")
    assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_write_checks_its_arguments(tmp_path: Path):
    with pytest.raises(ConfigurationError, match="is a folder"):
        write_container(tmp_path, {}, {})
    for value in (object(), float("nan"), {1: {2, 3}}):
        with pytest.raises(ConfigurationError, match="'provenance' cannot be written as JSON"):
            write_container(tmp_path / "x", {}, {"provenance": value})
    with pytest.raises(ConfigurationError, match=r"entries \['tensors', 'version'\]"):
        write_container(tmp_path / "x", {}, {"version": 3, "tensors": {}, "note": ""})
    assert list(tmp_path.iterdir()) == []
    write_container(tmp_path / "new" / "folder" / "x", {}, {})
    assert (tmp_path / "new" / "folder" / "x").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigurationError, match="not a regular file"):
        write_container(tmp_path / "pipe", {}, {})
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "No such file"),
    "folder": (lambda path: path.mkdir(), "a folder"),
    "empty": (lambda path: path.write_bytes(b""), "an empty file"),
    "short": (lambda path: path.write_bytes(b"\x10\0"), "another kind of file"),
    "text": (lambda path: path.write_text("accuracy: 0.98\n" * 9), "another kind of file"),
    "json": (lambda path: path.write_text('{"a": 1, "b": 2}'), "another kind of file"),
    "checkpoint": (lambda path: torch.save({"a": torch.ones(3)}, path), "`torch.save` writes"),
    "pickle": (lambda path: path.write_bytes(b"\x80\x04}q\x00."), "a pickle"),
    "plain": (lambda path: save_file({"a": torch.ones(3)}, path), "a plain safetensors file"),
    "other": (lambda path: save_file({"a": torch.ones(3)}, path, {"format": "pt"}), "a plain safetensors file"),
    "huge header": (lambda path: path.write_bytes((2**40).to_bytes(8, "little") + b"{}"), "another kind of file"),
    "long header": (lambda path: path.write_bytes((2**20).to_bytes(8, "little") + b"{}"), "10 bytes where the header"),
    "deep": (lambda path: path.write_bytes((2**18).to_bytes(8, "little") + b'{"a":' * 2**16), "damaged or truncated"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_files_give_one_clear_error(kind: str, tmp_path: Path):
    make, words = FOREIGN[kind]
    make(tmp_path / "given.bin")
    with pytest.raises(ArtifactError, match=words) as caught:
        read_container(tmp_path / "given.bin")
    assert "given.bin" in str(caught.value)
    assert "save_compressed" in str(caught.value)


def test_newer_and_odd_versions(file: Path):
    rewrite(file, lambda header: header["__metadata__"].update(version="4"))
    with pytest.raises(ArtifactError, match="got version 4; install a newer lightning-compress"):
        read_container(file)
    for version in ("", "-1", "one", "9" * 5000):
        rewrite(file, lambda header, version=version: header["__metadata__"].update(version=version))
        with pytest.raises(ArtifactError, match="version"):
            read_container(file)


def test_truncated_anywhere(file: Path, tmp_path: Path):
    content = file.read_bytes()
    cut = tmp_path / "cut"
    for length in {*range(0, len(content), max(1, len(content) // 200)), *range(20), len(content) - 1}:
        cut.write_bytes(content[:length])
        with pytest.raises(ArtifactError):
            read_container(cut)
    cut.write_bytes(content + b"\0")
    with pytest.raises(ArtifactError):
        read_container(cut)


def test_a_flipped_bit_anywhere_is_noticed(file: Path, tmp_path: Path):
    content = file.read_bytes()
    draw = random.Random(0)
    flipped = tmp_path / "flipped"
    for position in [*range(16), *draw.sample(range(len(content)), 300)]:
        damaged = bytearray(content)
        damaged[position] ^= 1 << draw.randrange(8)
        flipped.write_bytes(damaged)
        with pytest.raises(ArtifactError):
            read_container(flipped)


def test_signed_changes_of_the_header_are_survived(file: Path, tmp_path: Path):
    """With a valid checksum every flipped byte still gives tensors of some kind or one error."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    draw = random.Random(1)
    signed = tmp_path / "signed"
    outcomes = {True: 0, False: 0}
    for _ in range(400):
        damaged = bytearray(content)
        damaged[draw.randrange(8, 8 + length)] = draw.randrange(32, 127)
        try:
            signed.write_bytes(resign(bytes(damaged)))
        except ValueError:  # the checksum's own name was hit
            continue
        try:
            unpack_state(read_container(signed).tensors)
            outcomes[True] += 1
        except ArtifactError:
            outcomes[False] += 1
    assert min(outcomes.values()) > 20


def set_tensor(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        table = json.loads(header["__metadata__"]["tensors"])
        table[key] = value
        header["__metadata__"]["tensors"] = json.dumps(table)

    return change


def set_table(text: str) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["__metadata__"].update(tensors=text)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_tensor("net.weight", ["bitmap", {"shape": [10**12]}]), "would take 4000000000112 bytes"),
        (set_tensor("net.weight", ["bitmap", {"shape": [64, 64]}]), "bitmap of 256 bytes"),
        (set_tensor("net.weight", ["bitmap", {"shape": [10**30]}]), "`shape` must be"),
        (set_tensor("net.weight", ["bitmap", {"shape": [64, 32], "dtype": "float128"}]), "unknown `dtype`"),
        (set_tensor("net.weight", ["magic", {}]), "unknown packing 'magic'"),
        (set_tensor("net.weight", [["magic"], {}]), "no packing and config"),
        (set_tensor("net.weight", ["dense", {}]), "the parts"),
        (set_tensor("net.weight", "dense"), "no packing and config"),
        (set_tensor("new", ["dense", {}]), "the parts"),
        (set_tensor("tied", ["alias", {"of": "tied"}]), "alias"),
        (set_tensor("tied", ["alias", {}]), "alias"),
        (set_table("{}"), "parts without a packing"),
        (set_table("[]"), "parts without a packing"),
        (set_table("{"), "damaged"),
        (set_table("[" * 100_000), "damaged"),
        (lambda header: header["__metadata__"].pop("tensors"), "parts without a packing"),
        (lambda header: header["__metadata__"].update(note="nothing"), "damaged"),
        (lambda header: header["net.bias:values"].update(shape=[10**12]), "damaged"),
        (lambda header: header["net.bias:values"].update(dtype="F4"), "damaged"),
        (lambda header: header.pop("net.bias:values"), "damaged"),
    ],
)
def test_hostile_headers_with_a_valid_checksum(file: Path, change: Callable[[dict[str, Any]], None], words: str):
    rewrite(file, change)
    with pytest.raises(ArtifactError, match=words):
        unpack_state(read_container(file).tensors)


def test_a_file_without_checksum_is_refused(file: Path):
    content = file.read_bytes()
    file.write_bytes(content.replace(b'"sha256":', b'"sha257":'))
    with pytest.raises(ArtifactError, match="no checksum"):
        read_container(file)
