"""Which layers follow each other so closely that a channel's scale can move from one to the next."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_compress.core.patches import CONVOLUTIONS
from lightning_compress.core.paths import named_layers
from lightning_compress.quantization.graph import Graph, Operation
from lightning_compress.quantization.tracing import trace_network

_PASSES = (
    *("relu", "relu_", "ReLU", "LeakyReLU", "PReLU", "leaky_relu", "leaky_relu_", "prelu", "mean", "clone", "detach"),
    *("Identity", "Dropout", "Flatten", "flatten", "view", "reshape", "contiguous", "boolean_dispatch"),
    *("max_pool2d_with_indices", "dropout", "dropout_", "StochasticDepth", "stochastic_depth"),
)
_POOLS = ("MaxPool", "AdaptiveMaxPool", "AvgPool", "AdaptiveAvgPool", "Dropout", "max_pool", "avg_pool", "adaptive_")


@dataclass(frozen=True)
class Pair:
    """Two layers with nothing between them that a positive scale of a channel would not pass.

    Args:
        first: Path of the layer whose output channels are scaled down.
        second: Path of the layer whose input channels are scaled up.
        norm: Path of the batch norm right behind the first, if there is one.
    """

    first: str
    second: str
    norm: str | None = None


def find_pairs(model: nn.Module, paths: Collection[str], example_inputs: Any = None) -> list[Pair]:
    """Return the pairs among some layers, in the order they are computed.

    Between them stand at most a batch norm (right behind the first), ReLU or leaky ReLU, pools, dropouts and reshapes;
    each of the two is called once, and the second alone takes what the first computes.

    Args:
        model: Any module; it is traced, not run.
        paths: Linear and Conv1d/2d/3d layers of it; others are passed over.
        example_inputs: One batch, for networks that only ``torch.export`` can trace.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.ReLU6())
    >>> find_pairs(net, ["0", "3"])
    [Pair(first='0', second='3', norm='1')]
    """
    known = named_layers(model)
    plain = {path: known[path] for path in paths if isinstance(known[path], (nn.Linear, *CONVOLUTIONS))}
    return [pair for graph in trace_network(model, example_inputs).graphs for pair in _pairs_of(graph, plain)]


def _pairs_of(graph: Graph, layers: Mapping[str, nn.Module]) -> list[Pair]:
    users, calls, pairs = graph.users(), graph.calls(), []
    for operation in graph.operations:
        if operation.path not in layers or calls[operation.path] != 1:
            continue
        norm, current = None, _follower(operation, users, graph)
        if current is not None and current.kind == "batch_norm" and current.path and calls[current.path] == 1:
            norm, current = current.path, _follower(current, users, graph)
        while current is not None and _passes(current):
            current = _follower(current, users, graph)
        if current is not None and current.path in layers and calls[current.path] == 1:
            pairs.append(Pair(operation.path, current.path, norm))
    return pairs


def _follower(operation: Operation, users: Mapping[Operation, list[Operation]], graph: Graph) -> Operation | None:
    """Return what alone takes a value."""
    taken = [user for user in users[operation] if user.kind != "shape"]
    return taken[0] if len(taken) == 1 and operation not in graph.results else None


def _passes(operation: Operation) -> bool:
    return operation.label in _PASSES or operation.label.startswith(_POOLS)
