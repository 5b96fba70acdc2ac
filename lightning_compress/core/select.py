"""Where: which layers of a model a method touches."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_compress.core.errors import ConfigurationError, SelectionError, did_you_mean
from lightning_compress.core.paths import named_layers, names_of


@dataclass(frozen=True)
class Selection:
    """What a :class:`Select` found.

    Args:
        layers: The chosen modules by path, in registration order.
        left: Why a layer of the right type was left alone, by path.
    """

    layers: Mapping[str, nn.Module]
    left: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Select:
    """Which layers: all of the right type, narrowed by name patterns and size.

    A pattern is a glob (``"layer1.*.conv*"``; ``*`` also crosses dots) or, after ``re:``, a regular expression for
    the whole path. It matches a layer by its own path or by that of a module that contains it, so ``"backbone"``
    stands for everything inside. A module that is registered under several names has all of them. Patterns that
    match nothing are an error, because they are typos.

    Args:
        types: Class names (base classes count: ``"RNNBase"``) or classes; empty leaves the choice to the method.
        include: Patterns of which at least one must match; a single one needs no list.
        exclude: Patterns of which none may match; they win over ``include``.
        min_params: Least number of parameters a layer must hold itself.
        not_first: Leave the first layer of these types alone, in registration order.
        not_last: Leave the last one alone. A layer that ``include`` names by its exact path is taken all the same.

    Raises:
        ConfigurationError: For arguments of the wrong type.

    >>> from torch import nn
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3), nn.Linear(3, 1))
    >>> list(Select(types=["Linear"], not_last=True).resolve(net).layers)
    ['0', '2']
    """

    types: str | type | Sequence[str | type] = ()
    include: str | Sequence[str] = ("*",)
    exclude: str | Sequence[str] = ()
    min_params: int = 0
    not_first: bool = False
    not_last: bool = False

    def __post_init__(self) -> None:
        for name in ("types", "include", "exclude"):
            object.__setattr__(self, name, _as_tuple(name, getattr(self, name)))
        if not self.include:
            raise ConfigurationError("`include` is empty: give patterns such as ('*',) or ('layer1.*',)")
        if not isinstance(self.min_params, int) or isinstance(self.min_params, bool) or self.min_params < 0:
            raise ConfigurationError(f"`min_params` must be an int >= 0, got {self.min_params!r}")
        for pattern in (*self.include, *self.exclude):
            _compile(pattern)

    def resolve(self, root: nn.Module, types: Iterable[type] = ()) -> Selection:
        """Return the layers of ``root`` that this selection means.

        Args:
            root: The model; the paths are relative to it.
            types: The types a method can work on; a layer must be of one of them, and of ``self.types`` if given.

        Raises:
            SelectionError: If nothing is selected, or a pattern matches no layer; names the nearest paths.
        """
        everything, names = named_layers(root), names_of(root)
        supported = tuple(types)
        candidates = {
            path: module
            for path, module in everything.items()
            if (not supported or isinstance(module, supported)) and self._of_type(module)
        }
        for name in ("include", "exclude"):
            for pattern in getattr(self, name):
                if pattern != "*" and not any(_matches(pattern, names[path]) for path in everything):
                    raise SelectionError(
                        f"`{name}` has the pattern {pattern!r}, which matches no module of {type(root).__name__}; "
                        f"{did_you_mean(pattern, everything)}"
                    )
        ends = ({next(iter(candidates)): _END.format("first")} if self.not_first and candidates else {}) | (
            {next(reversed(candidates)): _END.format("last")} if self.not_last and candidates else {}
        )
        left = {
            path: reason for path in candidates if (reason := self._reason(path, names[path], candidates[path], ends))
        }
        chosen = {path: module for path, module in candidates.items() if path not in left}
        if not chosen:
            raise SelectionError(self._nothing(root, everything, candidates, left, supported))
        return Selection(chosen, {path: reason for path, reason in left.items() if reason != "not included"})

    def _of_type(self, module: nn.Module) -> bool:
        names = {cls.__name__ for cls in type(module).__mro__}
        types = _as_tuple("types", self.types)
        return not types or any(kind in names if isinstance(kind, str) else isinstance(module, kind) for kind in types)

    def _reason(self, path: str, names: tuple[str, ...], module: nn.Module, ends: Mapping[str, str]) -> str:
        if not any(_matches(pattern, names) for pattern in self.include):
            return "not included"
        excluded = next((pattern for pattern in self.exclude if _matches(pattern, names)), None)
        if excluded is not None:
            return f"excluded by {excluded!r}"
        if path in ends and not set(names) & set(self.include):
            return ends[path]
        if self.min_params == 0:
            return ""
        if any(is_lazy(parameter) for parameter in module.parameters()):
            raise ConfigurationError(
                f"`min_params` cannot judge {path!r}, which has no shape yet (a lazy layer); run one batch first"
            )
        size = sum(parameter.numel() for parameter in module.parameters())
        return f"{size} parameters, fewer than min_params={self.min_params}" if size < self.min_params else ""

    def _nothing(
        self,
        root: nn.Module,
        everything: Mapping[str, nn.Module],
        candidates: Mapping[str, nn.Module],
        left: Mapping[str, str],
        supported: tuple[type, ...],
    ) -> str:
        if left:
            why = "; ".join(f"{path}: {reason}" for path, reason in list(left.items())[:6])
            return (
                f"{self} selects no layer of {type(root).__name__}: {why}. Loosen the pattern or the limit named there"
            )
        wanted = [kind if isinstance(kind, str) else kind.__name__ for kind in _as_tuple("types", self.types)]
        present = sorted({type(module).__name__ for module in everything.values()})
        asked = f"of type {' or '.join(wanted)}" if wanted else "that this method can work on"
        known = [kind.__name__ for kind in supported]
        if supported and isinstance(root, supported):
            return f"{type(root).__name__} is a single layer without a path of its own; wrap it: nn.Sequential(layer)"
        return (
            f"{type(root).__name__} has no layer {asked}"
            + (f" (supported: {', '.join(known)})" if known else "")
            + f"; it has {', '.join(present) or 'no submodules'}. Layers that are built in `setup` do not exist yet "
            "when callbacks look: build them in `__init__` or `configure_model`"
        )


_END = "the {} layer in the order they were registered; to keep another one, name it in `exclude`"


def _as_tuple(name: str, value: object) -> tuple[Any, ...]:
    if isinstance(value, (str, type)):
        return (value,)
    if not isinstance(value, Iterable) or isinstance(value, Mapping):
        raise ConfigurationError(f"`{name}` must be a list of strings, got {value!r}")
    items = tuple(value)
    allowed = (str, type) if name == "types" else (str,)
    for item in items:
        if not isinstance(item, allowed):
            raise ConfigurationError(f"`{name}` must hold strings, got {item!r}")
    return items


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern[3:] if pattern.startswith("re:") else fnmatch.translate(pattern))
    except re.error as error:
        raise ConfigurationError(f"the pattern {pattern!r} is not a regular expression: {error}") from error


def _matches(pattern: str, names: Iterable[str]) -> bool:
    """Return whether a layer is meant, by one of its names or by that of a module around it."""
    compiled = _compile(pattern)
    return any(
        compiled.fullmatch(".".join(parts[:depth]))
        for parts in (name.split(".") for name in names)
        for depth in range(len(parts), 0, -1)
    )
