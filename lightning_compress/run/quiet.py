"""Less chatter from Lightning while a recipe runs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

EXPECTED_WARNINGS = (
    ".*does not have many workers.*",
    ".*The number of training batches.*is smaller than the logging interval.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*The dirpath has changed from.*",
    ".*isinstance\\(treespec, LeafSpec\\).*",
)
CHATTER = (
    *("GPU available", "TPU available", "HPU available", "LOCAL_RANK", "Tip:"),
    *("`Trainer.fit` stopped", "Restoring states", "Restored all states", "was configured so"),
)


@contextmanager
def quiet(least: int = logging.NOTSET) -> Iterator[None]:
    """Silence what Lightning says about every small run, and nothing else.

    Args:
        least: Also silence its messages below this level.
    """

    def is_news(record: logging.LogRecord) -> bool:
        return record.levelno >= least and not any(word in record.getMessage() for word in CHATTER)

    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addFilter(is_news)
    try:
        with warnings.catch_warnings():
            for message in EXPECTED_WARNINGS:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        logger.removeFilter(is_news)
