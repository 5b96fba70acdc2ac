"""How many bits shared weights take: the survey's compression rate, and the entropy that a coder comes near to."""

from __future__ import annotations

import math

from torch import Tensor

from lightning_compress.core.errors import ConfigurationError


def sharing_rate(weights: int, clusters: int, bits: int = 32) -> float:
    r"""Return the compression rate of weight sharing with a codebook (survey arXiv:1710.09282, section III).

    .. math:: r = \frac{n b}{n \log_2 k + k b}

    n connections of b bits become n indices of :math:`\log_2 k` bits and k shared weights of b bits. Entropy coding of
    the indices and leaving out zeros are not in it.

    Args:
        weights: n, at least 1.
        clusters: k, at least 1.
        bits: b, bits of an unshared weight.

    Raises:
        ConfigurationError: For a value below 1.

    >>> sharing_rate(16, 4)  # the example of Deep Compression: 16 * 32 / (16 * 2 + 4 * 32)
    3.2
    """
    for name, value in (("weights", weights), ("clusters", clusters), ("bits", bits)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigurationError(f"`{name}` must be an int >= 1, got {value!r}")
    return weights * bits / (weights * math.log2(clusters) + clusters * bits)


def entropy_bits(counts: Tensor) -> float:
    r"""Return the entropy :math:`-\sum_k p_k \log_2 p_k` of symbols that occur so often, in bits a symbol.

    Args:
        counts: How often each occurs, at least 0, (k,).

    >>> import torch
    >>> entropy_bits(torch.tensor([2, 1, 1, 0]))
    1.5
    """
    seen = counts[counts > 0].double()
    if len(seen) < 2:
        return 0.0
    share = seen / seen.sum()
    return float(-(share * share.log2()).sum())
