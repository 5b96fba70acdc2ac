"""Histograms over [-R, R] with R a power of two, so that widening or joining them is exact, and ranges from them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_compress.quantization.affine import affine_parameters, symmetric_scale
from lightning_compress.quantization.spec import QuantizerSpec

BINS = 8192
"""Bins of a histogram, half of them for negative values."""


def histogram(x: Tensor, exponent: int | Tensor) -> Tensor:
    """Return how many values of ``x`` lie in each of the :data:`BINS` bins over [-R, R].

    Args:
        x: Any shape.
        exponent: R is two to this power.
    """
    x = x.detach().float()
    if isinstance(exponent, Tensor):
        return torch.histc(x / power_of_two(exponent), BINS, -1, 1)
    return torch.histc(x, BINS, -(2.0**exponent), 2.0**exponent)


def widened(exponent: Tensor, peak: Tensor) -> tuple[int | Tensor, bool | Tensor]:
    """Return the exponent of a range that holds ``peak`` too, and whether that is a magnitude that can be held.

    Numbers on a processor; on an accelerator, whose values would have to be waited for, tensors.

    Args:
        exponent: The range is [-R, R] with R two to this power; a scalar, int64.
        peak: A scalar.

    >>> widened(torch.tensor(1), torch.tensor(4.0)), widened(torch.tensor(1), torch.tensor(4.1))
    ((2, True), (3, True))
    """
    if peak.device.type == "cpu":
        value, least = float(peak), int(exponent)
        valid = value > 0 and math.isfinite(value)
        mantissa, needed = math.frexp(value if valid else 0.0)
        return max(needed - (mantissa == 0.5), least) if valid else least, valid
    return widened_unseen(exponent, peak)


def widened_unseen(exponent: Tensor, peak: Tensor) -> tuple[Tensor, Tensor]:
    """Do as :func:`widened` without knowing the peak."""
    valid = (peak > 0) & torch.isfinite(peak)
    mantissa, needed = torch.frexp(peak if peak.dtype == torch.float64 else peak.float())
    needed = needed.long() - (mantissa == 0.5).long()
    return torch.where(valid, torch.maximum(needed, exponent), exponent), valid


def power_of_two(exponent: Tensor) -> Tensor:
    """Return two to a power from -126 to 127, exact on every device.

    >>> power_of_two(torch.tensor([-126, 0, 10])).tolist() == [2.0**-126, 1.0, 1024.0]
    True
    """
    return (exponent.clamp(-126, 127) + 127).to(torch.int32).bitwise_left_shift(23).view(torch.float32)


def rebin(counts: Tensor, doublings: int | Tensor) -> Tensor:
    """Return the histogram over a range that was doubled so many times: bins merge in pairs, outwards from zero.

    >>> counts = torch.zeros(BINS)
    >>> counts[BINS // 2 + 2 : BINS // 2 + 4] = 1
    >>> rebin(counts, 1)[BINS // 2 : BINS // 2 + 3]
    tensor([0., 2., 0.])
    """
    if isinstance(doublings, Tensor):
        return rebin_unseen(counts, doublings)
    if doublings <= 0:
        return counts.clone()
    half = BINS // 2
    merged = min(2**doublings, half)
    negative, positive = counts[:half].flip(0), counts[half:]
    wide = torch.zeros_like(counts)
    wide[half : half + half // merged] = positive.reshape(-1, merged).sum(1)
    wide[half - half // merged : half] = negative.reshape(-1, merged).sum(1).flip(0)
    return wide


def rebin_unseen(counts: Tensor, doublings: Tensor) -> Tensor:
    """Do as :func:`rebin` without knowing how many doublings there are."""
    half = BINS // 2
    outwards = torch.arange(half, device=counts.device) >> doublings.clamp(0, half.bit_length() - 1)
    places = torch.cat([half - 1 - outwards.flip(0), half + outwards])
    return torch.zeros_like(counts).index_add_(0, places, counts)


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
