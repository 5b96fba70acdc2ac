"""How the values of weights become few: k-means, uniform steps, entropy-constrained clusters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_compress.core.errors import ConfigurationError, did_you_mean
from lightning_compress.quantization.sharing.kmeans import INITS, kmeans, nearest
from lightning_compress.quantization.sharing.scalar import (
    Codebook,
    entropy_constrained_to_bits,
    uniform_to_bits,
)

MOST = 1 << 15


class CodebookQuantizer(Protocol):
    """Something that finds shared values for numbers."""

    def codebook(
        self, values: Tensor, importance: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Codebook:
        """Return shared values for ``values`` (n,), each as important as it says, and which one each takes."""
        ...


@dataclass(frozen=True)
class KMeans:
    """K-means clusters, as many as an index of a fixed length can name (Deep Compression, arXiv:1510.00149).

    Args:
        bits: Length of an index, 1 to 8: at most :math:`2^{bits}` clusters.
        clusters: Number of clusters instead, 1 to 32,768; zero is not one of them.
        init: See :func:`~lightning_compress.quantization.sharing.kmeans.initial_centroids`.

    Raises:
        ConfigurationError: For a value outside its range.

    >>> KMeans(bits=1).codebook(torch.tensor([1.0, 2.0, 9.0, 12.0])).codes.tolist()
    [0, 0, 1, 1]
    """

    bits: int = 5
    clusters: int | None = None
    init: str = "linear"

    def __post_init__(self) -> None:
        _check_int("bits", self.bits, 8)
        if self.clusters is not None:
            _check_int("clusters", self.clusters, MOST)
        if self.init not in INITS:
            raise ConfigurationError(f"`init` is {self.init!r}: {did_you_mean(str(self.init), INITS, 4)}")

    def __str__(self) -> str:
        return f"k-means, {self._count} clusters, {self.init}"

    @property
    def _count(self) -> int:
        return self.clusters if self.clusters is not None else 1 << self.bits

    def codebook(
        self, values: Tensor, importance: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Codebook:
        """Return the clusters of ``values``; weighted ones with ``importance``."""
        centroids = kmeans(values, self._count, self.init, importance, generator)
        return Codebook(centroids, nearest(values, centroids))


@dataclass(frozen=True)
class Uniform:
    """Multiples of one step, for an entropy coder (Choi et al., arXiv:1612.01543); the step is found by bisection.

    Args:
        bits: Entropy of an index to keep to, above 0.
        clusters: At most this many cells, 2 to 32,768.

    Raises:
        ConfigurationError: For a value outside its range.

    >>> len(Uniform(bits=2.0).codebook(torch.linspace(-1, 1, 101)).centroids)
    5
    """

    bits: float = 4.0
    clusters: int = 256

    def __post_init__(self) -> None:
        _check_bits(self.bits)
        _check_int("clusters", self.clusters, MOST, least=2)

    def __str__(self) -> str:
        return f"uniform, {self.bits:g} bits"

    def codebook(
        self, values: Tensor, importance: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Codebook:
        """Return the cells of ``values``, each represented by its mean, weighted by ``importance``."""
        return uniform_to_bits(values, float(self.bits), self.clusters, importance)


@dataclass(frozen=True)
class EntropyConstrained:
    r"""Clusters that cost few bits behind an entropy coder (ECSQ, Choi et al., arXiv:1612.01543).

    Takes n times k operations a step and some hundred steps: seconds for a million weights, minutes for ten million.

    Args:
        bits: Entropy of an index to keep to, above 0; :math:`\lambda` is found by bisection.
        clusters: With how many to begin, 2 to 32,768.
        init: Where k-means, whose clusters it begins with, begins.

    Raises:
        ConfigurationError: For a value outside its range.

    >>> book = EntropyConstrained(bits=2.0, clusters=16).codebook(torch.linspace(-1, 1, 1001) ** 3)
    >>> 1.8 < book.bits <= 2.0
    True
    """

    bits: float = 4.0
    clusters: int = 64
    init: str = "linear"

    def __post_init__(self) -> None:
        _check_bits(self.bits)
        _check_int("clusters", self.clusters, MOST, least=2)
        KMeans(clusters=self.clusters, init=self.init)

    def __str__(self) -> str:
        return f"entropy-constrained, {self.bits:g} bits"

    def codebook(
        self, values: Tensor, importance: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Codebook:
        """Return the clusters of ``values``, weighted by ``importance``."""
        begin = kmeans(values, self.clusters, self.init, importance, generator)
        return entropy_constrained_to_bits(values, begin, float(self.bits), importance)


def as_quantizer(value: CodebookQuantizer | int) -> CodebookQuantizer:
    """Return a quantizer; a number of bits means k-means.

    Raises:
        ConfigurationError: For anything else.

    >>> as_quantizer(4)
    KMeans(bits=4, clusters=None, init='linear')
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return KMeans(bits=value)
    if isinstance(value, type | bool) or not callable(getattr(value, "codebook", None)):
        raise ConfigurationError(
            "`quantizer` must be a number of bits (1 to 8), or one of KMeans, Uniform and EntropyConstrained; got "
            f"{value!r}"
        )
    return value


def _check_int(name: str, value: object, most: int, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConfigurationError(f"`{name}` must be an int from {least} to {most}, got {value!r}")


def _check_bits(value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ConfigurationError(f"`bits` must be a number above 0, got {value!r}")
