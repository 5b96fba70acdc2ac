"""Histograms over [-R, R] with R a power of two, so that widening or joining them is exact, and ranges from them."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compress.quantization.affine import affine_parameters, symmetric_scale
from lightning_compress.quantization.spec import QuantizerSpec

BINS = 8192
"""Bins of a histogram, half of them for negative values."""


def histogram(x: Tensor, reach: float) -> Tensor:
    """Return how many values of ``x`` lie in each of the :data:`BINS` bins over [-reach, reach]."""
    return torch.histc(x.detach().float(), BINS, -reach, reach)


def rebin(counts: Tensor, doublings: int) -> Tensor:
    """Return the histogram over a range that was doubled so many times: bins merge in pairs, outwards from zero.

    >>> counts = torch.zeros(BINS)
    >>> counts[BINS // 2 + 2 : BINS // 2 + 4] = 1
    >>> rebin(counts, 1)[BINS // 2 : BINS // 2 + 3]
    tensor([0., 2., 0.])
    """
    if doublings <= 0:
        return counts.clone()
    half = BINS // 2
    merged = min(2**doublings, half)
    negative, positive = counts[:half].flip(0), counts[half:]
    wide = torch.zeros_like(counts)
    wide[half : half + half // merged] = positive.reshape(-1, merged).sum(1)
    wide[half - half // merged : half] = negative.reshape(-1, merged).sum(1).flip(0)
    return wide


def centers(reach: float, like: Tensor) -> Tensor:
    """Return the middle of each bin."""
    width = 2 * reach / BINS
    return torch.arange(BINS, dtype=like.dtype, device=like.device).add_(0.5).mul_(width).sub_(reach)


def percentile_range(
    counts: Tensor, reach: float, percentile: float, extremes: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the two values beyond which lies ``100 - percentile`` per cent of the mass on either side.

    Args:
        counts: The histogram.
        reach: It covers [-reach, reach].
        percentile: Above 50, up to 100.
        extremes: Least and greatest value that was seen; the result stays within.
    """
    mass = counts.double().cumsum(0)
    edges = centers(reach, counts).double()
    outside = mass[-1] * (1 - percentile / 100)
    low = edges[torch.searchsorted(mass, outside, right=True).clamp_max(BINS - 1)]
    high = edges[torch.searchsorted(mass, mass[-1] - outside).clamp_max(BINS - 1)]
    low, high = low.to(counts.dtype), high.to(counts.dtype)
    return torch.maximum(low, extremes[0]), torch.minimum(high, extremes[1])


def squared_error_range(
    counts: Tensor, reach: float, extremes: tuple[Tensor, Tensor], spec: QuantizerSpec, tries: int = 64
) -> tuple[Tensor, Tensor]:
    r"""Return the range, shrunk by some share, with the least squared error of quantization.

    .. math:: \arg\min_\alpha \sum_i n_i\,(c_i - \hat c_i)^2 \text{ on the grid over } [\alpha\,low, \alpha\,high]

    with the centers c and counts n of the bins.

    Args:
        counts: The histogram.
        reach: It covers [-reach, reach].
        extremes: Least and greatest value that was seen.
        spec: Bits and symmetry of the grid.
        tries: Number of shares alpha, evenly spaced up to 1.
    """
    share = torch.linspace(1 / tries, 1, tries, dtype=counts.dtype, device=counts.device)
    low, high = share * extremes[0], share * extremes[1]
    if spec.symmetric:
        scale = symmetric_scale(torch.maximum(-low, high), spec.bounds)
        zero = torch.zeros_like(scale)
    else:
        scale, zero_point = affine_parameters(low, high, spec.bounds)
        zero = zero_point.to(scale.dtype)
    c = centers(reach, counts)
    q = torch.round(c / scale[:, None]).clamp(spec.bounds[0] - zero[:, None], spec.bounds[1] - zero[:, None])
    errors = ((q * scale[:, None] - c).square() * counts).sum(1)
    best = errors.argmin()
    return low[best], high[best]
