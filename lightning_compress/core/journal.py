"""What was done to a model's structure, as data: a list of edits that JSON can hold and a bare model can replay."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_compress.core.errors import ConfigurationError, JournalMismatchError, did_you_mean

FORMAT_VERSION = 1
"""Version of the journal's JSON form; a reader refuses anything newer."""

VERBS = ("replace", "parametrize", "bake", "slice")
"""The closed set of verbs; see :mod:`lightning_compress.core.verbs`."""


@dataclass(frozen=True)
class Edit:
    """One change of structure.

    Args:
        verb: One of :data:`VERBS`.
        path: Dotted path of the module it touches, as in ``named_modules()``, without ``_orig_mod``.
        kind: Key of the registry that says how to build the new part; ``""`` where the verb needs none.
        config: JSON-able arguments of the kind. Structure only: values belong to the ``state_dict``.

    Raises:
        ConfigurationError: For an unknown verb, or a config that JSON cannot hold.

    >>> Edit("slice", "conv1", config={"tensors": {"weight": {"0": [0, 2]}}}).verb
    'slice'
    """

    verb: str
    path: str
    kind: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.verb not in VERBS:
            raise ConfigurationError(f"`verb` is {self.verb!r}: {did_you_mean(str(self.verb), VERBS)}")
        try:  # the config becomes plain lists and dicts, so that an edit equals its own reload
            plain = json.loads(json.dumps(dict(self.config), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ConfigurationError(
                f"`config` of the {self.verb} edit at {self.path!r} cannot be written as JSON ({error}); "
                "keep numbers, strings, lists and mappings there and put tensors into buffers"
            ) from error
        object.__setattr__(self, "config", plain)

    def to_dict(self) -> dict[str, Any]:
        """Return the edit as a JSON-able mapping."""
        return {"verb": self.verb, "path": self.path, "kind": self.kind, "config": dict(self.config)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Edit:
        """Rebuild an edit from :meth:`to_dict`."""
        unknown = set(data) - {"verb", "path", "kind", "config"}
        if unknown or not isinstance(data.get("path"), str) or not isinstance(data.get("config", {}), Mapping):
            raise ConfigurationError(f"not an edit: {data!r}; expected the keys verb, path, kind and config")
        return cls(str(data.get("verb")), data["path"], str(data.get("kind", "")), data.get("config", {}))

    def at(self, prefix: str) -> Edit:
        """Return the same edit seen from a parent module that holds this model under ``prefix``."""
        return Edit(self.verb, ".".join(part for part in (prefix, self.path) if part), self.kind, self.config)

    def __str__(self) -> str:
        return f"{self.verb} {self.kind} at {self.path!r}".replace("  ", " ")


@dataclass(frozen=True)
class Journal:
    """An ordered, immutable list of edits.

    >>> journal = Journal().add(Edit("bake", "fc"))
    >>> Journal.from_json(journal.to_json()) == journal, len(journal)
    (True, 1)
    """

    edits: tuple[Edit, ...] = ()

    def add(self, *edits: Edit) -> Journal:
        """Return a journal with ``edits`` appended."""
        return Journal((*self.edits, *edits))

    def to_json(self) -> str:
        """Return the versioned JSON text of the journal."""
        body = {"version": FORMAT_VERSION, "edits": [edit.to_dict() for edit in self.edits]}
        return json.dumps(body, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Journal:
        """Parse :meth:`to_json`.

        Raises:
            JournalMismatchError: If the text is not a journal, or was written by a newer version.
        """
        try:
            body = json.loads(text)
            version = body["version"]
            if not isinstance(version, int) or isinstance(version, bool) or version < 1:
                raise JournalMismatchError(f"this is not a compression journal: its version is {version!r}")
            if version > FORMAT_VERSION:
                raise JournalMismatchError(
                    f"the journal has version {version}, this release reads up to {FORMAT_VERSION}; "
                    "install a newer lightning-compress"
                )
            return cls(tuple(Edit.from_dict(edit) for edit in body["edits"]))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise JournalMismatchError(f"this is not a compression journal: {error}") from error

    def missing_from(self, current: Journal) -> tuple[Edit, ...]:
        """Return the edits of this journal that ``current`` still lacks.

        Raises:
            JournalMismatchError: If ``current`` is not a prefix of this journal; names the first differing edit.
        """
        for index, edit in enumerate(current.edits):
            wanted = self.edits[index] if index < len(self.edits) else None
            if edit != wanted:
                raise JournalMismatchError(
                    f"edit {index + 1} differs: the model has {edit!s} {dict(edit.config)}, the saved one has "
                    + (f"{wanted!s} {dict(wanted.config)}" if wanted else "no further edit")
                    + ". An edit cannot be undone: build the model anew from its class and load into that "
                    "(or set up the callback as it was when the checkpoint was saved)"
                )
        return self.edits[len(current.edits) :]

    def __iter__(self) -> Iterator[Edit]:
        return iter(self.edits)

    def __len__(self) -> int:
        return len(self.edits)
