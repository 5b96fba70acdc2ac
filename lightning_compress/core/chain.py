"""The order in which methods build on each other: prune, share, then code (survey arXiv:1710.09282, section III)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from lightning_compress.core.blanks import Blanks
from lightning_compress.core.errors import ConfigurationError

CHAIN = ("prune", "share")
"""Links in their order; coding is what ``save_compressed`` does with what they leave."""


def check_chain(methods: Iterable[object], argument: str) -> None:
    """Refuse a method that stands after one whose work it would undo.

    Args:
        methods: In the order in which they act; what has no link may stand anywhere.
        argument: What holds them, for the error.

    Raises:
        ConfigurationError: For the first wrong pair; names both.

    >>> check_chain([], "methods")
    """
    linked = [method for method in methods if isinstance(method, Blanks) and method.link]
    for first, second in itertools.combinations(linked, 2):
        if CHAIN.index(second.link) < CHAIN.index(first.link):
            here, there = type(first).__name__, type(second).__name__
            raise ConfigurationError(
                f"`{argument}` has {there} after {here}: what comes later in the chain {', '.join(CHAIN)}, code builds "
                f"on what comes earlier, and {there} ({second.link}) would undo {here} ({first.link}); put {there} "
                "first"
            )
