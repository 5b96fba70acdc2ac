from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_compress.core.checkpoint import load_compressed, save_compressed
from lightning_compress.core.errors import ArtifactError, ConfigurationError


def resigned(content: bytes) -> bytes:
    start = content.index(b'"sha256":"') + len(b'"sha256":"')
    blank = content[:start] + b"0" * 64 + content[start + 64 :]
    return content[:start] + hashlib.sha256(blank).hexdigest().encode() + content[start + 64 :]


def coded_network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20), nn.Linear(20, 400))
    with torch.no_grad():
        model[0].weight.copy_((model[0].weight * 40).round() / 40)
        model[1].weight.mul_(torch.rand(20, 30) < 0.2)
    return model


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draw=st.randoms(use_true_random=False), coding=st.sampled_from(["auto", "huffman", "none"]))
def test_flipped_bytes_under_a_new_checksum_leave_the_model_alone(tmp_path: Path, draw: random.Random, coding: str):
    path = tmp_path / coding
    if not path.exists():
        save_compressed(coded_network(), path, coding=coding)
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    for _ in range(draw.randint(1, 3)):
        content[draw.randrange(start, len(content))] = draw.randrange(256)
    (tmp_path / "damaged").write_bytes(resigned(bytes(content)))
    model = coded_network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        load_compressed(model, tmp_path / "damaged")
    except ArtifactError:
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_shape_of_terabytes_is_refused_before_anything_is_allocated(tmp_path: Path):
    model = nn.Linear(100, 100, bias=False)
    nn.init.ones_(model.weight)
    save_compressed(model, tmp_path / "file")  # one value: no bits a weight, so that any shape would fit
    content = (tmp_path / "file").read_bytes()
    assert content.count(b"[100,100]") == 1  # in the table of packings
    bomb = content.replace(b'{\\"shape\\":[100,100],', b'{\\"shape\\":[9E9,100],')
    (tmp_path / "bomb").write_bytes(resigned(bomb))
    with pytest.raises(ArtifactError, match="`shape` must be a list of sizes"):
        load_compressed(nn.Linear(100, 100, bias=False), tmp_path / "bomb")
    longer = content.replace(b'{\\"shape\\":[100,100],', b'{\\"shape\\":[10000000,999],')
    grown = len(longer) - len(content)
    header = int.from_bytes(content[:8], "little")
    padded = longer[: 8 + header + grown] + b" " * (-grown % 8) + longer[8 + header + grown :]
    (tmp_path / "bomb").write_bytes(resigned((header + grown + -grown % 8).to_bytes(8, "little") + padded[8:]))
    with pytest.raises(ArtifactError, match="would take 39960000000 bytes of memory"):
        load_compressed(nn.Linear(100, 100, bias=False), tmp_path / "bomb")


@pytest.mark.parametrize("coding", ["auto", "huffman", "ans", "none"])
def test_each_coding_restores_every_bit(tmp_path: Path, coding: str):
    model, bare = coded_network(), coded_network()
    with torch.no_grad():
        bare[0].weight.zero_()
    info = save_compressed(model, tmp_path / "file", coding=coding)
    assert sum(info.encoded_bits.values()) == 8 * info.bytes == 8 * (tmp_path / "file").stat().st_size
    load_compressed(bare, tmp_path / "file")
    for key, value in model.state_dict().items():
        assert torch.equal(bare.state_dict()[key].view(torch.int32), value.view(torch.int32))


def test_an_unknown_coding_is_refused(tmp_path: Path):
    with pytest.raises(ConfigurationError, match="`coding` must be one of 'auto', 'huffman', 'ans', 'none', got 'zip'"):
        save_compressed(nn.Linear(2, 2), tmp_path / "file", coding="zip")
    assert not (tmp_path / "file").exists()
