"""Which Linear layers feed each other directly, found by tracing, and why others do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.paths import clean_path, get_layer, original

ELEMENTWISE: tuple[type[nn.Module], ...] = (
    nn.Identity,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.Hardtanh,
    nn.Tanh,
    nn.Sigmoid,
    nn.Dropout,
)
"""Modules that treat every neuron alike and bring no two values further apart, so that near-equal neurons stay so."""

_FUNCTIONS = (F.relu, F.relu6, F.leaky_relu, F.hardtanh, F.tanh, F.sigmoid, F.dropout, torch.relu, torch.tanh)
_CALLS = frozenset((*_FUNCTIONS, torch.sigmoid, torch.relu_, F.relu_))
_METHODS = frozenset({"relu", "relu_", "tanh", "tanh_", "sigmoid", "sigmoid_", "contiguous"})


@dataclass(frozen=True)
class Pair:
    """Two Linear layers of which the second alone reads what the first computes.

    Args:
        first: Path of the layer whose outputs are the neurons.
        second: Path of the layer that reads them.
    """

    first: str
    second: str


def find_pairs(model: nn.Module, layers: Mapping[str, nn.Module]) -> tuple[list[Pair], dict[str, str]]:
    """Trace ``model`` and return, for each Linear layer, the one that reads it, or why there is none.

    Args:
        model: What ``forward`` can be traced of (``torch.fx``); the trace is only read.
        layers: The Linear layers in question, by path.

    Returns:
        Pairs in the order of the computation, and a reason by path.

    Raises:
        ConfigurationError: If the model cannot be traced.

    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> find_pairs(net, {"0": net[0], "2": net[2]})
    ([Pair(first='0', second='2')], {'2': 'its outputs are those of the model'})
    """
    model = original(model)
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:  # a tracer runs the user's forward, which may fail in any way
        raise ConfigurationError(
            f"{type(model).__name__} cannot be traced to see which layers feed each other ({type(error).__name__}: "
            f"{str(error)[:200]}); name them: pairs=[['fc1', 'fc2'], ...]"
        ) from error
    modules = dict(model.named_modules(remove_duplicate=False))
    calls = Counter(id(modules[str(node.target)]) for node in graph.nodes if node.op == "call_module")
    direct = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    owners = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    pairs, reasons = [], dict.fromkeys(layers, "the traced model does not call it by itself")
    for node in graph.nodes:
        path = clean_path(str(node.target)) if node.op == "call_module" else ""
        if path not in layers:
            continue
        found = _reader(node, modules)
        problem = found if isinstance(found, str) else _shared(node, found, modules, calls, owners, direct)
        if problem:
            reasons[path] = problem
        elif isinstance(found, fx.Node):
            pairs.append(Pair(path, clean_path(str(found.target))))
            reasons.pop(path, None)
    return pairs, reasons


def _reader(node: fx.Node, modules: Mapping[str, nn.Module]) -> fx.Node | str:
    """Return the Linear node that alone reads ``node``, through elementwise functions, or why there is none."""
    while True:
        users = list(node.users)
        if len(users) != 1:
            return f"its outputs are read in {len(users)} places" if users else "nothing reads its outputs"
        (user,) = users
        if user.op == "output":
            return "its outputs are those of the model"
        if not user.args or user.args[0] is not node or any(node is item for item in user.args[1:]):
            return f"its outputs go into {_name(user, modules)} beside others"
        if user.op == "call_module" and type(modules[str(user.target)]) is nn.Linear:
            return user
        if not _is_elementwise(user, modules):
            return f"{_name(user, modules)} reads its outputs, which is neither Linear nor ReLU-like"
        node = user


def _is_elementwise(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], ELEMENTWISE)
    return node.target in (_CALLS if node.op == "call_function" else _METHODS)


def _name(node: fx.Node, modules: Mapping[str, nn.Module]) -> str:
    if node.op == "call_module":
        return f"{type(modules[str(node.target)]).__name__} {clean_path(str(node.target))!r}"
    return str(getattr(node.target, "__name__", node.target))


def _shared(
    node: fx.Node,
    reader: fx.Node,
    modules: Mapping[str, nn.Module],
    calls: Mapping[int, int],
    owners: Mapping[int, int],
    direct: set[str],
) -> str:
    for each in (node, reader):
        path, layer = clean_path(str(each.target)), modules[str(each.target)]
        if calls[id(layer)] > 1:
            return f"{path!r} is called {calls[id(layer)]} times"
        for name, parameter in layer.named_parameters(recurse=False):
            if owners[id(parameter)] > 1 or f"{each.target}.{name}" in direct:
                return f"{path}.{name} is used elsewhere too"
        if type(layer) is not nn.Linear or len(list(layer.parameters(recurse=False))) != _expected(layer):
            return f"{path!r} is not a plain Linear layer (parametrized or normalised)"
    return ""


def _expected(layer: nn.Linear) -> int:
    return 1 if layer.bias is None else 2


def given_pairs(model: nn.Module, pairs: Sequence[Sequence[str]]) -> list[Pair]:
    """Check pairs that the user named; what lies between them is the user's to know.

    Raises:
        ConfigurationError: If an item is not a pair of paths of Linear layers whose sizes fit, or a layer is the first
            or the second of two pairs.

    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> given_pairs(net, [["0", "2"]])
    [Pair(first='0', second='2')]
    """
    found: list[Pair] = []
    for item in pairs:
        if isinstance(item, str) or len(item) != 2:
            raise ConfigurationError(f"`pairs` must hold two paths each, such as ['fc1', 'fc2'], got {item!r}")
        first, second = (get_layer(model, path) for path in item)
        for path, layer in zip(item, (first, second), strict=True):
            if type(layer) is not nn.Linear:
                raise ConfigurationError(f"`pairs`: {path!r} is {type(layer).__name__}, expected Linear")
        if first.out_features != second.in_features:
            raise ConfigurationError(
                f"`pairs`: {item[0]!r} has {first.out_features} outputs but {item[1]!r} {second.in_features} inputs"
            )
        found.append(Pair(*item))
    for side in ("first", "second"):
        twice = [path for path, times in Counter(getattr(pair, side) for pair in found).items() if times > 1]
        if twice:
            raise ConfigurationError(f"`pairs`: {twice[0]!r} is the {side} layer of two pairs")
    return found
