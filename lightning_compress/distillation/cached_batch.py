"""A batch that brings what the teacher says about it, and how the two are told apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from lightning_compress.core.errors import ConfigurationError

NESTED = "inside other batches; give the Trainer the loader of `cached_loader` itself"
"""Why stored outputs cannot be taken off a mapping or list of batches."""


class CachedBatch(NamedTuple):
    """A batch (or one sample) of the training data beside what the teacher says about it.

    Attributes:
        training_batch: What the user's data set and ``collate_fn`` made.
        outputs: The teacher's outputs, (batch, ...) or for one sample (...).
    """

    training_batch: Any
    outputs: Tensor


def take_cached(batch: Any) -> tuple[Any, Tensor | None]:
    """Split a batch into the user's own and the teacher's outputs, ``None`` if the loader brings none.

    >>> take_cached(CachedBatch("images and labels", Tensor([0.5])))[0]
    'images and labels'
    >>> take_cached("images and labels")
    ('images and labels', None)
    """
    return (batch.training_batch, batch.outputs) if isinstance(batch, CachedBatch) else (batch, None)


def refuse_cached(batch: Any, why: str) -> None:
    """Refuse stored outputs where nobody takes them off a batch.

    Args:
        batch: A batch, or a mapping or list of batches.
        why: What cannot be done, and the next step.

    Raises:
        ConfigurationError: If there are any.
    """
    inner = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else ()
    if isinstance(batch, CachedBatch) or any(isinstance(part, CachedBatch) for part in inner):
        raise ConfigurationError(f"the training batches bring stored outputs of a teacher, but {why}")
