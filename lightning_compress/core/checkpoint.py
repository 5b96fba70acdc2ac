"""Save a compressed model to one file, look at it, load it into the bare architecture."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import lightning_compress
from lightning_compress.coding.container import Container, read_container, write_container
from lightning_compress.coding.packing import Packed, bits_by_role
from lightning_compress.coding.state import check_expansion, most_bytes, pack_state, source, unpack_state
from lightning_compress.core.copies import structure_copy
from lightning_compress.core.errors import ArtifactError, ConfigurationError, did_you_mean
from lightning_compress.core.hooks import JOURNAL_KEY, journal_of
from lightning_compress.core.journal import Edit, Journal
from lightning_compress.core.paths import clean_path
from lightning_compress.core.verbs import apply

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class ArtifactInfo:
    """What a compressed file holds, as known from its header.

    Args:
        path: Where it lies.
        bytes: Size on disk.
        encoded_bits: Bits of ``values``, ``indices``, ``codebooks`` and ``other``; they add up to ``8 * bytes``.
        journal: The edits of structure that loading replays.
        provenance: Where it comes from: what the caller said, and the versions of torch and of this package.
        tensors: Packing, type, shape and bits of every key of the ``state_dict``.
    """

    path: str
    bytes: int
    encoded_bits: Mapping[str, int]
    journal: Journal = field(repr=False)
    provenance: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, Any]] = field(repr=False)


def save_compressed(
    model: nn.Module, path: str | Path, provenance: Mapping[str, Any] | None = None, coding: str = "auto"
) -> ArtifactInfo:
    """Write the ``state_dict`` of ``model``, packed, with its journal, as one file; whole or not at all.

    Args:
        model: Any module, on any device; tied tensors are stored once.
        path: File to write, usually ``*.safetensors``; missing folders are made.
        provenance: JSON-able facts to keep with it, such as the recipe and the seed.
        coding: Which entropy coders may be used, tensor by tensor where they make it smaller: ``"auto"`` (both),
            ``"huffman"`` (canonical), ``"ans"`` (asymmetric numeral systems), or ``"none"`` (fixed widths only).

    Returns:
        Sizes on disk, tensor by tensor.

    Raises:
        ConfigurationError: For a model that is none, entries that are no plain tensors, a provenance that is not JSON,
            a path that is no file's, or a ``coding`` that is none of the four.

    >>> import tempfile
    >>> model = nn.Linear(100, 100)
    >>> _ = nn.init.eye_(model.weight)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     info = save_compressed(model, folder + "/model.safetensors")
    >>> info.tensors["weight"]["packing"], sum(info.tensors["weight"]["bits"].values()) < 1000
    ('sparse', True)
    """
    _check_arguments(model, path)
    if provenance is not None and not isinstance(provenance, Mapping):
        raise ConfigurationError(f"`provenance` must be a mapping of names to JSON-able facts, got {provenance!r:.200}")
    state: dict[str, Any] = {}
    for key, value in model.state_dict().items():
        if not key.endswith(JOURNAL_KEY):
            state[clean_path(key)] = value
    versions = {"torch": str(torch.__version__), "lightning-compress": lightning_compress.__version__}
    own = {"journal": json.loads(journal_of(model).to_json()), "provenance": {**(provenance or {}), **versions}}
    return _info(write_container(path, pack_state(state, coding), own))


def inspect_compressed(path: str | Path) -> ArtifactInfo:
    """Return what a compressed file holds without unpacking a tensor; the checksum is verified.

    Raises:
        ArtifactError: If the file is missing, foreign, damaged, or of a newer version.
        JournalMismatchError: If its journal is of a newer version.
    """
    return _info(read_container(path))


def load_compressed(model: ModuleT, path: str | Path) -> ModuleT:
    """Load a compressed file into ``model`` in place: replay its journal, then copy its tensors, bit for bit.

    The file decides on the types of tensors, the model on devices, ``requires_grad``, ties and train / eval mode.
    Everything is checked on a copy of the structure without memory first: a load that fails changes nothing.

    Args:
        model: The bare architecture, or one that has some of the file's edits already; the ``configure_model`` of a
            LightningModule is called first.
        path: From :func:`save_compressed`.

    Returns:
        ``model`` itself.

    Raises:
        ArtifactError: If the file is missing, foreign, damaged, or newer, or holds other tensors than the model.
        JournalMismatchError: If the model has edits that the file does not have.
        ConfigurationError: If ``model`` is none, an edit does not fit it, or it has no memory (``meta`` device).
    """
    _check_arguments(model, path)
    container = read_container(path)
    lightning_module: Any = model
    if hasattr(model, "configure_model") and hasattr(model, "on_load_checkpoint"):
        lightning_module.configure_model()
    missing = _journal(container).missing_from(journal_of(model))
    _check_memory(model)
    allowed = _check_expansion(model, container)
    structure = _edited_copy(model, missing, container.path) if missing else model
    _check_tensors(structure, container)
    try:
        state = unpack_state(container.tensors, allowed)
    except ArtifactError as error:
        raise ArtifactError(f"{str(path)!r}: {error}") from error
    _check_ties(structure, state, container.path)
    for edit in missing:
        apply(model, edit)
    _cast(model, state)
    own = model.state_dict()  # with the versions of its modules, which some of them ask for
    own.update({key: state[clean_path(key)] for key in own if not key.endswith(JOURNAL_KEY)})
    model.load_state_dict(own)
    return model


def _info(container: Container) -> ArtifactInfo:
    tensors: dict[str, Mapping[str, Any]] = {}
    for key, packed in container.tensors.items():
        held = container.tensors[source(container.tensors, key)]
        dtype = str(held.dtype).removeprefix("torch.")
        tensors[key] = {
            "packing": packed.packing,
            "dtype": dtype,
            "shape": list(held.shape),
            "bits": bits_by_role(packed),
        }
    provenance = container.metadata.get("provenance", {})
    if not isinstance(provenance, dict):
        raise ArtifactError(f"{str(container.path)!r}: the provenance is no mapping; create the file again")
    bits = container.encoded_bits()
    return ArtifactInfo(str(container.path), container.file_bytes, bits, _journal(container), provenance, tensors)


def _journal(container: Container) -> Journal:
    return Journal.from_json(json.dumps(container.metadata.get("journal")))


def _check_arguments(model: object, path: object) -> None:
    if not isinstance(model, nn.Module):
        given = (
            f"the class {model.__name__}; build it: {model.__name__}(...)" if isinstance(model, type) else repr(model)
        )
        raise ConfigurationError(f"`model` must be a torch.nn.Module, got {given[:200]}")
    if not isinstance(path, str | Path):
        raise ConfigurationError(f"`path` must be the name of a file, got {path!r}")


def _check_expansion(model: nn.Module, container: Container) -> int:
    """Return how many bytes the file's tensors may take; refuse one that declares more, before its edits are tried."""
    own = {id(t): t for t in _tensors(model).values() if isinstance(t, Tensor)}.values()
    allowed = most_bytes(container.file_bytes, sum(t.numel() * t.element_size() for t in own))
    try:
        check_expansion(container.tensors, allowed)
    except ArtifactError as error:
        raise ArtifactError(f"{str(container.path)!r}: {error}") from error
    return allowed


def _check_memory(model: nn.Module) -> None:
    for key, tensor in _tensors(model).items():
        if isinstance(tensor, Tensor) and (tensor.device.type == "meta" or nn.parameter.is_lazy(tensor)):
            raise ConfigurationError(
                f"`model` has no memory for {key!r} ({tensor.device}); call `model.to_empty(device='cpu')`, "
                "or run one batch through lazy layers, before loading"
            )


def _edited_copy(model: nn.Module, edits: Iterable[Edit], path: Path) -> nn.Module:
    """Return the structure of ``model`` after ``edits``, with every tensor on the ``meta`` device."""
    try:
        structure = structure_copy(model, lambda tensor: torch.empty_like(tensor, device="meta"), share=True)
    except (TypeError, RuntimeError) as error:
        raise ConfigurationError(
            f"`model` cannot be copied to try the file's edits on it ({error}); load before you attach such objects"
        ) from error
    try:
        with torch.device("meta"):
            for edit in edits:
                apply(structure, edit)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"{str(path)!r} was written for another network than this {type(model).__name__}: {error}. "
            "Build the architecture with the arguments it was saved with"
        ) from error
    return structure


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what ``state_dict`` names, by clean key: parameters and buffers themselves, not views of them."""
    state = model.state_dict(keep_vars=True)
    return {clean_path(key): value for key, value in state.items() if not key.endswith(JOURNAL_KEY)}


def _check_tensors(structure: nn.Module, container: Container) -> None:
    """Compare keys, shapes and kinds of types with those the file declares, before anything is unpacked."""
    own, saved = _tensors(structure), container.tensors
    lacking = [key for key in own if key not in saved]
    extra = [key for key in saved if key not in own]
    problems = [f"the file lacks {key!r}{_near(key, extra)}" for key in lacking[:3]]
    problems += [f"the model lacks {key!r}{_near(key, lacking)}" for key in extra[:3]]
    more = len(lacking) + len(extra) - len(problems)
    for key in () if problems else own:
        held: Packed = saved[source(saved, key)]
        if not isinstance(own[key], Tensor):
            problems.append(f"{key!r} of the model is {type(own[key]).__name__}, not a tensor")
        elif tuple(own[key].shape) != held.shape:
            shown = f"{list(held.shape)}"[:80]
            problems.append(f"{key!r} has shape {shown} in the file, {list(own[key].shape)} in the model")
        elif own[key].requires_grad and not (held.dtype.is_floating_point or held.dtype.is_complex):
            problems.append(f"{key!r} is {held.dtype} in the file, but requires gradients in the model")
    if problems:
        shown = "; ".join(problems[:6]) + (f"; and {more} more" if more else "")
        raise ArtifactError(
            f"{str(container.path)!r} does not fit {type(structure).__name__}: {shown}. "
            "Build the architecture with the arguments it was saved with"
        )


def _near(key: str, options: Sequence[str]) -> str:
    return f" ({did_you_mean(key, options[:500])})" if options else ""


def _check_ties(structure: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse a file that gives one tensor of the model two contents."""
    first: dict[int, str] = {}
    for key, tensor in _tensors(structure).items():
        other = first.setdefault(id(tensor), key)
        a, b = state[key], state[other]
        same = a is b or (a.dtype == b.dtype and torch.equal(_bytes(a), _bytes(b)))
        if not same:
            raise ArtifactError(f"{str(path)!r}: {key!r} and {other!r} are one tensor in the model, two in the file")


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _cast(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give tensors of another type the file's type, in place: parameters keep their identity, ties stay.

    Expanded tensors, of which one element stands for many, get memory for all of them: into such nothing can be copied.
    """
    for key, tensor in _tensors(model).items():
        if tensor.dtype != state[key].dtype:
            if tensor.is_leaf:
                tensor.grad = None
            tensor.data = tensor.data.to(state[key].dtype)
        if _overlaps(tensor):
            tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)


def _overlaps(tensor: Tensor) -> bool:
    """Return whether two elements may lie at one place in memory."""
    reach = 0
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride <= reach:
            return tensor.numel() > 0
        reach += stride * (size - 1)
    return False
