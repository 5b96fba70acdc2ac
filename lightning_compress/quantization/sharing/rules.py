"""Exceptions to a selection: these layers with those shared values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_compress.core.select import Select
from lightning_compress.quantization.sharing.quantizers import CodebookQuantizer, as_quantizer


@dataclass(frozen=True)
class SharingRule:
    """Share the weights of the layers that match in a way of their own, each tensor with its own codebook.

    Args:
        include: Patterns as in :class:`Select`; a single one needs no list.
        quantizer: How their values become few, or a number of bits for k-means; ``None`` leaves them alone.
        exclude: Patterns that must not match.
        types: Class names of layers, or classes; empty for all whose weights can be shared.

    Raises:
        ConfigurationError: If a pattern is malformed or the quantizer is none.

    >>> SharingRule("conv*", 8).quantizer
    KMeans(bits=8, clusters=None, init='linear')
    """

    include: str | Sequence[str]
    quantizer: CodebookQuantizer | int | None
    exclude: str | Sequence[str] = ()
    types: str | type | Sequence[str | type] = ()

    def __post_init__(self) -> None:
        for name in ("include", "exclude", "types"):
            object.__setattr__(self, name, getattr(self.select, name))
        if self.quantizer is not None:
            object.__setattr__(self, "quantizer", as_quantizer(self.quantizer))

    @property
    def select(self) -> Select:
        """The rule's patterns as a selection."""
        return Select(types=self.types, include=self.include, exclude=self.exclude)
