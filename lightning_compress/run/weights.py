"""Load trained weights from whatever file the user has: a Lightning checkpoint, an artifact, plain safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_compress.coding.container import FORMAT
from lightning_compress.core.checkpoint import load_compressed
from lightning_compress.core.errors import ArtifactError, ConfigurationError, did_you_mean
from lightning_compress.core.files import load_tensors
from lightning_compress.core.hooks import JOURNAL_KEY
from lightning_compress.data.paths import find_data

ARGUMENT = "model.checkpoint"
PRETRAINED = "model.pretrained"
SUFFIX = ".safetensors"
COUNTER = "num_batches_tracked"  # files from before it existed, or stripped of it, lack it; torch then starts at zero


def load_pretrained(module: nn.Module, path: str | None) -> None:
    """Load the weights that training starts from, if any; a path that does not exist is looked for among the data.

    Args:
        module: As for :func:`load_weights`.
        path: As for :func:`load_weights`, or a path below ``$LIGHTNING_COMPRESS_DATA`` and the other usual places;
            ``None`` for none.

    Raises:
        ConfigurationError: As :func:`load_weights` does; if the file is nowhere, with the places looked at.
    """
    if path is not None:
        found = Path(path) if Path(path).is_file() else find_data(path, argument=PRETRAINED)
        load_weights(module, str(found), PRETRAINED)


def load_weights(module: nn.Module, path: str, argument: str = ARGUMENT) -> None:
    """Load a file into ``module``, in place.

    Names may lack a common prefix: the tensors of a network fit the module that holds it as ``net``.

    Args:
        module: Its structure is what the configuration says; edits that the file carries are replayed.
        path: ``.safetensors`` (a compressed artifact, or plain tensors), or what ``torch.save`` wrote: a Lightning
            checkpoint or a ``state_dict``. One in a folder that does not exist here is looked for among the data.
        argument: The key of the configuration that names the file, for errors.

    Raises:
        ConfigurationError: If there is no such file, or its tensors are not those of the module.
        ArtifactError: If the file is damaged.
    """
    if not Path(path).parent.is_dir():
        path = str(find_data(path, argument=argument))
    try:
        _load(module, path, argument)
    except ArtifactError as error:
        raise ArtifactError(f"`{argument}`: {error}") from error


def _load(module: nn.Module, path: str, argument: str) -> None:
    file = Path(path)
    if not file.is_file():
        near = did_you_mean(file.name, sorted(other.name for other in file.parent.glob("*") if other.is_file()))
        raise ConfigurationError(f"`{argument}`: there is no file {path!r}; in its folder: {near}")
    if file.suffix == SUFFIX:
        if is_artifact(file):
            load_compressed(module, file)
            return
        tensors: dict[str, Any] = dict(load_file(file))
    else:
        content = load_tensors(file)
        tensors = content["state_dict"] if isinstance(content.get("state_dict"), dict) else content
    tensors = {key: value for key, value in tensors.items() if isinstance(value, Tensor)}
    prefix = _prefix(module, tensors, path, argument)
    try:
        module.load_state_dict({prefix + key: value for key, value in tensors.items()})
    except RuntimeError as error:  # shapes
        raise ConfigurationError(f"`{argument}`: {path!r} does not fit the model: {error}") from error


def is_artifact(file: Path) -> bool:
    """Tell a compressed artifact from plain tensors and from what ``torch.save`` wrote, by name and header."""
    if file.suffix != SUFFIX:
        return False
    try:
        with safe_open(file, "pt") as opened:
            return (opened.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"{str(file)!r} is not a readable safetensors file ({error})") from error


def _prefix(module: nn.Module, tensors: dict[str, Any], path: str, argument: str) -> str:
    own = {key for key in module.state_dict() if not key.endswith(COUNTER)}
    names = {key for key in tensors if not key.endswith((JOURNAL_KEY, COUNTER))}
    edited = any(key.endswith(JOURNAL_KEY) for key in tensors)
    if edited or names == own:  # with a journal the structure follows from the file
        return ""
    for candidate in sorted({key[: len(key) - len(name)] for name in names for key in own if key.endswith("." + name)}):
        if {candidate + name for name in names} == own:
            return candidate
    lacking, extra = sorted(own - names), sorted(names - own)
    example = lacking[0] if lacking else extra[0]
    raise ConfigurationError(
        f"`{argument}`: {path!r} holds other tensors than the model ({len(lacking)} lacking, {len(extra)} unknown), "
        f"for example {example!r}; {did_you_mean(example, extra or lacking)} Choose the `model` the file was made with"
    )
