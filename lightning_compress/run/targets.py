"""Every ``_target_`` of a configuration is importable and knows its arguments, checked before anything is built."""

from __future__ import annotations

import inspect
import pkgutil
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lightning_compress.core.errors import ConfigurationError, did_you_mean

INSTANTIATE_KEYS = ("_target_", "_args_", "_partial_", "_recursive_", "_convert_")
FILLED_IN = ("optimizer", "scheduler", "logger")
"""Nodes whose first arguments the run fills in (parameters, optimizer, folder), so a missing one is no mistake."""

_PLAIN = (int, float, bool, str, type(None))


def check_targets(settings: Mapping[str, Any]) -> None:
    """Check all nodes with a ``_target_``, at any depth.

    Args:
        settings: Builtins, nested.

    Raises:
        ConfigurationError: If a target cannot be imported, an argument is unknown to it or missing, or a plain value
            has a type that the target's annotations rule out.

    >>> check_targets({"net": {"_target_": "torch.nn.Linear", "in_features": 2, "out_features": "two"}})
    Traceback (most recent call last):
        ...
    lightning_compress.core.errors.ConfigurationError: `net.out_features` must be int, got 'two'
    """
    for path, node in _nodes(settings, ""):
        check_node(path, node)


def _nodes(value: Any, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(value, Mapping):
        if "_target_" in value:
            yield path, value
        for key, child in value.items():
            yield from _nodes(child, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from _nodes(child, f"{path}.{index}")


def check_node(path: str, node: Mapping[str, Any]) -> None:
    """Check one node, not those below it.

    Args:
        path: Where it is, for the error.
        node: A mapping with ``_target_``.
    """
    target = find_target(path, node["_target_"])
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):  # Python cannot tell for some built in C
        return
    hints = _hints(target)
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for key, value in node.items():
        if key in INSTANTIATE_KEYS or (key == "interval" and path.endswith("scheduler")):
            continue
        if key not in parameters and not open_ended:
            near = did_you_mean(str(key), parameters)
            raise ConfigurationError(f"`{path}.{key}`: {node['_target_']} takes no argument {key!r}; {near}")
        if key in hints and not _may_be(value, hints[key]):
            raise ConfigurationError(f"`{path}.{key}` must be {_name(hints[key])}, got {value!r}")
    if node.get("_partial_") or node.get("_args_") or path.rsplit(".", 1)[-1] in FILLED_IN:
        return
    for name, parameter in parameters.items():
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if named and parameter.default is parameter.empty and name not in node:
            raise ConfigurationError(f"`{path}.{name}` is missing: {node['_target_']} needs it")


def find_target(path: str, name: object) -> Callable[..., Any]:
    """Return what a dotted name means.

    Raises:
        ConfigurationError: If there is no such thing, or it cannot be called.
    """
    where = f"`{path}._target_`"
    if not isinstance(name, str) or not name:
        raise ConfigurationError(f"{where} must be the dotted name of something callable, got {name!r}")
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(
            f"{where}: {name!r} cannot be imported ({error}); {_near(name)}modules are looked up in the installed "
            "packages and in the current folder"
        ) from error
    if not callable(found):
        raise ConfigurationError(f"{where}: {name!r} is a {type(found).__name__}, not callable")
    called: Callable[..., Any] = found
    return called


def _near(name: str) -> str:
    """Return the nearest public names in the module that a dotted name starts with."""
    module, _, last = name.rpartition(".")
    try:
        options = [other for other in dir(pkgutil.resolve_name(module)) if not other.startswith("_")]
    except (ImportError, AttributeError, ValueError):
        return ""
    return f"{did_you_mean(last, options)} "


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    try:
        if not isinstance(target, type):
            return typing.get_type_hints(target)
        constructors = (vars(base)["__init__"] for base in target.__mro__ if "__init__" in vars(base))
        return typing.get_type_hints(next(constructors))
    except Exception:  # annotations may name what exists for type checkers only
        return {}


def _may_be(value: Any, hint: Any) -> bool:
    """Return whether a value may have a type; everything but plain values and plain types is left to the target."""
    options = _options(hint)
    if not isinstance(value, _PLAIN) or not all(option in _PLAIN for option in options):
        return True
    if isinstance(value, int) and float in options:
        return True
    return isinstance(value, tuple(options))


def _options(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, else the type itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _name(hint: Any) -> str:
    return " or ".join("null" if option is type(None) else option.__name__ for option in _options(hint))
