"""A few bytes can stand for gigabytes: what a hostile file may take in memory, and what an honest one may."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_compress.coding.container import read_container, write_container
from lightning_compress.coding.packing import Packed, bits_by_role, pack
from lightning_compress.coding.state import EXPANSION, SPARE_BYTES, most_bytes, pack_state, unpack_state
from lightning_compress.core.checkpoint import load_compressed, save_compressed
from lightning_compress.core.errors import ArtifactError
from lightning_compress.core.journal import Edit, Journal

GIGABYTES = 2**36


def bomb(shape: list[int], *data: int, packing: str = "palette") -> Packed:
    """Return a tensor of equal numbers: one value, a stream of no bits."""
    part = torch.tensor(data or [1, 0, 0, 0, 0, 0, 0, 1], dtype=torch.uint8)
    return Packed(packing, {"data": part}, {"shape": shape, "dtype": "float32"})


def test_a_bomb_is_what_it_says() -> None:
    assert torch.equal(unpack_state({"a": bomb([3])})["a"], torch.zeros(3))


@pytest.mark.parametrize("shapes", [[[GIGABYTES]], [[2**20, 2**15], [2, 2]], [[2**18]] * 2000])
def test_more_than_a_file_may_hold_is_refused_before_it_is_unpacked(shapes: list[list[int]]) -> None:
    with pytest.raises(ArtifactError, match=r"would take \d+ bytes of memory, where \d+ are allowed.*largest is"):
        unpack_state({f"t{place}": bomb(shape) for place, shape in enumerate(shapes)})


def test_rows_are_not_made_before_their_codebooks_are_found() -> None:
    rows = bomb([GIGABYTES, 2], 1, 0, 0, 0, 0, 0, 0, 1, packing="rows")
    with pytest.raises(ArtifactError, match="bytes of codebooks are declared where"):
        bits_by_role(rows)


def test_a_file_for_a_small_model_may_not_take_a_large_one_s_memory(tmp_path: Path) -> None:
    tensors = {"0.weight": bomb([GIGABYTES]), "0.bias": bomb([2])}
    for edits in ((), (Edit("replace", "0", "quantized", {"weight": None}),)):
        write_container(tmp_path / "bomb", tensors, {"journal": json.loads(Journal(edits).to_json())})
        with pytest.raises(ArtifactError, match="bytes of memory"):
            load_compressed(nn.Sequential(nn.Linear(2, 2)), tmp_path / "bomb")


def test_equal_numbers_of_a_large_model_load(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(5000, 5000, bias=False))
    nn.init.zeros_(net[0].weight)
    info = save_compressed(net, tmp_path / "zeros")
    assert EXPANSION * info.bytes + SPARE_BYTES < 4 * 5000**2  # only the model allows it
    loaded = load_compressed(nn.Sequential(nn.Linear(5000, 5000, bias=False)), tmp_path / "zeros")
    assert not loaded[0].weight.any()
    packed = read_container(tmp_path / "zeros").tensors
    with pytest.raises(ArtifactError, match="bytes of memory"):
        unpack_state(packed)
    assert not unpack_state(packed, most_bytes(info.bytes, 4 * 5000**2))["0.weight"].any()


_LOAD = """
import resource, sys
from torch import nn
from lightning_compress import load_compressed
from lightning_compress.core.errors import ArtifactError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    load_compressed(nn.Sequential(nn.Linear(2, 2)), sys.argv[1])
except ArtifactError:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts in the units of Linux")
def test_refusing_takes_no_memory(tmp_path: Path) -> None:
    tensors = {"0.weight": bomb([2**28]), "0.bias": pack(torch.zeros(2))}
    write_container(tmp_path / "bomb", tensors, {"journal": json.loads(Journal().to_json())})
    done = subprocess.run([sys.executable, "-c", _LOAD, str(tmp_path / "bomb")], capture_output=True, text=True)
    assert int(done.stdout) < 20_000, done.stderr  # kilobytes, where the tensor alone would take a million


def test_a_state_of_many_aliases_counts_its_tensor_once() -> None:
    weight = torch.zeros(2**21)
    packed = pack_state(dict.fromkeys((f"t{place}" for place in range(100)), weight))
    assert len(unpack_state(packed)) == 100
