"""The methods by name, and the one that is taken where none is named."""

from __future__ import annotations

from lightning_compress.core.errors import ConfigurationError, did_you_mean
from lightning_compress.low_rank.matrix_methods import ChannelSVD, MatrixSVD, SpatialSVD
from lightning_compress.low_rank.method import Method, Ranks
from lightning_compress.low_rank.shapes import LayerShape
from lightning_compress.low_rank.tensor_methods import CP, Tucker
from lightning_compress.low_rank.trains import TensorTrain

__all__ = ["METHODS", "Method", "Ranks", "automatic", "method_named"]

METHODS: dict[str, Method] = {
    method.name: method for method in (MatrixSVD(), ChannelSVD(), SpatialSVD(), Tucker(), CP(), TensorTrain())
}
"""The closed registry of methods."""


def method_named(name: str) -> Method:
    """Return a method.

    Raises:
        ConfigurationError: If there is none of that name; names the nearest.
    """
    if name not in METHODS:
        raise ConfigurationError(f"`method` is {name!r}: {did_you_mean(str(name), ('auto', *METHODS), limit=4)}")
    return METHODS[name]


def automatic(shape: LayerShape) -> str:
    """Return the method that makes a layer fastest on CPUs: spatial SVD for kernels, else an SVD of channels.

    >>> automatic(LayerShape("linear", 8, 8)), automatic(LayerShape("conv", 8, 8, (3, 3)))
    ('svd', 'spatial_svd')
    """
    names = ("spatial_svd", "svd", "channel_svd")
    return next((name for name in names if not METHODS[name].reason(shape)), names[-1])
