"""The journal travels inside the ``state_dict``: a hook writes it, a load hook replays what the model still lacks.

That is the one place that works for ``fit(ckpt_path=...)``, ``test(ckpt_path=...)``, weights-only files and plain
``load_state_dict``: a callback sees a checkpoint only after the strict load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.core.errors import JournalMismatchError
from lightning_compress.core.journal import Edit, Journal
from lightning_compress.core.paths import clean_path, original

JOURNAL_KEY = "_compression_journal"
"""Key of the journal in a ``state_dict``; there only when there are edits, so masks alone leave the keys untouched."""

_ATTRIBUTE = "compression_journal"

Undo = Callable[[], None] | None
"""Takes one edit back, as long as nothing was trained or loaded since; ``None`` where that is impossible."""

_UNDO: dict[int, list[Undo]] = {}
"""How to take back the newest edits of a root (by ``id``) between :func:`keep_undo` and :func:`forget_undo`."""


def keep_undo(root: nn.Module) -> None:
    """From now on remember how to take back edits of ``root``.

    A callback cannot see in ``setup`` whether a checkpoint will follow. So it edits the model as it would for a fresh
    run, and a checkpoint whose journal differs (ranks chosen from data) takes these edits back and replays its own.
    """
    _UNDO.setdefault(id(original(root)), [])


def forget_undo(root: nn.Module) -> None:
    """Drop what :func:`keep_undo` remembers, and the replaced layers with it."""
    _UNDO.pop(id(original(root)), None)


def install_hooks(root: nn.Module) -> None:
    """Register the two ``state_dict`` hooks on ``root`` once; ``deepcopy`` and ``pickle`` keep them."""
    root = original(root)
    if _own_journal(root) is None:
        setattr(root, _ATTRIBUTE, Journal())
        root.register_state_dict_post_hook(_write_journal)
        root.register_load_state_dict_pre_hook(_replay_journal)


def append_edit(root: nn.Module, edit: Edit, undo: Undo = None) -> None:
    """Append ``edit`` to the root's journal; for :func:`lightning_compress.core.verbs.apply` alone."""
    root = original(root)
    setattr(root, _ATTRIBUTE, (_own_journal(root) or Journal()).add(edit))
    if id(root) in _UNDO:
        _UNDO[id(root)].append(undo)


def journal_of(root: nn.Module) -> Journal:
    """Return all edits of ``root`` as paths from it: those that its parts brought along first, then its own."""
    inner_first = sorted(_journals(root), key=lambda item: -len(item[0].split(".")) if item[0] else 0)
    return Journal(tuple(edit.at(path) for path, journal in inner_first for edit in journal))


def _own_journal(module: nn.Module) -> Journal | None:
    journal = vars(module).get(_ATTRIBUTE)
    return journal if isinstance(journal, Journal) else None


def _journals(root: nn.Module) -> Iterator[tuple[str, Journal]]:
    for path, module in root.named_modules():
        journal = _own_journal(module)
        if journal is not None:
            yield clean_path(path), journal


def encode_journal(journal: Journal) -> Tensor:
    """Return the journal as a one-dimensional ``uint8`` tensor of its UTF-8 JSON."""
    return torch.frombuffer(bytearray(journal.to_json().encode()), dtype=torch.uint8)


def decode_journal(tensor: Tensor) -> Journal:
    """Undo :func:`encode_journal`.

    Raises:
        JournalMismatchError: If the tensor does not hold a journal.
    """
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.uint8 or tensor.dim() != 1:
        raise JournalMismatchError(f"the entry {JOURNAL_KEY!r} of the state_dict is not a journal; the file is damaged")
    try:
        return Journal.from_json(bytes(tensor.cpu().numpy()).decode())
    except UnicodeDecodeError as error:
        raise JournalMismatchError(f"the entry {JOURNAL_KEY!r} is not text: {error}; the file is damaged") from error


def _write_journal(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    journal = _own_journal(module)
    if journal:
        state_dict[prefix + JOURNAL_KEY] = encode_journal(journal)


def _replay_journal(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    from lightning_compress.core.verbs import apply

    current = _own_journal(module) or Journal()
    written = state_dict.pop(prefix + JOURNAL_KEY, None)
    if written is not None:
        saved = decode_journal(written)
        missing = saved.missing_from(_take_back(module, current, saved))
        _replay_parts(module, state_dict, prefix)
        for edit in missing:
            apply(module, edit)
        return
    if current and (_resumes(module) or not _is_part(state_dict, prefix, module)):
        raise JournalMismatchError(
            f"this state_dict was saved before {len(current)} structure edits of the model (the first is "
            f"{current.edits[0]!s}), so its tensors do not fit. Load it into a model that was built anew from its "
            "class; to test an older checkpoint, do so before the edits, or on `callback.compressed`'s original; to go "
            "on from its weights, load them with `load_from_checkpoint` and fit without `ckpt_path`"
        )
    _replay_parts(module, state_dict, prefix)


def _resumes(module: Any) -> bool:
    """Return whether a Trainer restores the whole of ``module``: between ``setup`` and the start of a resumed fit."""
    return id(module) in _UNDO and module.strict_loading and module.trainer.ckpt_path is not None


def _is_part(state_dict: Mapping[str, Any], prefix: str, module: nn.Module) -> bool:
    """Return whether a ``state_dict`` without journal holds only some tensors of ``module``, and all of them fit.

    That is a partial load on purpose (``strict=False``, which torch does not tell its hooks).
    """
    own = {key: getattr(value, "shape", None) for key, value in module.state_dict().items() if key != JOURNAL_KEY}
    given = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
    fits = all(key in own and own[key] == getattr(value, "shape", None) for key, value in given.items())
    return fits and len(given) < len(own)


def _take_back(module: nn.Module, current: Journal, saved: Journal) -> Journal:
    """Undo the newest edits of ``current``, as far as that is possible and ``saved`` does not have them."""
    remembered = _UNDO.get(id(module), [])
    while remembered and current.edits != saved.edits[: len(current)]:
        undo = remembered.pop()
        if undo is None:
            break
        undo()
        current = Journal(current.edits[:-1])
        setattr(module, _ATTRIBUTE, current)
    return current


def _replay_parts(module: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> None:
    """Replay the journals of parts that were compressed before they became parts, innermost first."""
    from lightning_compress.core.verbs import apply

    keys = [key for key in state_dict if key.startswith(prefix) and key.endswith("." + JOURNAL_KEY)]
    for key in sorted(keys, key=lambda key: -key.count(".")):
        path = key[len(prefix) : -len(JOURNAL_KEY) - 1]
        try:
            part = original(module.get_submodule(path))
        except AttributeError:
            raise JournalMismatchError(
                f"the state_dict holds edits for {path!r}, which {type(module).__name__} does not have"
            ) from None
        install_hooks(part)
        for edit in decode_journal(state_dict[key]).missing_from(_own_journal(part) or Journal()):
            apply(part, edit)
