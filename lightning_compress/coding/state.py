"""A whole ``state_dict`` in packed form: tensors that share memory are stored once.

A few bytes can stand for any number of equal values, so a file says nothing of the memory that it takes; what it may
take is known from the model it is for, or from its own length (:func:`most_bytes`).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from torch import Tensor

from lightning_compress.coding.packing import Packed, is_plain, pack, unpack
from lightning_compress.coding.stream import coders
from lightning_compress.core.errors import ArtifactError, ConfigurationError, did_you_mean

ALIAS = "alias"
"""Packing of a tensor that another key holds; its config is ``{"of": key}`` and it has no parts."""

EXPANSION = 256
"""How many times longer than the file its tensors may be, whatever the model; beyond, the model must be as large."""

SPARE_BYTES = 64 * 2**20
"""What any file may take in memory."""

_WIDER = 4
"""How many times the bytes of the model: the file decides on types, and edits may add a few tensors."""


def pack_state(state: Mapping[str, Tensor], coding: str = "auto") -> dict[str, Packed]:
    """Pack every tensor; a key that shows the same memory as an earlier one becomes an alias.

    Args:
        state: Tensors by key.
        coding: Which entropy coders may be used, as in :func:`~.packing.pack`.

    Raises:
        ConfigurationError: For an entry that is no tensor, or one that :func:`~.packing.pack` refuses; names the key.
            For a ``coding`` that is none.

    >>> import torch
    >>> weight = torch.ones(3, 2)
    >>> [packed.packing for packed in pack_state({"encoder": weight, "decoder": weight}).values()]
    ['dense', 'alias']
    """
    coders(coding)  # refused before the first tensor, which would be named in the error
    packed: dict[str, Packed] = {}
    first: dict[tuple[object, ...], str] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise ConfigurationError(
                f"the state_dict entry {key!r} is {type(value).__name__}, not a tensor: a compressed file holds "
                "tensors only; return a tensor from `get_extra_state`, or make it a buffer"
            )
        memory = _memory(value)
        if memory is not None and memory in first:
            packed[key] = Packed(ALIAS, {}, {"of": first[memory]})
            continue
        try:
            packed[key] = pack(value, coding)
        except ConfigurationError as error:
            raise ConfigurationError(f"the state_dict entry {key!r}: {error}") from error
        if memory is not None:
            first[memory] = key
    return packed


def most_bytes(file_bytes: int, model_bytes: int = 0) -> int:
    """Return how many bytes the tensors of a file may take in memory.

    Args:
        file_bytes: Its length, or that of the parts in it.
        model_bytes: Of the tensors of the bare model that it is for.

    >>> most_bytes(10_000) == most_bytes(10_000, 17_000_000), most_bytes(0, 10**9)
    (False, 4067108864)
    """
    return max(EXPANSION * file_bytes, _WIDER * model_bytes) + SPARE_BYTES


def unpack_state(packed: Mapping[str, Packed], most: int | None = None) -> dict[str, Tensor]:
    """Undo :func:`pack_state`; an alias gives the very tensor it stands for.

    Args:
        packed: By key.
        most: How many bytes all tensors together may take; by default what :func:`most_bytes` says of their parts.

    Raises:
        ArtifactError: If they would take more, before anything is unpacked; or if an entry cannot be unpacked, with
            its key.
    """
    check_expansion(packed, most)
    state: dict[str, Tensor] = {}
    for key, entry in packed.items():
        if entry.packing == ALIAS:
            continue
        try:
            state[key] = unpack(entry)
        except ArtifactError as error:
            raise ArtifactError(f"the tensor {key!r}: {error}") from error
    return {key: state[source(packed, key)] for key in packed}


def check_expansion(packed: Mapping[str, Packed], most: int | None = None) -> None:
    """Refuse tensors that would take more memory than they may; arguments and errors as of :func:`unpack_state`."""
    if most is None:
        parts = [part for entry in packed.values() for part in entry.parts.values()]
        most = most_bytes(sum(part.numel() * part.element_size() for part in parts))
    declared = {k: prod(e.shape) * e.dtype.itemsize for k, e in packed.items() if e.packing != ALIAS}
    total = sum(declared.values())
    if total > most:
        largest = max(declared, key=declared.__getitem__)
        raise ArtifactError(
            f"its tensors would take {total} bytes of memory, where {most} are allowed for such a file and model (the "
            f"largest is {largest!r}, {declared[largest]} bytes); the file is damaged, or not what it claims to be"
        )


def source(packed: Mapping[str, Packed], key: str) -> str:
    """Return the key that holds the parts of ``key``: itself, or what its alias names.

    Raises:
        ArtifactError: If an alias names no stored tensor.
    """
    if packed[key].packing != ALIAS:
        return key
    of = packed[key].config.get("of")
    if not isinstance(of, str) or of not in packed or packed[of].packing == ALIAS:
        stored = [name for name, entry in packed.items() if entry.packing != ALIAS]
        raise ArtifactError(
            f"the tensor {key!r} is an alias of {of!r}, which is not stored; {did_you_mean(str(of), stored)}"
        )
    return of


def _memory(tensor: Tensor) -> tuple[object, ...] | None:
    """Return what two views of the same elements have in common, or ``None`` where there is nothing to share."""
    if not is_plain(tensor) or tensor.numel() == 0:
        return None
    where = (str(tensor.device), tensor.untyped_storage().data_ptr(), tensor.storage_offset())
    return (*where, tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg())
