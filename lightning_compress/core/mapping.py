"""Arguments that a config gives as plain mappings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar, cast

from lightning_compress.core.errors import ConfigurationError, did_you_mean

Kind = TypeVar("Kind")


def from_mapping(kind: type[Kind], value: Kind | Mapping[str, Any] | None, name: str) -> Kind:
    """Return ``value`` if it is of the kind, the kind's default for ``None``, else one built from a mapping."""
    if value is None:
        return kind()
    if isinstance(value, kind):
        return value
    known = [item.name for item in fields(cast(Any, kind))]
    if not isinstance(value, Mapping):
        raise ConfigurationError(
            f"`{name}` must be a {kind.__name__} or a mapping with {', '.join(known)}; got {value!r}"
        )
    for key in value:
        if key not in known:
            raise ConfigurationError(f"`{name}` has no key {key!r}: {did_you_mean(str(key), known)}")
    return kind(**value)
