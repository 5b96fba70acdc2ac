"""Every ``_target_`` of a configuration is importable and knows its arguments, checked before anything is built."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from hydra.errors import HydraException
from hydra.utils import get_object

from lightning_compress.core.errors import ConfigurationError, did_you_mean

INSTANTIATE_KEYS = ("_target_", "_args_", "_partial_", "_recursive_", "_convert_")
FILLED_IN = {"optimizer", "scheduler", "logger"}
"""Nodes whose first arguments the run fills in (parameters, optimizer, folder), so a missing one is no mistake."""


def check_targets(settings: Mapping[str, Any]) -> None:
    """Check all nodes with a ``_target_``, at any depth.

    Args:
        settings: Builtins, nested.

    Raises:
        ConfigurationError: If a target cannot be imported, or an argument is unknown to it or missing.

    >>> check_targets({"net": {"_target_": "torch.nn.Linear", "in_features": 2, "out_feature": 3}})
    Traceback (most recent call last):
        ...
    lightning_compress.core.errors.ConfigurationError: `net.out_feature`: torch.nn.Linear takes no argument \
'out_feature'; did you mean 'out_features' or 'in_features'?
    """
    for path, node in _nodes(settings, ""):
        _check_node(path, node)


def _nodes(value: Any, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(value, Mapping):
        if "_target_" in value:
            yield path, value
        for key, child in value.items():
            yield from _nodes(child, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from _nodes(child, f"{path}.{index}")


def _check_node(path: str, node: Mapping[str, Any]) -> None:
    target = node["_target_"]
    if not isinstance(target, str) or not target:
        raise ConfigurationError(f"`{path}._target_` must be the dotted name of something callable, got {target!r}")
    parameters = _parameters(path, target)
    if parameters is None:
        return
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        for key in node:
            if key not in parameters and key not in (*INSTANTIATE_KEYS, "interval"):
                raise ConfigurationError(
                    f"`{path}.{key}`: {target} takes no argument {key!r}; {did_you_mean(str(key), parameters)}"
                )
    if node.get("_partial_") or node.get("_args_") or path.rsplit(".", 1)[-1] in FILLED_IN:
        return
    for name, parameter in parameters.items():
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if named and parameter.default is parameter.empty and name not in node:
            raise ConfigurationError(f"`{path}.{name}` is missing: {target} needs it")


def _parameters(path: str, target: str) -> Mapping[str, inspect.Parameter] | None:
    """Return the parameters of a target, or ``None`` where Python cannot tell them."""
    try:
        found = get_object(target)
    except (HydraException, ImportError, AttributeError, ValueError, TypeError) as error:
        cause = error.__cause__ or error
        reason = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        raise ConfigurationError(
            f"`{path}._target_`: {target!r} cannot be imported ({reason}); modules are looked up in the installed "
            "packages and in the current folder"
        ) from error
    if not callable(found):
        raise ConfigurationError(f"`{path}._target_`: {target!r} is a {type(found).__name__}, not callable")
    try:
        return inspect.signature(found).parameters
    except (TypeError, ValueError):
        return None
