"""A progress bar that appears only when work turns out to be long."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.progress import Progress

Item = TypeVar("Item")


def slow(items: Iterable[Item], description: str, delay: float = 2.0) -> Iterator[Item]:
    """Yield ``items``, with a progress bar once ``delay`` seconds have passed.

    Args:
        items: What is worked through; its length is used if it has one.
        description: What the bar says.
        delay: Seconds before the bar appears.

    >>> list(slow([1, 2, 3], "Counting"))
    [1, 2, 3]
    """
    total = len(items) if isinstance(items, Sized) else None
    bar = Progress(transient=True)
    task = bar.add_task(description, total=total)
    next_look = time.monotonic() + delay
    try:
        for done, item in enumerate(items):
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + 0.1
                bar.start()
                bar.update(task, completed=done)
            yield item
    finally:
        if bar.live.is_started:
            bar.stop()
