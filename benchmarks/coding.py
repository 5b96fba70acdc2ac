"""Codes in the compressed file: bits a weight beside the entropy and gzip, seconds to write and read, peak memory."""

from __future__ import annotations

import math
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import _common as common
from benchmarks._common import Row
from benchmarks._memory import resident
from lightning_compress import load_compressed, save_compressed

WRITE_GOAL, READ_GOAL = 10.0, 4.0
"""Seconds for 60 M weights on two cores, checksum and disk included."""

FEW_VALUES = ("sparse shared", "int8", "shared", "binary")
"""Kinds whose weights have few distinct values, for which the entropy is a bound."""

_LAYERS = 16


class Held(nn.Module):
    """Nothing but tensors, as a state_dict holds them."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


def make(kind: str, size: int) -> Held:
    """Return a network of about ``size`` weights: sparse and shared, shared, sparse, dense, eight bits or binary."""
    generator = torch.Generator().manual_seed(0)
    rows = max(8, math.isqrt(size // _LAYERS))
    return Held({f"layer{place}": _weight(kind, (rows, rows), generator) for place in range(_LAYERS)})


def _weight(kind: str, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    weight = torch.randn(shape, generator=generator) / math.sqrt(shape[1])
    if kind == "int8":
        return (weight / weight.abs().max() * 127).round().to(torch.int8)
    if kind == "binary":
        return weight.sign() * weight.abs().mean()
    if "sparse" in kind:
        weight[weight.abs() < weight.abs().flatten().kthvalue(int(0.9 * weight.numel())).values] = 0
    if "shared" in kind:
        step = weight.abs().max() / 16
        weight = torch.where(weight != 0, (torch.floor(weight / step) + 0.5) * step, weight)
    return weight.bfloat16() if kind == "bfloat16" else weight


def entropy_bits(model: Held) -> float:
    """Return the fewest bits that independent weights with these values can take, codebooks not counted."""
    total = 0.0
    for tensor in model.buffers():
        words = tensor.flatten().view(torch.uint8).numpy().view(f"u{tensor.element_size()}")
        counts = np.unique(words, return_counts=True)[1]
        total += float(-(counts * np.log2(counts / counts.sum())).sum())
    return total


def zlib_bits(model: Held) -> int:
    """Return what ``gzip -6`` makes of the dense tensors."""
    packer = zlib.compressobj(6, zlib.DEFLATED, 31)
    size = sum(len(packer.compress(tensor.flatten().view(torch.uint8).numpy().data)) for tensor in model.buffers())
    return 8 * (size + len(packer.flush()))


@contextmanager
def peak() -> Iterator[list[int]]:
    """Sample the resident memory every few milliseconds; the list holds the rise in bytes at the end."""
    start, highest, stop = resident()[0], [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.003):
            highest[0] = max(highest[0], resident()[0] - start)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield highest
    finally:
        stop.set()
        watcher.join()


def coding_rows(kind: str, size: int, repeats: int, folder: Path) -> list[Row]:
    """Return bits, seconds and memory for one kind of network."""
    model, bare = make(kind, size), make(kind, size)
    for tensor in bare.buffers():
        tensor.zero_()
    path, weights = folder / "model.safetensors", sum(tensor.numel() for tensor in model.buffers())
    dense = sum(tensor.nbytes for tensor in model.buffers())
    calls: dict[str, Callable[[], object]] = {"write": partial(save_compressed, model, path)}
    times = common.time_calls(calls, repeats)
    calls = {"read": partial(load_compressed, bare, path)}
    times |= common.time_calls(calls, repeats)
    if not all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(model.buffers(), bare.buffers(), strict=True)
    ):
        raise RuntimeError("what was loaded is not what was saved; the comparison is void")
    label, rows = f"{weights / 1e6:.1f} M, {kind}", []
    gzipped, bits = zlib_bits(model) / weights, 8 * path.stat().st_size / weights
    rows.append(Row(f"{label}: file", bits, "bits a weight", "gzip -6", bits / gzipped, gzipped))
    if kind in FEW_VALUES:  # elsewhere nearly every weight is a value of its own, and the bound says nothing
        bound = entropy_bits(model) / weights
        rows.append(
            Row(
                f"{label}: file beside its entropy", bits, "bits a weight", "entropy", bits / bound, 1.02 * bound + 0.01
            )
        )
    for coding in ("huffman", "ans", "none"):
        other = 8 * save_compressed(model, path, coding=coding).bytes / weights
        rows.append(Row(f"{label}: file, coding={coding}", other, "bits a weight", "auto", other / bits))
    save_compressed(model, path)
    large = size >= 50_000_000
    for verb, goal in (("write", WRITE_GOAL), ("read", READ_GOAL)):
        seconds = float(np.median(times[verb][0]))
        rows.append(Row(f"{label}: {verb}", seconds, "s", goal=goal if large else None))
    once = {"write": partial(save_compressed, model, path), "read": partial(load_compressed, bare, path)}
    for verb, call in once.items():
        with peak() as highest:
            call()
        rows.append(Row(f"{label}: {verb}, peak memory", highest[0] / 2**20, "MiB", "dense bytes", highest[0] / dense))
    return rows


KINDS = {
    "sparse shared": 60e6,
    "dense": 60e6,
    "int8": 60e6,
    "sparse": 10e6,
    "shared": 10e6,
    "bfloat16": 10e6,
    "binary": 10e6,
}
"""Weights of each kind."""


def measure(quick: bool) -> list[Row]:
    """Return all rows."""
    rows = []
    for kind, size in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            rows += coding_rows(kind, 1_000_000 if quick else int(size), 1 if quick else 3, Path(folder))
    return rows


def main(quick: bool, out: Path) -> Path:
    """Measure, print and write."""
    torch.set_num_threads(2)
    facts = common.environment(quick=quick, judged="bits on disk, header included; seconds are wall time")
    return common.publish("coding", measure(quick), facts, out)


if __name__ == "__main__":
    options = common.arguments(__doc__)
    main(options.quick, options.out)
