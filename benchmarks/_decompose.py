"""Whole networks as factors, ours and by tensorly; peak memory: ``python -m benchmarks._decompose KERNELS QUICK``."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorly as tl
import torch
from tensorly.decomposition import partial_tucker
from torch import Tensor, nn
from torchvision.models import vgg16

from benchmarks._memory import resident
from lightning_compress import apply
from lightning_compress.low_rank.decompose import cost, dense_cost, factorize, full_ranks, usable_ranks

RATE = 2.75
"""How many times fewer weights each layer gets, as the survey's VGG-16."""
Found = dict[str, float]
"""Relative error of each layer by its path."""


def network(quick: bool) -> nn.Sequential:
    """Return the layers of VGG-16 that have weights, or three of them."""
    whole = vgg16()
    layers = [layer for layer in whole.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    return nn.Sequential(*(layers[2:4] + layers[-1:] if quick else layers))


def ranks_at(layer: nn.Module, method: str, rate: float = RATE) -> tuple[int, ...]:
    """Return the ranks, one share of the full ones, at which a layer has ``rate`` times fewer weights."""
    low, high, full, goal = 0.0, 1.0, full_ranks(layer, method), dense_cost(layer).weights / rate
    for _ in range(30):
        middle = (low + high) / 2
        ranks = usable_ranks(layer, method, [int(rank * middle) for rank in full])
        low, high = (middle, high) if cost(layer, method, ranks).weights <= goal else (low, middle)
    return usable_ranks(layer, method, [int(rank * low) for rank in full])


def method_of(layer: nn.Module, kernels: str) -> str:
    """Return the method for a layer: ``kernels`` for convolutions, else an SVD."""
    return kernels if isinstance(layer, nn.Conv2d) else "svd"


def ours(net: nn.Sequential, kernels: str) -> Found:
    """Put factors in place of every layer."""
    found = {}
    for path, layer in list(net.named_children()):
        made = factorize(layer, method_of(layer, kernels), ranks_at(layer, method_of(layer, kernels)))
        found[path] = made.error
        apply(net, made.edit(path))
    return found


def theirs(net: nn.Sequential, kernels: str) -> Found:
    """Return the errors of plain calls: Tucker of convolutions, truncated SVDs of the rest; ``kernels`` is Tucker."""
    found = {}
    with tl.backend_context("pytorch"), torch.no_grad():
        for path, layer in net.named_children():
            weight, ranks = layer.weight.detach(), ranks_at(layer, method_of(layer, kernels))
            split: Callable[[Tensor, Any], Tensor] = _tucker if isinstance(layer, nn.Conv2d) else _svd
            found[path] = float((weight - split(weight, ranks)).norm() / weight.norm())
    return found


def _tucker(weight: Tensor, ranks: tuple[int, int]) -> Tensor:
    (core, factors), _ = partial_tucker(weight, rank=[ranks[1], ranks[0]], modes=[0, 1], init="svd", tol=1e-4)
    product: Tensor = tl.tenalg.multi_mode_dot(core, factors, modes=[0, 1])
    return product


def _svd(weight: Tensor, ranks: tuple[int]) -> Tensor:
    left, values, right = tl.tenalg.svd_interface(weight, method="truncated_svd", n_eigenvecs=ranks[0])
    product: Tensor = (left * values) @ right
    return product


def peak(kernels: str, quick: bool) -> dict[str, float]:
    """Return the size of a network and the highest memory of a process that factorizes it, both in bytes."""
    fresh = subprocess.run(
        [sys.executable, "-m", "benchmarks._decompose", kernels, str(int(quick))],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
    )
    if fresh.returncode:
        raise RuntimeError(f"the decomposition failed:\n{fresh.stderr}")
    figures: dict[str, float] = json.loads(fresh.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Factorize a network and print what memory that took, the network itself included."""
    torch.set_num_threads(1)
    kernels, quick = sys.argv[1], bool(int(sys.argv[2]))
    ours(nn.Sequential(nn.Conv2d(4, 4, 3), nn.Linear(8, 8)), kernels)
    start = resident()[0]
    net = network(quick)
    size = sum(4 * parameter.numel() for parameter in net.parameters())
    ours(net, kernels)
    print(json.dumps({"model": size, "peak": resident()[1] - start}))


if __name__ == "__main__":
    main()
