"""Where activations are quantized, so that runtimes find whole blocks of integer arithmetic between two quantizers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.paths import clean_path, named_layers
from lightning_compress.quantization.graph import Graph, Operation, is_layer, kind_of_layer, unique
from lightning_compress.quantization.tracing import trace_network

WEIGHTED = ("convolution", "linear", "attention")
"""Kinds of layers whose arithmetic runtimes do in integers, given integer inputs."""

READ = "a function of the network reads it beside its layer: real numbers in training, what the integers say after"
"""What is said of a quantized weight that is used outside of its layer."""


@dataclass(frozen=True)
class Point:
    """One tensor to quantize, by the module that returns or takes it.

    Args:
        path: Of the module.
        side: ``"output"``: what the module returns; ``"input"``: its positional argument number ``index``.
        index: Number of the argument; 0 for outputs.
        computes: What comes out there, such as ``"Conv2d + BatchNorm2d + ReLU"``.
        unsigned: Whether it cannot be negative.
    """

    path: str
    side: str
    index: int = 0
    computes: str = ""
    unsigned: bool = False


@dataclass(frozen=True)
class Placement:
    """Where a network's activations are quantized, as plain data.

    Args:
        points: One for each tensor, in the order they are computed; no two mean the same tensor at the same place.
        folds: Path of each batch norm that a convolution or linear layer can take in -> path of that layer.
        left: What stays float, by path, and why.
        methods: How each part of the network was looked at: path -> ``"fx"``, ``"export"`` or ``"layers"``.
        reads: Paths of the layers whose weight the network also uses by itself, in a function: it is float there.
    """

    points: tuple[Point, ...] = ()
    folds: Mapping[str, str] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)
    methods: Mapping[str, str] = field(default_factory=dict)
    reads: tuple[str, ...] = ()


def place_quantizers(model: nn.Module, layers: Collection[str] | None = None, example_inputs: Any = None) -> Placement:
    """Return where activations must be quantized for integer arithmetic in the given layers.

    That is at the inputs of these layers, at the outputs of blocks (convolution, batch norm, ReLU: one quantizer after
    all of them, since runtimes fuse them), on both sides of additions, products, concatenations and average pools
    between such blocks. Values pass pools, reshapes and dropouts unchanged, so nothing is added there. Activations that
    runtimes do not fuse (SiLU, GELU, Hardswish) get a quantizer on each side. What only feeds operations that run in
    float (LayerNorm, softmax, the loss) is left alone.

    The network is traced with ``torch.fx``, or with ``torch.export`` where that fails and example inputs are given; of
    a network that allows neither, parts are tried; what is left gets quantizers at the inputs of its layers.

    Args:
        model: Any module; it is neither run (but on the ``meta`` device by ``torch.export``) nor changed.
        layers: Paths of the layers that get integer weights; by default all convolutions, Linear and attention.
        example_inputs: One batch, for ``torch.export``.

    Returns:
        Points in terms of module paths, batch norms that fold, and reasons for what stays float.

    Raises:
        ConfigurationError: If a path names no layer.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    >>> [(point.path, point.side, point.computes) for point in place_quantizers(net).points]
    [('0', 'input', 'the input'), ('2', 'output', 'Conv2d + BatchNorm2d + ReLU')]
    """
    known = named_layers(model)
    weighted = {path for path, layer in known.items() if kind_of_layer(layer) in WEIGHTED}
    inner = {path for path in weighted if path.rpartition(".")[0] in weighted}  # attention's own projection
    chosen = weighted - inner if layers is None else set(map(clean_path, layers))
    for path in chosen:
        if path not in known:
            raise ConfigurationError(f"`layers` names {path!r}, which {type(model).__name__} does not have")
    traced = trace_network(model, example_inputs)
    found = [_Placer(graph, chosen & weighted).place() for graph in traced.graphs]
    points = [point for placement in found for point in placement.points]
    left = dict(traced.failures)
    folds: dict[str, str] = {}
    for placement in found:
        left |= placement.left
        folds |= placement.folds
    seen = {operation.path for graph in traced.graphs for operation in graph.operations}
    for path in known:
        if path not in chosen & weighted or path in seen:
            continue
        if path in traced.untraced:
            points.append(Point(path, "input", 0, "the input of a layer that could not be traced"))
        else:
            left[path] = "the network does not call it in evaluation mode"
    places = {(point.path, point.side, point.index): point for point in reversed(points)}
    reads = _owners(model, {path for graph in traced.graphs for path in graph.reads})
    return Placement(tuple(reversed(places.values())), folds, left, traced.methods, reads)


def _owners(model: nn.Module, parameters: Collection[str]) -> tuple[str, ...]:
    """Return the paths of the layers that have one of these parameters for their weight, under whatever name."""
    every = model.named_parameters(remove_duplicate=False)
    held = {id(parameter) for name, parameter in every if clean_path(name) in parameters}
    layers = named_layers(model).items()
    return tuple(path for path, layer in layers if is_layer(layer) and id(getattr(layer, "weight", None)) in held)


class _Placer:
    """Finds the points of one traced graph."""

    def __init__(self, graph: Graph, layers: Collection[str]) -> None:
        self.graph = graph
        self.layers = layers
        self.users = graph.users()
        self.calls = graph.calls()
        self.entries = graph.entries()
        self.demanded: dict[Operation, None] = {}
        self.left: dict[str, str] = {}
        self.blocks: dict[Operation, list[str]] = {}
        for (path, _), operation in graph.blocks.items():
            self.blocks.setdefault(operation, []).append(path)

    def place(self) -> Placement:
        """Return the points, the batch norms that fold, and the reasons."""
        for operation in self.graph.operations:
            if self._selected(operation):
                for source in operation.inputs:
                    self._demand(source)
                if operation.kind == "convolution":  # runtimes need to know the range of what it computes
                    self._demand(self._end_of_block(operation))
        points: list[Point] = []
        for operation in self.graph.operations:
            if operation in self.demanded:
                places = self._places(operation)
                if not places and operation.kind == "relu":  # what is on a grid stays on it
                    places = self._places(self._source(operation.inputs[0]))
                points += places
                if not places:
                    self._leave(operation, "no module returns or takes it alone; wrap this step in a module")
                elif names := self._float_takers(operation):
                    self._leave(operation, f"stays float, as {names} takes it as it is; make its last step a module")
        self._explain()
        return Placement(tuple(points), self._folds(), self.left)

    def _selected(self, operation: Operation) -> bool:
        return operation.kind in WEIGHTED and operation.path in self.layers

    # ------------------------------------------------------------------ which tensors

    def _demand(self, operation: Operation) -> None:
        """Ask for a value in integers, and for what that needs in turn."""
        source = self._source(operation)
        if source in self.demanded or source.kind in ("constant", "shape"):
            return
        self.demanded[source] = None
        computed = source
        while computed.kind == "relu":  # its clipping is the quantizer's
            computed = self._source(computed.inputs[0])
        if computed.kind in ("add", "mul", "concat", "average"):
            for each in computed.inputs:
                self._demand(each)

    def _source(self, operation: Operation) -> Operation:
        """Return where a value was computed, before steps that only move it."""
        while operation.kind == "same" and operation.inputs:
            operation = operation.inputs[0]
        return operation

    def _end_of_block(self, operation: Operation) -> Operation:
        """Return the last of batch norm and ReLU that follow a layer and alone see its values."""
        for kind in ("batch_norm", "relu"):
            followers = self.users[operation]
            if len(followers) == 1 and followers[0].kind == kind and operation not in self.graph.results:
                operation = followers[0]
        return operation

    # ------------------------------------------------------------------ in terms of modules

    def _places(self, operation: Operation) -> list[Point]:
        """Return the module that returns a value, or else the ones that take it."""
        computes, unsigned = self._describe(operation), self._unsigned(operation)
        path = self._returned_by(operation)
        if path:
            return [Point(path, "output", 0, computes, unsigned)]
        return self._at_takers(operation, computes, unsigned)

    def _at_takers(self, value: Operation, computes: str, unsigned: bool) -> list[Point]:
        """Return the one module in which all uses of a value are, or else the layers that take it."""
        path = self._entered_by(value)
        if path:
            return [Point(path, "input", 0, computes, unsigned)]
        return [point for user in self.users[value] for point in self._before(user, value, computes, unsigned)]

    def _entered_by(self, value: Operation) -> str:
        """Return the path of the innermost module that takes a value which is used several times, all inside of it."""
        users = [user for user in self.users[value] if user.kind != "shape"]
        if len(users) < 2 or value in self.graph.results:
            return ""
        around = [{path for path, _ in user.inside} for user in users]
        paths = [path for path in self.entries.get(value, ()) if all(path in each for each in around)]
        return paths[-1] if paths else ""

    def _before(self, user: Operation, value: Operation, computes: str, unsigned: bool) -> list[Point]:
        if user.kind == "same":
            path = self._returned_by(user)
            if path and self._wanted_through(user):
                return [Point(path, "output", 0, computes, unsigned)]
            return self._at_takers(user, computes, unsigned) if self._wanted_through(user) else []
        if self._selected(user) or (user.path and user in self.demanded and self.calls[user.path] == 1):
            return [
                Point(user.path, "input", place, computes, unsigned)
                for place, source in zip(user.positions, user.inputs, strict=True)
                if source is value and place >= 0
            ]
        return []

    def _wanted_through(self, operation: Operation) -> bool:
        """Return whether a value that was only moved ends where integers are wanted."""
        return any(
            self._selected(user)
            or user in self.demanded
            or (user.kind in ("same", "relu") and self._wanted_through(user))
            for user in self.users[operation]
        )

    def _float_takers(self, operation: Operation) -> str:
        """Return the names of functions that take a value as it is, where layers take it quantized."""
        if operation.kind == "input" or operation.path or self._returned_by(operation) or self._entered_by(operation):
            return ""
        users = [user for user in self.users[operation] if user.kind != "shape"]
        missed = [user.label for user in users if not self._before(user, operation, "", False)]
        return ", ".join(dict.fromkeys(missed)) if len(missed) < len(users) else ""

    def _returned_by(self, operation: Operation) -> str:
        """Return the path of the module whose output is a value and nothing else, if there is one."""
        if operation.kind in ("attention", "recurrent"):  # they return several tensors
            return ""
        many_calls = operation.kind in WEIGHTED  # a layer that is used several times has one range for all uses
        if operation.path and (self.calls[operation.path] == 1 or many_calls):
            return operation.path
        blocks = [path for path in self.blocks.get(operation, ()) if path and self.calls[path] == 1]
        return max(blocks, key=len, default="")

    # ------------------------------------------------------------------ words

    def _describe(self, operation: Operation) -> str:
        parts = [operation.label]
        while operation.kind in ("relu", "batch_norm") and len(operation.inputs) == 1:
            operation = self._source(operation.inputs[0])
            parts.append(operation.label)
        return " + ".join(reversed(parts))

    def _unsigned(self, operation: Operation) -> bool:
        source = self._source(operation)
        if source.kind in ("average", "concat", "add", "mul"):
            inner = [each for each in source.inputs if each.kind != "constant"]
            signed = source.label.strip("_") in ("sub", "isub") or len(inner) < len(source.inputs)
            return bool(inner) and not signed and all(map(self._unsigned, inner))
        return source.kind == "relu" or source.label in ("Sigmoid", "Hardsigmoid", "Softmax", "sigmoid", "hardsigmoid")

    def _folds(self) -> dict[str, str]:
        folds: dict[str, str] = {}
        for norm in self.graph.operations:
            if norm.kind != "batch_norm" or not norm.path or not norm.inputs:
                continue
            layer = norm.inputs[0]
            alone = self.users[layer] == [norm] and layer not in self.graph.results
            once = self.calls[norm.path] == 1 and layer.path and self.calls[layer.path] == 1
            if layer.kind in ("convolution", "linear") and alone and once:
                folds[norm.path] = layer.path
        return folds

    def _leave(self, operation: Operation, reason: str) -> None:
        path = operation.path or (operation.inside[-1][0] if operation.inside else "")
        said = self.left.get(path, "")
        text = f"{self._describe(operation)}: {reason}"
        self.left[path] = f"{said}; {text}" if said and text not in said else text

    def _explain(self) -> None:
        """Say why arithmetic between blocks stays float."""
        for operation in self.graph.operations:
            ends = [self._end_of_sum(operation)]
            if operation.kind in ("add", "concat", "average") and not any(end in self.demanded for end in ends):
                feeds = unique([user for end in ends for user in self._takers(end)])
                names = ", ".join(dict.fromkeys(user.label for user in feeds)) or "the network's output"
                self._leave(operation, f"stays float, as it feeds {names}")

    def _end_of_sum(self, operation: Operation) -> Operation:
        followers = self.users[operation]
        return followers[0] if len(followers) == 1 and followers[0].kind == "relu" else operation

    def _takers(self, operation: Operation) -> list[Operation]:
        found: list[Operation] = []
        for user in self.users[operation]:
            found += self._takers(user) if user.kind == "same" else [user] if user.kind != "shape" else []
        return found
