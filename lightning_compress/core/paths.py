"""Dotted module paths that stay the same whether or not a part of the model went through ``torch.compile``."""

from __future__ import annotations

from torch import nn

from lightning_compress.core.errors import ConfigurationError, did_you_mean

_COMPILED = "_orig_mod"


def clean_path(path: str) -> str:
    """Return ``path`` without the ``_orig_mod`` that ``torch.compile`` inserts.

    >>> clean_path("net._orig_mod.0")
    'net.0'
    """
    return ".".join(part for part in path.split(".") if part and part != _COMPILED)


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


def set_layer(root: nn.Module, path: str, new: nn.Module) -> None:
    """Put ``new`` in place of the module at a clean path, under every name that module is registered.

    Raises:
        ConfigurationError: If there is no such module, or ``path`` names the root itself.
    """
    old = get_layer(root, path)
    if old is root:
        raise ConfigurationError("`path` is empty: the root module cannot be replaced, only its submodules")
    aliases = [real for real, module in root.named_modules(remove_duplicate=False) if module is old]
    for real in aliases:
        root.set_submodule(real, new)
