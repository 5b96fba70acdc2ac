"""Errors that name the argument, what was expected, what came, where, and the next step."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CompressionError(Exception):
    """Base class of every error this package raises on purpose."""


class ConfigurationError(CompressionError, ValueError):
    """An argument is outside what is accepted; raised before anything is changed."""


class SelectionError(ConfigurationError):
    """A selection matches no layer, or a rule names a layer that does not exist."""


class JournalMismatchError(CompressionError, RuntimeError):
    """The structure edits of a model and of a checkpoint differ and cannot be reconciled."""


class ArtifactError(CompressionError, ValueError):
    """A compressed file is corrupt, truncated, foreign, or written by a newer version."""


def did_you_mean(word: str, options: Iterable[str], limit: int = 3) -> str:
    """Return a phrase with the options nearest to ``word``, or with all of them when none is near.

    Args:
        word: What was given.
        options: What would have been accepted.
        limit: At most this many near options, or twice as many when none is near.

    Returns:
        ``"did you mean 'a' or 'b'?"``, or ``"expected one of 'a', 'b', ..."``; for no options ``"there are none"``.

    >>> did_you_mean("polynomiel", ["linear", "polynomial"])
    "did you mean 'polynomial'?"
    >>> did_you_mean("x", ["linear", "cosine"])
    "expected one of 'linear', 'cosine'"
    """
    known = list(options)
    if not known:
        return "there are none"
    near = difflib.get_close_matches(word, known, n=limit, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(repr(option) for option in near)}?"
    shown = ", ".join(repr(option) for option in known[: 2 * limit])
    return f"expected one of {shown}" + (", ..." if len(known) > 2 * limit else "")
