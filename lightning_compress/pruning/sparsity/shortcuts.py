"""Which layers a shortcut leads around, so that the network still works without them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import fx, nn

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.paths import clean_path, original


def without_shortcut(model: nn.Module, layers: Iterable[str]) -> dict[str, str]:
    """Return the layers that are the only way from the input to the output, with the reason.

    The forward is traced (``torch.fx``) and only read. A layer has a shortcut if what it is computed from still reaches
    the output when every call of the layer is left out.

    Args:
        model: The model.
        layers: Paths of the layers in question.

    Raises:
        ConfigurationError: If the model cannot be traced.

    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.stem, self.inner = nn.Linear(2, 2), nn.Linear(2, 2)
    ...
    ...     def forward(self, x):
    ...         x = self.stem(x)
    ...         return x + self.inner(x)
    >>> without_shortcut(Block(), ["stem", "inner"])
    {'stem': 'no shortcut leads around it'}
    """
    model = original(model)
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:  # a tracer runs the user's forward, which may fail in any way
        raise ConfigurationError(
            f"`granularity` 'layer': {type(model).__name__} cannot be traced to see which layers a shortcut leads "
            f"around ({type(error).__name__}: {str(error)[:200]}); use 'filter' or 'shape' instead"
        ) from error
    calls: dict[str, set[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(clean_path(str(node.target)), set()).add(node)
    reasons = {}
    for path in layers:
        if path not in calls:
            reasons[path] = "the traced model does not call it by itself"
        elif not _reaches_output(graph, calls[path]):
            reasons[path] = "no shortcut leads around it"
    return reasons


def _reaches_output(graph: fx.Graph, left_out: set[fx.Node]) -> bool:
    """Return whether an input that the left-out nodes need reaches the output without them."""
    needed = _closure(left_out, lambda node: node.all_input_nodes)
    inputs = [node for node in needed if node.op == "placeholder"]
    reached = _closure(inputs, lambda node: [user for user in node.users if user not in left_out])
    return any(node.op == "output" for node in reached)


def _closure(start: Iterable[fx.Node], following: Callable[[fx.Node], Iterable[fx.Node]]) -> dict[fx.Node, None]:
    found = dict.fromkeys(start)
    waiting = list(found)
    while waiting:
        for node in following(waiting.pop()):
            if node not in found:
                found[node] = None
                waiting.append(node)
    return found
