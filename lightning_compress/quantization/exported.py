"""Tracing with ``torch.export``: runs the network once on inputs without memory; layers become operations again."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from lightning_compress.core.isolation import map_tensors
from lightning_compress.core.paths import clean_path, named_layers
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

Calls = tuple[tuple[str, int], ...]


def trace_by_export(model: nn.Module, example_inputs: Any) -> Graph:
    """Return what ``model.forward`` computes, as ``torch.export`` sees it.

    Args:
        model: Any module without memory, in evaluation mode; see :func:`~.tracing.skeleton_of`.
        example_inputs: One batch.

    Raises:
        Exception: Whatever ``torch.export`` raises for control flow that depends on data.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()).to("meta").eval()
    >>> graph = trace_by_export(net, torch.zeros(1, 1, 4, 4))
    >>> [(operation.kind, operation.path) for operation in graph.operations]
    [('input', ''), ('convolution', '0'), ('relu', '1')]
    """
    inputs = map_tensors(lambda tensor: tensor.to("meta"), example_inputs)
    args = () if isinstance(inputs, Mapping) else tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, args, dict(inputs) if isinstance(inputs, Mapping) else None, strict=False)
    signature = program.graph_signature
    constants = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    return _Reader(model, constants).read(program.graph)


class _Reader:
    """Turns the nodes of an exported program into operations, those of one layer's call into one."""

    def __init__(self, model: nn.Module, constants: Mapping[str, str]) -> None:
        self.layers = {path for path, module in named_layers(model).items() if is_layer(module)}
        self.modules = named_layers(model)
        self.constants = constants
        self.graph = Graph()
        self.known: dict[fx.Node, Operation] = {}
        self.calls: dict[tuple[str, int], Operation] = {}
        self.callers: dict[fx.Node, Calls] = {}

    def read(self, traced: fx.Graph) -> Graph:
        """Return the graph."""
        for node in traced.nodes:
            if node.op == "output":
                self.graph.results = [self.known[source] for source in node.all_input_nodes]
                self.callers[node] = ()
            elif node.op == "placeholder":
                kind = "constant" if node.name in self.constants else "input"
                self._add(node, Operation(kind, "the input" if kind == "input" else self.constants[node.name]))
            else:
                self._read_call(node)
        self._find_blocks(traced)
        return self.graph

    def _add(self, node: fx.Node, operation: Operation) -> None:
        self.known[node] = operation
        self.callers.setdefault(node, operation.inside)
        if operation.kind != "constant":
            self.graph.operations.append(operation)

    def _read_call(self, node: fx.Node) -> None:
        calls = _calls(node)
        self.callers[node] = calls
        depth = next((i for i, (path, _) in enumerate(calls) if path in self.layers), None)
        inputs = tuple(self.known[source] for source in node.all_input_nodes)
        if depth is None:
            name = function_name(node.target)
            if _kind(name, node, inputs) != "shape":
                self.graph.reads += [clean_path(each.label) for each in inputs if each.kind == "constant"]
            values = tuple(each for each in inputs if each.kind != "constant" or len(inputs) > 1)
            self._add(node, Operation(_kind(name, node, inputs), name, "", values, calls))
            return
        call = calls[depth]
        mine = self.calls.get(call)
        outside = [each for each in inputs if each is not mine and each.kind != "constant"]
        if mine is None:
            layer = self.modules[call[0]]
            places = tuple(range(len(outside)))
            mine = Operation(kind_of_layer(layer), type(layer).__name__, call[0], tuple(outside), calls[:depth], places)
            self.calls[call] = mine
            self._add(node, mine)
        else:
            new = [each for each in outside if each not in mine.inputs]
            mine.positions += tuple(range(len(mine.inputs), len(mine.inputs) + len(new)))
            mine.inputs += tuple(new)
            self.known[node] = mine

    def _find_blocks(self, traced: fx.Graph) -> None:
        """Note for each call of a module the one value of it that is used outside, if it is one."""
        escaping: dict[tuple[str, int], list[Operation]] = {}
        for node in traced.nodes:
            for user in node.users:
                for call in self.callers[node]:
                    if call[0] not in self.layers and call not in self.callers[user]:
                        values = escaping.setdefault(call, [])
                        if self.known[node] not in values:
                            values.append(self.known[node])
        self.graph.blocks = {call: values[0] for call, values in escaping.items() if len(values) == 1}


def _calls(node: fx.Node) -> Calls:
    """Return the module calls around a node, outermost first: paths, and which call of the module it is."""
    stack: Mapping[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
    found: list[tuple[str, int]] = []
    for key, (path, _) in stack.items():
        _, at, number = key.rpartition("@")
        if clean_path(path):
            found.append((clean_path(path), int(number) if at and number.isdigit() else 0))
    return tuple(found)


def _kind(name: str, node: fx.Node, inputs: tuple[Operation, ...]) -> str:
    if name == "getitem" and inputs:
        return kind_of_item(inputs[0], node.args[1])
    if name in PADDINGS:
        return kind_of_padding(name, node.args, node.kwargs)
    kind = kind_of_function(name)
    if kind in ("add", "mul") and not all(isinstance(argument, fx.Node) for argument in node.args[:2]):
        return "other"
    return kind
