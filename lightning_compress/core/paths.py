"""Dotted module paths that stay the same whether or not a part of the model went through ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lightning_compress.core.errors import ConfigurationError, did_you_mean

_COMPILED = "_orig_mod"


def clean_path(path: str) -> str:
    """Return ``path`` without the ``_orig_mod`` that ``torch.compile`` inserts.

    >>> clean_path("net._orig_mod.0")
    'net.0'
    """
    return ".".join(part for part in path.split(".") if part and part != _COMPILED)


def original(root: nn.Module) -> nn.Module:
    """Return ``root``, or the module behind it if it came out of ``torch.compile``.

    >>> import torch
    >>> net = nn.Linear(2, 2)
    >>> original(torch.compile(net)) is net
    True
    """
    inner = dict(root.named_children()).get(_COMPILED)
    return root if inner is None else original(inner)


def names_of(root: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return every clean path under which each of :func:`named_layers` is registered; shared modules have several."""
    first: dict[int, str] = {}
    names: dict[str, list[str]] = {}
    for real, module in root.named_modules(remove_duplicate=False):
        path = clean_path(real)
        known = names.setdefault(first.setdefault(id(module), path), [])
        if path not in known:
            known.append(path)
    return {path: tuple(found) for path, found in names.items()}


def named_layers(root: nn.Module) -> dict[str, nn.Module]:
    """Return every submodule of ``root`` by clean path, in registration order, each module once, ``root`` left out."""
    found: dict[str, nn.Module] = {}
    for path, module in root.named_modules():
        if clean_path(path):
            found[clean_path(path)] = module
    return found


def _children(root: nn.Module) -> dict[str, list[tuple[str, nn.Module]]]:
    """Return real paths and modules by clean path, shared modules under each of their names."""
    table: dict[str, list[tuple[str, nn.Module]]] = {}
    for real, module in root.named_modules(remove_duplicate=False):
        table.setdefault(clean_path(real), []).append((real, module))
    return table


def get_layer(root: nn.Module, path: str) -> nn.Module:
    """Return the module at a clean path (the original one, where a compiled wrapper stands in front of it).

    Raises:
        ConfigurationError: If there is none; names the nearest paths.
    """
    table = _children(root)
    if path not in table:
        raise ConfigurationError(f"no module at {path!r} in {type(root).__name__}; {did_you_mean(path, table)}")
    return table[path][-1][1]


def set_layer(root: nn.Module, path: str, new: nn.Module) -> Callable[[], None]:
    """Put ``new`` in place of the module at a clean path, under every name that module is registered.

    A wrapper of ``torch.compile`` around exactly that module goes too, because it would go on calling the old one.

    Returns:
        A function that puts back what was there.

    Raises:
        ConfigurationError: If there is no such module, or ``path`` names the root itself.
    """
    old = get_layer(root, path)
    if old is original(root):
        raise ConfigurationError("`path` is empty: the root module cannot be replaced, only its submodules")
    aliases = [real for real, module in root.named_modules(remove_duplicate=False) if module is old]
    before = {place: root.get_submodule(place) for place in map(_outside_wrappers, aliases)}
    for place in before:
        root.set_submodule(place, new)

    def put_back() -> None:
        for place, module in before.items():
            root.set_submodule(place, module)

    return put_back


def _outside_wrappers(path: str) -> str:
    while path.endswith(f".{_COMPILED}"):
        path = path.removesuffix(f".{_COMPILED}")
    return path
