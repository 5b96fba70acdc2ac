"""Build what a configuration node describes, and say which node it was when that fails."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from lightning_compress.core.errors import CompressionError, ConfigurationError


def build(where: str, node: Mapping[str, Any]) -> Any:
    """Instantiate a node with plain lists and dicts as arguments.

    Args:
        where: Path of the node, for the error.
        node: A mapping with ``_target_``.

    Returns:
        What the target returned.

    Raises:
        ConfigurationError: If the target refuses its arguments; an error of this package keeps its type.

    >>> build("callbacks.x", {"_target_": "fractions.Fraction", "numerator": 1, "denominator": 2})
    Fraction(1, 2)
    """
    try:
        return instantiate(dict(node), _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        place = _place(where, str(error))
        if isinstance(cause, CompressionError):
            raise type(cause)(f"`{place}`: {cause}") from error
        reason = f"{type(cause).__name__}: {cause}" if cause is not None else str(error)
        raise ConfigurationError(f"`{place}` ({node.get('_target_')}): {reason}") from error


def _place(where: str, message: str) -> str:
    """Return the path of the node that failed, which may lie below ``where``."""
    below = message.rpartition("full_key: ")[2].strip() if "full_key: " in message else ""
    return f"{where}.{below}" if below else where
