"""Tracing with ``torch.fx``: symbolically, without running anything; layers are single operations."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from lightning_compress.core.copies import structure_copy
from lightning_compress.core.paths import clean_path, original
from lightning_compress.quantization.exported import trace_by_export
from lightning_compress.quantization.graph import (
    PADDINGS,
    Graph,
    Operation,
    function_name,
    is_layer,
    kind_of_function,
    kind_of_item,
    kind_of_layer,
    kind_of_padding,
)


def skeleton_of(model: nn.Module) -> nn.Module:
    """Return a copy of the structure in evaluation mode, without memory and without compiled calls."""
    return structure_copy(model, lambda tensor: torch.empty_like(tensor, device="meta"), share=True).eval()


def trace_symbolically(model: nn.Module, prefix: str = "") -> Graph:
    """Return what ``model.forward`` computes in evaluation mode, as ``torch.fx`` sees it.

    Args:
        model: Any module; what is traced is best a :func:`skeleton_of`, since module calls are followed through
            what stands in the instance (compiled calls).
        prefix: Path of the module in the whole network, in front of all paths.

    Raises:
        Exception: Whatever ``torch.fx`` raises for control flow that depends on data.

    >>> graph = trace_symbolically(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()))
    >>> [(operation.kind, operation.path) for operation in graph.operations]
    [('input', ''), ('convolution', '0'), ('relu', '1')]
    """
    tracer = _Tracer(prefix)
    return _Reader(tracer, model).read(tracer.trace(model, _defaults(model)))


def _defaults(model: nn.Module) -> dict[str, Any] | None:
    """Return the arguments of ``forward`` that have a plain default, which a trace takes as given."""
    parameters = inspect.signature(model.forward).parameters.values()
    plain = {p.name: p.default for p in parameters if p.default is None or type(p.default) in (bool, int, float, str)}
    return plain or None


@dataclass
class Traced:
    """What could be traced of a network.

    Args:
        graphs: Of the whole network, or of parts of it.
        methods: Path of each part -> ``"fx"``, ``"export"`` or ``"layers"`` (each layer by itself).
        failures: Path of each part that could not be traced -> why.
        untraced: Paths of the layers in no graph because of that.
    """

    graphs: list[Graph] = field(default_factory=list)
    methods: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    untraced: set[str] = field(default_factory=set)


def trace_network(model: nn.Module, example_inputs: Any = None) -> Traced:
    """Trace a network as a whole if possible, else its parts.

    Args:
        model: Any module; a structure without memory is traced in its place.
        example_inputs: One batch, for ``torch.export`` where ``torch.fx`` fails.

    >>> sorted(trace_network(nn.Sequential(nn.Linear(2, 2))).methods.items())
    [('', 'fx')]
    """
    traced = Traced()
    _trace_part(skeleton_of(model), "", example_inputs, traced)
    return traced


def _trace_part(part: nn.Module, path: str, example_inputs: Any, traced: Traced) -> None:
    reasons: list[str] = []
    try:
        traced.graphs.append(trace_symbolically(part, path))
        traced.methods[path] = "fx"
        return
    except Exception as error:  # user code runs here
        reasons.append(f"torch.fx: {_first_line(error)}")
    if example_inputs is not None and path == "":
        try:
            traced.graphs.append(trace_by_export(part, example_inputs))
            traced.methods[path] = "export"
            return
        except Exception as error:
            reasons.append(f"torch.export: {_first_line(error)}")
    if not isinstance(part, nn.ModuleList | nn.ModuleDict):
        traced.failures[path] = f"{type(part).__name__} cannot be traced ({'; '.join(reasons)})"
        traced.methods[path] = "layers"
    for name, child in part.named_children():
        inner = clean_path(f"{path}.{name}")
        if is_layer(original(child)):
            traced.untraced.add(inner)
        else:
            _trace_part(original(child), inner, None, traced)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


class _Tracer(fx.Tracer):
    """Remembers in which call of which module each node was made, and what each of these calls returned."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix
        self.stack: list[tuple[str, int]] = []
        self.counts: dict[str, int] = {}
        self.inside: dict[fx.Node, tuple[tuple[str, int], ...]] = {}
        self.returned: dict[tuple[str, int], fx.Node] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether a module is one operation."""
        return original(m) is m and is_layer(m)

    def path(self, name: str) -> str:
        """Return the path of a module in the whole network."""
        return ".".join(part for part in (self.prefix, clean_path(name)) if part)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Follow a call of a module."""
        if original(m) is not m:  # torch.compile wraps it: follow what it wraps
            return original(m)(*args, **kwargs)
        name = self.path_of_module(m)
        if self.is_leaf_module(m, name):
            return super().call_module(m, forward, args, kwargs)
        path = self.path(name)
        self.counts[path] = self.counts.get(path, 0) + 1
        call = (path, self.counts[path])
        with self._within(call):
            result = super().call_module(m, forward, args, kwargs)
        if isinstance(result, fx.Proxy) and call in self.inside[result.node]:  # an empty shortcut computes nothing
            self.returned[call] = result.node
        return result

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Make a node and note where."""
        node = super().create_node(*args, **kwargs)
        self.inside[node] = tuple(self.stack)
        return node

    @contextmanager
    def _within(self, call: tuple[str, int]) -> Iterator[None]:
        self.stack.append(call)
        try:
            yield
        finally:
            self.stack.pop()


class _Reader:
    """Turns the nodes of a finished trace into operations."""

    def __init__(self, tracer: _Tracer, model: nn.Module) -> None:
        self.tracer = tracer
        self.model = model
        self.graph = Graph()
        self.known: dict[fx.Node, Operation] = {}

    def read(self, traced: fx.Graph) -> Graph:
        for node in traced.nodes:
            if node.op == "output":
                self.graph.results = [self.known[source] for source in node.all_input_nodes]
            else:
                self.known[node] = self._operation(node)
                self.graph.operations.append(self.known[node])
        self.graph.blocks = {call: self.known[node] for call, node in self.tracer.returned.items()}
        return self.graph

    def _operation(self, node: fx.Node) -> Operation:
        inside = self.tracer.inside.get(node, ())
        inputs = tuple(self.known[source] for source in node.all_input_nodes)
        if node.op == "placeholder":
            return Operation("input", "the input", inside=inside)
        if node.op == "get_attr":
            if any(_takes_values(user) for user in node.users):
                self.graph.reads.append(self.tracer.path(str(node.target)))
            return Operation("constant", str(node.target), inside=inside)
        if node.op == "call_module":
            layer = self.model.get_submodule(str(node.target))
            places = [node.args.index(source) if source in node.args else -1 for source in node.all_input_nodes]
            path = self.tracer.path(str(node.target))
            return Operation(kind_of_layer(layer), type(layer).__name__, path, inputs, inside, tuple(places))
        name = function_name(node.target)
        return Operation(_kind_of_call(name, node, inputs), name, "", inputs, inside)


def _takes_values(user: fx.Node) -> bool:
    """Return whether a node uses the values of what it is given, not only its shape, type or device."""
    name = function_name(user.target)
    if name == "getattr":
        return user.args[1] in ("T", "mT", "H", "mH", "data")
    return user.op != "output" and kind_of_function(name) != "shape"


def _kind_of_call(name: str, node: fx.Node, inputs: tuple[Operation, ...]) -> str:
    """Return the kind of a function's call; arithmetic with a number or a parameter is no meeting of two values."""
    if name == "getitem" and inputs:
        return kind_of_item(inputs[0], node.args[1])
    if name in PADDINGS:
        return kind_of_padding(name, node.args, node.kwargs)
    if name == "getattr" and len(node.args) > 1 and node.args[1] != "shape":
        return "other"
    kind = kind_of_function(name)
    if kind in ("add", "mul") and not all(isinstance(argument, fx.Node) for argument in node.args[:2]):
        return "shape" if inputs and all(source.kind == "shape" for source in inputs) else "other"
    if inputs and kind != "concat" and all(source.kind == "shape" for source in inputs):
        return "shape"
    return kind
