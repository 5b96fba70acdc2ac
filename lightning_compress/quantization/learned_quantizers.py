"""Quantizers whose range is a parameter: there before optimizers are, and set when quantization begins."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from lightning_compress.quantization.affine import SMALLEST_SCALE, affine_parameters, exact, quantize, symmetric_scale
from lightning_compress.quantization.learned import (
    attach,
    learned_affine,
    learned_bound,
    learned_step,
    learned_weight_step,
    tanh_weight,
    zero_point_of,
)
from lightning_compress.quantization.observers import MagnitudeObserver
from lightning_compress.quantization.quantizer import ActivationQuantizer, WeightQuantizer
from lightning_compress.quantization.weight_ranges import rows_of

MOST = 0.1
"""By how much, as a share, one step of an optimizer may move a scale or a bound.

SGD hardly ever asks for more. Adam moves every parameter by about its learning rate, however small that parameter is:
one step could make a scale of 0.004 zero, and all that it quantizes with it.
"""


class LearnedWeight(WeightQuantizer):
    r"""LSQ for a weight: ``scale`` is a parameter, from :math:`2\,\mathrm{mean}|w| / \sqrt{q_{max}}` on."""

    _before: Tensor | None = None

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight quantized, if enabled."""
        if not self.active:
            return attach(weight, self.scale)
        return learned_weight_step(weight, self.scale, self.bounds, self.axis)

    @property
    def follows(self) -> bool:
        """Never: the range is learned."""
        return False

    @torch.no_grad()
    def take_range(self, weight: Tensor) -> None:
        """Set the first step size from the weight, unless there is one."""
        if not self.ready:
            self.estimate(weight)
            self.ready = True

    @torch.no_grad()
    def estimate(self, weight: Tensor) -> None:
        """Set the step size from the weight, so that an average of it begins where it will."""
        mean = rows_of(weight, self.axis).abs().mean(1)
        scale = (2 * mean / math.sqrt(self.bounds[1])).clamp_min(SMALLEST_SCALE)
        self.scale.copy_(scale if self.axis is not None else scale[0])

    def remember(self) -> None:
        """Note the scale before a step of the optimizer."""
        self._before = self.scale.detach().clone()

    @torch.no_grad()
    def keep_positive(self) -> None:
        """Let a step of the optimizer move the scale by a tenth at most, and never below zero."""
        keep_near(self.scale, self._before)
        self._before = None

    def _make_scale(self, initial: Tensor) -> None:
        self.scale = nn.Parameter(initial)


class TanhWeight(WeightQuantizer):
    """DoReFa for a weight; ``narrow=False`` gives the paper's grid, which has no zero."""

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight squeezed and quantized, if enabled."""
        return tanh_weight(weight, self.spec.bits, self.spec.narrow) if self.active else weight

    @property
    def follows(self) -> bool:
        """Always in a way: the range is that of the tanh."""
        return False

    def affine(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the scale of the squeezed weight."""
        greatest = self.bounds[1] if self.spec.narrow else 2**self.spec.bits - 1
        return torch.full_like(self.scale, 1 / greatest), self.zero_point

    @torch.no_grad()
    def quantize(self, x: Tensor) -> Tensor:
        """Return the integers of the squeezed weight; all odd on the grid without a zero."""
        scale, zero_point = self.affine(x)
        return quantize(tanh_weight(x, self.spec.bits, self.spec.narrow), scale, zero_point, (-128, 127))

    @torch.no_grad()
    def take_range(self, weight: Tensor) -> None:
        """Be ready: the range is given."""
        self.scale.copy_(self.affine()[0])
        self.ready = True


class LearnedActivation(ActivationQuantizer):
    """LSQ for an activation: ``scale`` is a parameter, and the zero point stays as it was found at the start.

    Inputs that were never negative get the unsigned grid of the paper; others a zero point in proportion.
    """

    _before: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Note ``x`` while waiting for the start; return it quantized after."""
        if not x.is_floating_point():
            return x
        if not self.active:
            return attach(self.note(x), *self.parameters(recurse=False))
        return self.learned(x)

    def learned(self, x: Tensor) -> Tensor:
        """Return ``x`` quantized."""
        return learned_step(x, self.scale, self.zero_point, self.bounds)

    @torch.no_grad()
    def take_range(self) -> None:
        """Set the first values from what was observed, unless quantization has begun."""
        if self.observer.ready and not self.active:
            observer = cast(MagnitudeObserver, self.observer)
            self.start(observer.low, observer.high, observer.magnitude)
            self.ready = True

    def start(self, low: Tensor, high: Tensor, magnitude: Tensor) -> None:
        """Set the first values: :func:`first_step` and the zero point of the observed range."""
        scale, zero_point = self.first_step(low, high, magnitude)
        self.zero_point.copy_(zero_point)
        self.scale.copy_(scale)

    def first_step(self, low: Tensor, high: Tensor, magnitude: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return :math:`2\,\mathrm{mean}|x| / \sqrt{p}`, but no more than covers the range, and the zero point."""
        if self.spec.symmetric:
            covering, zero_point = symmetric_scale(torch.maximum(-low, high), self.bounds), self.zero_point
        else:
            covering, zero_point = affine_parameters(low, high, self.bounds)
        reach = torch.maximum(self.bounds[1] - zero_point, zero_point - self.bounds[0])
        scale = torch.minimum(2 * magnitude / reach.sqrt(), covering)
        return scale.clamp_min(SMALLEST_SCALE), zero_point

    def remember(self) -> None:
        """Note the learned size before a step of the optimizer."""
        self._before = self.learned_size().detach().clone()

    @torch.no_grad()
    def keep_positive(self) -> None:
        """Let a step of the optimizer move the learned size by a tenth at most, and never below zero."""
        keep_near(self.learned_size(), self._before)
        self._before = None

    def learned_size(self) -> Tensor:
        """Return the parameter that is a size: the step."""
        return self.scale

    @torch.no_grad()
    def refresh(self) -> None:
        """Set the zero point, which is fixed once quantization has begun, from the range that was observed before."""
        if self.ready and self.observer.ready:
            self.zero_point.copy_(self.zero_point_in(self.observer.low, self.observer.high))

    def zero_point_in(self, low: Tensor, high: Tensor) -> Tensor:
        """Return the zero point for a range."""
        return self.zero_point if self.spec.symmetric else affine_parameters(low, high, self.bounds)[1]

    def _make_scale(self, initial: Tensor) -> None:
        self.scale = nn.Parameter(initial)


class LearnedAffineActivation(LearnedActivation):
    """LSQ+ for an activation: ``scale`` and ``offset`` are parameters."""

    offset: Tensor

    def learned(self, x: Tensor) -> Tensor:
        """Return ``x`` quantized."""
        return learned_affine(x, self.scale, self.offset, self.bounds)

    def affine(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return scale and zero point as they are used now."""
        return self.scale.detach(), zero_point_of(self.scale.detach(), self.offset.detach(), self.bounds)

    def start(self, low: Tensor, high: Tensor, magnitude: Tensor) -> None:
        """Set step and offset to those that cover the range that was observed."""
        scale, zero_point = affine_parameters(low, high, self.bounds)
        self.scale.copy_(scale)
        self.offset.copy_((self.bounds[0] - zero_point) * scale)

    @torch.no_grad()
    def keep_positive(self) -> None:
        """Keep the scale above zero and the offset at most zero, so that zero stays within."""
        super().keep_positive()
        self.offset.clamp_(max=0)

    def _make_scale(self, initial: Tensor) -> None:
        super()._make_scale(initial)
        self.offset = nn.Parameter(torch.zeros_like(initial))


class LearnedBoundActivation(LearnedActivation):
    """PACT for an activation: ``bound`` is a parameter, from the greatest value that was observed on.

    Inputs that were never negative are clipped to [0, bound], others to [-bound, bound].
    """

    bound: Tensor

    @property
    def scale(self) -> Tensor:  # type: ignore[override]  # a buffer of the base; here it follows from the bound
        """The step size that follows from the bound."""
        return exact(self.bound.detach()) / (self.bounds[1] - self.zero_point)

    def learned(self, x: Tensor) -> Tensor:
        """Return ``x`` quantized."""
        return learned_bound(x, self.bound, self.zero_point, self.bounds)

    def affine(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return scale and zero point as they are used now."""
        return self.scale, self.zero_point

    def set_range(self, scale: Tensor, zero_point: Tensor | int = 0) -> None:
        """Fix the range by its step size."""
        with torch.no_grad():
            self.zero_point.copy_(torch.as_tensor(zero_point))
            self.bound.copy_(scale * (self.bounds[1] - self.zero_point))
        self.ready, self.observing = True, False

    def start(self, low: Tensor, high: Tensor, magnitude: Tensor) -> None:
        """Set the bound to the greatest magnitude that was observed."""
        self.zero_point.copy_(self.zero_point_in(low, high))
        self.bound.copy_(torch.maximum(-low, high).clamp_min(SMALLEST_SCALE))

    def zero_point_in(self, low: Tensor, high: Tensor) -> Tensor:
        """Return the zero point for a range: 0, or the middle if there were negative values."""
        middle = (self.bounds[0] + self.bounds[1] + 1) // 2
        negative = low < -1e-6 * high.abs()
        return self.zero_point if self.spec.symmetric else torch.where(negative, middle, 0).to(torch.int32)

    def learned_size(self) -> Tensor:
        """Return the parameter that is a size: the bound."""
        return self.bound

    def _make_scale(self, initial: Tensor) -> None:
        self.bound = nn.Parameter(initial)


def keep_near(parameter: Tensor, before: Tensor | None) -> None:
    """Move a positive parameter back to within :data:`MOST` of what it was before, if that is known; in place.

    >>> scale = torch.tensor(-0.006)
    >>> keep_near(scale, torch.tensor(0.004))
    >>> round(scale.item(), 4)
    0.0036
    """
    if before is not None:
        parameter.clamp_(before * (1 - MOST), before * (1 + MOST))
    parameter.clamp_(min=SMALLEST_SCALE)
