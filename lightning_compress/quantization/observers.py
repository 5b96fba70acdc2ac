"""Observers: what range the values of a tensor take, over the steps of a training and over its processes.

In ``forward`` an observer only notes extremes (or a histogram) of what passes; :func:`collect` joins the notes of all
processes once a step and moves the range. So a step costs one pass over each tensor, and every process quantizes alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, distributed, nn

from lightning_compress.quantization.histogram import (
    BINS,
    histogram,
    percentile_range,
    rebin,
    squared_error_range,
    widened,
)
from lightning_compress.quantization.spec import FIXED, QuantizerSpec


class Observer(nn.Module):
    """The range of all that was seen.

    Args:
        spec: Of the quantizer it works for.

    Attributes:
        low, high: The range so far; scalars, part of the ``state_dict``.
        seen_low, seen_high: Extremes since the last :func:`collect`; infinite where nothing was seen.

    >>> observer = Observer(QuantizerSpec())
    >>> observer.observe(torch.tensor([-1.0, 3.0]))
    >>> collect([observer])
    >>> observer.low, observer.high
    (tensor(-1.), tensor(3.))
    """

    low: Tensor
    high: Tensor
    seen_low: Tensor
    seen_high: Tensor
    costly = False
    """Whether :meth:`range` takes too long for every step."""

    def __init__(self, spec: QuantizerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.register_buffer("seen_low", torch.tensor(math.inf), persistent=False)
        self.register_buffer("seen_high", torch.tensor(-math.inf), persistent=False)
        self.ready = False

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Note the extremes of ``x``."""
        if x.numel():
            self.seen_low.copy_(torch.minimum(self.seen_low, x.amin().to(self.seen_low.dtype)))
            self.seen_high.copy_(torch.maximum(self.seen_high, x.amax().to(self.seen_high.dtype)))

    def range(self) -> tuple[Tensor, Tensor]:
        """Return least and greatest value to represent."""
        return self.low, self.high

    def merge(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return the range after a step with these extremes, which are finite; the first step replaces it."""
        return torch.minimum(self.low, low), torch.maximum(self.high, high)

    def take(self, extremes: Tensor) -> None:
        """Move the range by the extremes (-low, high) of all processes, unless there are none or they overflowed."""
        low, high = -extremes[0].to(self.low.dtype), extremes[1].to(self.high.dtype)
        valid = torch.isfinite(extremes).all()
        new = (low, high) if not self.ready else self.merge(low, high)
        self.low.copy_(torch.where(valid, new[0], self.low))
        self.high.copy_(torch.where(valid, new[1], self.high))
        if not self.ready:
            self.ready = bool(valid)
        self.seen_low.fill_(math.inf)
        self.seen_high.fill_(-math.inf)


class MovingAverage(Observer):
    r"""Extremes of each step, averaged: :math:`r \leftarrow (1 - m)\, r + m\, r_{step}` (Jacob et al. 2018, 3.1)."""

    def merge(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Move towards the step's extremes by the share ``spec.momentum``."""
        return torch.lerp(self.low, low, self.spec.momentum), torch.lerp(self.high, high, self.spec.momentum)


class MagnitudeObserver(MovingAverage):
    """A moving average of the extremes, and the mean magnitude, from which learned ranges begin."""

    magnitude: Tensor
    seen_sum: Tensor

    def __init__(self, spec: QuantizerSpec) -> None:
        super().__init__(spec)
        self.register_buffer("magnitude", torch.zeros(()))
        self.register_buffer("seen_sum", torch.zeros(2), persistent=False)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Note extremes, and the sum of magnitudes."""
        super().observe(x)
        self.seen_sum[0] += x.abs().sum(dtype=self.seen_sum.dtype)
        self.seen_sum[1] += x.numel()

    def take(self, extremes: Tensor) -> None:
        """Move range and magnitude by what all processes have seen."""
        first, total = not self.ready, self.seen_sum.clone()
        super().take(extremes)
        if _many():
            distributed.all_reduce(total)
        mean = total[0] / total[1].clamp_min(1)
        moved = mean if first else torch.lerp(self.magnitude, mean.to(self.magnitude.dtype), self.spec.momentum)
        self.magnitude.copy_(torch.where(torch.isfinite(mean) & (total[1] > 0), moved, self.magnitude))
        self.seen_sum.zero_()


class HistogramObserver(Observer):
    """A histogram of all that was seen, whose range doubles when a value falls outside."""

    counts: Tensor
    exponent: Tensor
    seen_counts: Tensor
    seen_exponent: Tensor
    costly = True

    def __init__(self, spec: QuantizerSpec) -> None:
        super().__init__(spec)
        self.register_buffer("counts", torch.zeros(BINS))
        self.register_buffer("exponent", torch.tensor(_EMPTY))
        self.register_buffer("seen_counts", torch.zeros(BINS), persistent=False)
        self.register_buffer("seen_exponent", torch.tensor(_EMPTY), persistent=False)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Count the values of ``x``; a tensor that holds infinities or NaN is not counted."""
        super().observe(x)
        exponent, valid = widened(self.seen_exponent, x.abs().amax()) if x.numel() else (0, False)
        if valid is not False:  # unknown on an accelerator
            counts = histogram(x, exponent)
            self.seen_counts.copy_(rebin(self.seen_counts, exponent - _known(self.seen_exponent)))
            self.seen_counts.add_(counts.masked_fill_(~valid, 0) if isinstance(valid, Tensor) else counts)
            self.seen_exponent.fill_(exponent)

    def take(self, extremes: Tensor) -> None:
        """Add the step's counts of all processes to the histogram."""
        super().take(extremes)
        exponent, valid = widened(self.exponent, extremes.max())
        if valid is not False:
            seen = rebin(self.seen_counts, exponent - _known(self.seen_exponent))
            if _many():
                distributed.all_reduce(seen)
            seen = seen.masked_fill_(~valid, 0) if isinstance(valid, Tensor) else seen
            self.counts.copy_(rebin(self.counts, exponent - _known(self.exponent)).add_(seen))
            self.exponent.fill_(exponent)
        self.seen_counts.zero_()
        self.seen_exponent.fill_(_EMPTY)

    def merge(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the extremes of all that was seen."""
        return torch.minimum(self.low, low), torch.maximum(self.high, high)


class Percentile(HistogramObserver):
    """The range without the tails beyond a percentile on either side."""

    def range(self) -> tuple[Tensor, Tensor]:
        """Return the two percentiles, exact to the width of a bin."""
        return percentile_range(self.counts, 2.0 ** int(self.exponent), self.spec.percentile, (self.low, self.high))


class LeastSquaredError(HistogramObserver):
    """The range, shrunk on both sides, that quantizes the histogram with the least squared error."""

    def range(self) -> tuple[Tensor, Tensor]:
        """Return the best of 64 shrunk ranges."""
        return squared_error_range(self.counts, 2.0 ** int(self.exponent), (self.low, self.high), self.spec)


def collect(observers: Sequence[Observer]) -> None:
    """Let each observer take what it and its likes on the other processes have seen since the last call.

    Every process must call it with its observers in the same order; one reduction carries the extremes of all.

    Args:
        observers: Of any model.
    """
    if not observers:
        return
    extremes = torch.stack([torch.stack([-o.seen_low, o.seen_high]) for o in observers])
    if _many():
        distributed.all_reduce(extremes, op=distributed.ReduceOp.MAX)
    for observer, seen in zip(observers, extremes, strict=True):
        observer.take(seen)


def build_observer(spec: QuantizerSpec) -> Observer:
    """Return an observer for ``spec.range``; learned ranges begin from a moving average and a mean magnitude.

    >>> type(build_observer(QuantizerSpec(range="mse"))).__name__
    'LeastSquaredError'
    """
    return _OBSERVERS.get(spec.range, MagnitudeObserver)(spec)


_EMPTY = -126
_OBSERVERS: dict[str, Callable[[QuantizerSpec], Observer]] = {
    "minmax": Observer,
    "moving_average": MovingAverage,
    "percentile": Percentile,
    "mse": LeastSquaredError,
    FIXED: Observer,
}


def _known(exponent: Tensor) -> int | Tensor:
    """Return a number, unless an accelerator would have to be waited for."""
    return int(exponent) if exponent.device.type == "cpu" else exponent


def _many() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
