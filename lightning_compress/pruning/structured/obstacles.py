"""What speaks against cutting a group, as far as it can be seen without running the model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lightning_compress.core.paths import clean_path, get_layer
from lightning_compress.pruning.structured.groups import ChannelGroup
from lightning_compress.pruning.structured.roles import PASSING


class Obstacles:
    """Knows a model's frozen and tied parameters, and which slices are taken by earlier groups.

    A model that is frozen as a whole is one that will only be run: it may be cut.

    Args:
        model: The model, which is only looked at.
        ignored: Paths of layers whose outputs must stay, with the reason.
        seams: Whether the trace ended where channels are shuffled or reshaped.
    """

    def __init__(self, model: nn.Module, ignored: Mapping[str, str], seams: bool = False) -> None:
        self._end = "its outputs are the model's outputs" + (", or shuffled or reshaped across channels" * seams)
        self._model = model
        self._ignored = ignored
        self._trains = any(parameter.requires_grad for parameter in model.parameters())
        self._taken: dict[tuple[str, str, int], set[int]] = {}
        self._places: dict[int, dict[str, int]] = {}
        for path, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                self._places.setdefault(id(parameter), {})[clean_path(f"{path}.{name}")] = id(module)

    def of(self, group: ChannelGroup) -> str:
        """Return why a group cannot be cut, or an empty text."""
        for path in group.producers:
            if path in self._ignored:
                return f"it is coupled to {path!r}: {self._ignored[path]}"
        weights = [touch for touch in group.touches if not touch.beside]
        takers = [touch for touch in weights if not touch.produces and not self._passes_on(touch.path)]
        if not takers:
            return self._end
        for touch in weights:
            layer = get_layer(self._model, touch.path)
            for name, dim in touch.tensors:
                tensor = getattr(layer, name)
                if isinstance(tensor, nn.Parameter) and self._trains and not tensor.requires_grad:
                    return f"it is coupled to {touch.path!r}: {name!r} is frozen"
                others = [key for key, owner in self._places.get(id(tensor), {}).items() if owner != id(layer)]
                if others:
                    return f"it is coupled to {touch.path!r}: {name!r} is tied to {others[0]!r}"
                if self._taken.get((touch.path, name, dim), set()) & set(touch.positions):
                    return f"its channels overlap with those of another group in {touch.path!r}"
        return ""

    def take(self, group: ChannelGroup) -> None:
        """Note that the slices of a group are spoken for."""
        for touch in group.touches:
            for name, dim in touch.tensors:
                self._taken.setdefault((touch.path, name, dim), set()).update(touch.positions)

    def explain(self, path: str, problem: str) -> str:
        """Return a group's problem as seen from one of its layers."""
        return problem.replace(f"it is coupled to {path!r}: ", "")

    def _passes_on(self, path: str) -> bool:
        return isinstance(get_layer(self._model, path), PASSING)
