"""A teacher's weights from a file: a Lightning checkpoint, a ``state_dict``, plain safetensors or an artifact."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_compress.coding.container import FORMAT
from lightning_compress.core.checkpoint import load_compressed
from lightning_compress.core.errors import ArtifactError, ConfigurationError, did_you_mean
from lightning_compress.core.hooks import JOURNAL_KEY, install_hooks


def load_weights(module: nn.Module, path: str | Path) -> nn.Module:
    """Load a file into ``module``, in place; edits of structure that it carries are replayed.

    Names may lack a common prefix on either side: the tensors of a network fit the module that holds it as ``net``,
    and the other way round.

    Args:
        module: The teacher's architecture.
        path: ``.safetensors`` (a compressed artifact, or plain tensors), or what ``torch.save`` wrote: a Lightning
            checkpoint or a ``state_dict``; only tensors and builtins are read from it.

    Returns:
        ``module`` itself.

    Raises:
        ConfigurationError: If there is no such file, or its tensors are not those of the module.
        ArtifactError: If the file is damaged.
    """
    file = Path(path)
    if not file.is_file():
        near = did_you_mean(file.name, sorted(other.name for other in file.parent.glob("*") if other.is_file()))
        raise ConfigurationError(
            f"`teacher`: there is no file {str(path)!r}; in its folder: {near} For the student as it is now, write "
            "'baseline'"
        )
    if file.suffix == ".safetensors" and _format_of(file) == FORMAT:
        return load_compressed(module, file)
    tensors = {key: value for key, value in _tensors(file).items() if isinstance(value, Tensor)}
    install_hooks(module)
    try:
        module.load_state_dict(tensors if _has_journal(tensors) else _fit_names(module, tensors, file))
    except RuntimeError as error:  # shapes
        raise ConfigurationError(f"`teacher`: {str(path)!r} does not fit {type(module).__name__}: {error}") from error
    return module


def _tensors(file: Path) -> Mapping[str, Any]:
    if file.suffix == ".safetensors":
        return load_file(file)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different type for every way a file can be broken
        raise ArtifactError(
            f"`teacher`: {str(file)!r} is not a file of tensors and builtins that can be read (pickled code is never "
            f"loaded): {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    if not isinstance(content, Mapping):
        raise ArtifactError(f"`teacher`: {str(file)!r} holds a {type(content).__name__}, expected a mapping of tensors")
    inner = content.get("state_dict")
    return inner if isinstance(inner, Mapping) else content


def _format_of(file: Path) -> str | None:
    try:
        with safe_open(file, "pt") as opened:
            return (opened.metadata() or {}).get("format")
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"`teacher`: {str(file)!r} is not a readable safetensors file ({error})") from error


def _has_journal(tensors: Mapping[str, Tensor]) -> bool:
    return any(key.endswith(JOURNAL_KEY) for key in tensors)


def _fit_names(module: nn.Module, tensors: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Return the tensors under the module's names, with a common prefix added or taken away where that is all."""
    own, names = set(module.state_dict()), set(tensors)
    if own == names:
        return dict(tensors)
    for longer, shorter, added in ((own, names, True), (names, own, False)):
        for prefix in sorted(_prefixes(longer)):
            if {prefix + name for name in shorter} == longer:
                return {prefix + k if added else k.removeprefix(prefix): value for k, value in tensors.items()}
    lacking, extra = sorted(own - names), sorted(names - own)
    example = lacking[0] if lacking else extra[0]
    raise ConfigurationError(
        f"`teacher`: {str(file)!r} holds other tensors than {type(module).__name__} ({len(lacking)} lacking, "
        f"{len(extra)} unknown), for example {example!r}; {did_you_mean(example, extra or lacking)} Give the "
        "architecture it was made with: load_teacher(path, model)"
    )


def _prefixes(names: set[str]) -> set[str]:
    """Return every dotted beginning that all names share."""
    first = next(iter(names), "")
    parts = first.split(".")
    heads = {".".join(parts[:depth]) + "." for depth in range(1, len(parts))}
    return {head for head in heads if all(name.startswith(head) for name in names)}
