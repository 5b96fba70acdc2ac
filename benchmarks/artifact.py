"""The compressed file: bytes, and seconds to write and read it, at 90 % zeros; beside dense files and gzip."""

from __future__ import annotations

import gzip
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks import _common as common
from benchmarks._common import Row
from lightning_compress import Select, compress, load_compressed, save_compressed
from lightning_compress.pruning import IterativePruning

SPARSITY = 0.9
SIZE_GOAL = 1 / 6
_LAYERS = 6
_GZIP_LEVEL = 6


def make_model(size: int, sparsity: float = SPARSITY) -> nn.Module:
    """Return equal linear layers with about ``size`` weights in all, pruned."""
    width = max(2, round((size / _LAYERS) ** 0.5))
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(_LAYERS)))
    return compress(model, IterativePruning(sparsity, select=Select()), inplace=True)


def artifact_rows(size: int, repeats: int, folder: Path) -> list[Row]:
    """Return bytes and seconds of each kind of file for a model of ``size`` weights."""
    model = make_model(size)
    state: dict[str, Tensor] = {key: value.detach() for key, value in model.state_dict().items()}
    packed, dense, zipped = folder / "model.safetensors", folder / "dense.safetensors", folder / "dense.gz"
    empty = make_model(size, sparsity=0.0)
    writing: dict[str, Callable[[], object]] = {
        "save_compressed": partial(save_compressed, model, packed),
        "dense safetensors": partial(save_file, state, dense),
        "gzip -6": lambda: _zip(dense, zipped),
    }
    reading: dict[str, Callable[[], object]] = {
        "load_compressed": partial(load_compressed, empty, packed),
        "dense safetensors": lambda: empty.load_state_dict(load_file(dense)),
        "gzip -6": lambda: _unzip(zipped),
    }
    save_file(state, dense)
    rows = []
    for verb, calls in (("write", writing), ("read", reading)):
        times = {name: float(np.median(wall)) for name, (wall, _) in common.time_calls(calls, repeats).items()}
        for name, seconds in times.items():
            against = "dense safetensors"
            rows.append(Row(f"{_label(size)}: {verb}, {name}", seconds, "s", against, seconds / times[against]))
    load_compressed(empty, packed)
    if not all(torch.equal(value, state[key]) for key, value in empty.state_dict().items()):
        raise RuntimeError("what was loaded is not what was saved; the comparison is void")
    whole = dense.stat().st_size
    for name, path in (("save_compressed", packed), ("dense safetensors", dense), ("gzip -6", zipped)):
        size_on_disk = path.stat().st_size
        rows.append(
            Row(f"{_label(size)}: file, {name}", size_on_disk, "bytes", "dense safetensors", size_on_disk / whole)
        )
    share = packed.stat().st_size / whole
    rows.append(Row(f"{_label(size)}: share of the dense file", share, "x", "dense safetensors", share, SIZE_GOAL))
    return rows


def _label(size: int) -> str:
    return f"{size / 1e6:g} M weights"


def _zip(source: Path, target: Path) -> None:
    with source.open("rb") as plain, gzip.open(target, "wb", compresslevel=_GZIP_LEVEL) as zipped:
        shutil.copyfileobj(plain, zipped, 1 << 20)


def _unzip(source: Path) -> None:
    with gzip.open(source, "rb") as zipped:
        while zipped.read(1 << 20):
            pass


def measure(quick: bool) -> list[Row]:
    """Return all rows."""
    sizes = [(1_000_000, 3), (10_000_000, 1)] if quick else [(1_000_000, 7), (10_000_000, 5), (60_000_000, 3)]
    rows = []
    for size, repeats in sizes:
        with tempfile.TemporaryDirectory() as folder:
            rows += artifact_rows(size, repeats, Path(folder))
    return rows


def main(quick: bool, out: Path) -> Path:
    """Measure, print and write."""
    torch.set_num_threads(1)
    facts = common.environment(quick=quick, sparsity=SPARSITY, judged="size on disk; seconds are wall time")
    return common.publish("artifact", measure(quick), facts, out)


if __name__ == "__main__":
    options = common.arguments(__doc__)
    main(options.quick, options.out)
