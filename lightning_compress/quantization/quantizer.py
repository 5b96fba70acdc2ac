"""Modules that fake-quantize one tensor: an activation by what was observed, a weight by itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.quantization.affine import (
    affine_parameters,
    dequantize,
    fake_quantize,
    fake_quantize_inside,
    quantize,
    symmetric_scale,
)
from lightning_compress.quantization.observers import build_observer, collect
from lightning_compress.quantization.spec import QuantizerSpec
from lightning_compress.quantization.weight_ranges import peak_of, weight_range


class Quantizer(nn.Module):
    """The base: a scale and a zero point as buffers, and flags that travel in the ``state_dict``.

    Args:
        spec: Bits, symmetry, range.
        axis: Dimension with a scale for each index, for ``spec.per_channel``; else ``None``.
        size: Length of that dimension.

    Attributes:
        spec: As given.
        axis: As given.
        enabled: Whether ``forward`` quantizes, as soon as there is a range; at first not.
        observing: Whether the range still moves; at first not.
        ready: Whether there is a range.
        scale: Float, of shape () or (size,). Read it through :meth:`affine`.
        zero_point: int32, of the same shape.

    The flags are plain attributes, so that ``torch.compile`` and ``torch.export`` see constants.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, spec: QuantizerSpec, axis: int | None = None, size: int | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.axis = axis
        self.enabled = False
        self.observing = False
        self.ready = False
        shape = () if axis is None or size is None else (size,)
        self._make_scale(torch.ones(shape))
        self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int32))

    @property
    def bounds(self) -> tuple[int, int]:
        """Least and greatest integer."""
        return self.spec.bounds

    @property
    def active(self) -> bool:
        """Whether ``forward`` quantizes now."""
        return self.enabled and self.ready

    def affine(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return scale and zero point as they are used now.

        Args:
            x: The tensor to quantize; needed where the range follows it (weights).
        """
        return self.scale.detach(), self.zero_point

    def quantize(self, x: Tensor) -> Tensor:
        """Return the integers of ``x``, as int8 or uint8."""
        scale, zero_point = self.affine(x)
        return quantize(x.detach(), scale, zero_point, self.bounds, self.axis)

    def dequantize(self, q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Undo :meth:`quantize`, given what :meth:`affine` returned."""
        return dequantize(q, scale, zero_point, self.axis)

    def channel_tensors(self) -> tuple[str, ...]:
        """Return the names of the tensors with a value for each channel; none for one range of all."""
        own = [*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)]
        return tuple(name for name, tensor in own if self.axis is not None and tensor.dim() > 0)

    def set_range(self, scale: Tensor, zero_point: Tensor | int = 0) -> None:
        """Fix the range: from now on these values hold, whatever is observed."""
        with torch.no_grad():
            self.scale.copy_(scale)
            self.zero_point.copy_(torch.as_tensor(zero_point))
        self.ready, self.observing = True, False

    def remember(self) -> None:
        """Note learned values before a step of the optimizer; there are none here."""

    def keep_positive(self) -> None:
        """Move learned values that left their range back into it; there are none here."""

    def refresh(self) -> None:
        """Make scale and zero point fit the range again, should all have been averaged with others; nothing to do."""

    def get_extra_state(self) -> Tensor:
        """Return the flags, for the ``state_dict``."""
        return torch.tensor([self.enabled, self.observing, self.ready], dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the flags of a ``state_dict``."""
        self.enabled, self.observing, self.ready = (bool(flag) for flag in state.tolist())

    def extra_repr(self) -> str:
        """Return what the module shows of itself."""
        spec = self.spec
        grid = f"{spec.bits} bits, {'symmetric' if spec.symmetric else 'affine'}, {spec.range}"
        return grid + (f", axis {self.axis}" if self.axis is not None else "") + ("" if self.enabled else ", off")

    def _make_scale(self, initial: Tensor) -> None:
        self.register_buffer("scale", initial)


class ActivationQuantizer(Quantizer):
    """Quantizes what passes, in a range that an observer has found.

    While the model trains (or this module alone is in train mode, for calibration) and ``observing`` is set,
    ``forward`` notes what passes; :func:`update_ranges` turns notes into a range.

    >>> quantizer = ActivationQuantizer(QuantizerSpec(bits=2))
    >>> quantizer.enabled = quantizer.observing = True
    >>> x = torch.tensor([0.0, 1.0, 2.2, 3.0])
    >>> torch.equal(quantizer(x), x)
    True
    >>> update_ranges([quantizer])
    >>> quantizer(x)
    tensor([0., 1., 2., 3.])
    """

    def __init__(self, spec: QuantizerSpec) -> None:
        super().__init__(spec)
        self.observer = build_observer(spec)

    def forward(self, x: Tensor) -> Tensor:
        """Note ``x`` if observing; return it quantized if enabled and ready."""
        if not x.is_floating_point():
            return x
        self.note(x)
        return fake_quantize(x, self.scale, self.zero_point, self.bounds) if self.active else x

    def note(self, x: Tensor) -> Tensor:
        """Let the observer see ``x``, while observing in train mode, and return it."""
        if self.observing and self.training:
            self.observer.observe(x)
        return x

    @torch.no_grad()
    def take_range(self) -> None:
        """Set scale and zero point from the observer's range."""
        if not self.observer.ready:
            return
        low, high = self.observer.range()
        if self.spec.symmetric:
            self.scale.copy_(symmetric_scale(torch.maximum(-low, high), self.bounds))
        else:
            scale, zero_point = affine_parameters(low, high, self.bounds)
            self.scale.copy_(scale)
            self.zero_point.copy_(zero_point)
        self.ready = True

    def refresh(self) -> None:
        """Take the range again, unless that takes long: such ranges move at steps of their own."""
        if self.ready and self.observer.ready and not self.observer.costly:
            self.take_range()

    def set_extra_state(self, state: Tensor) -> None:
        """Take the flags of a ``state_dict``."""
        super().set_extra_state(state)
        self.observer.ready = self.ready


class WeightQuantizer(Quantizer):
    """Quantizes a weight on a signed grid whose range follows the weight while ``observing``, and is fixed after.

    Args:
        spec: Bits, symmetry, range.
        axis: Dimension of the output channels.
        size: Their number.

    >>> quantizer = WeightQuantizer(QuantizerSpec(3, symmetric=True, per_channel=True, range="minmax"), 0, 2)
    >>> quantizer.enabled = quantizer.observing = quantizer.ready = True
    >>> quantizer(torch.tensor([[3.0, -1.2], [0.3, 0.0]]))
    tensor([[ 3.0000, -1.0000],
            [ 0.3000,  0.0000]])
    """

    def __init__(self, spec: QuantizerSpec, axis: int | None = None, size: int | None = None) -> None:
        super().__init__(spec, axis if spec.per_channel else None, size if spec.per_channel else None)

    @property
    def follows(self) -> bool:
        """Whether the range follows the weight in every ``forward``."""
        return self.observing and self.spec.symmetric and self.spec.range in ("minmax", "moving_average")

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight quantized, if enabled."""
        if not self.active:
            return weight
        if self.follows:
            return fake_quantize_inside(weight, self.affine(weight)[0], self.axis)
        return fake_quantize(weight, self.scale, self.zero_point, self.bounds, self.axis)

    @torch.no_grad()
    def affine(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return scale and zero point; from ``x`` itself while the range follows it."""
        if x is None or not self.follows:
            return super().affine(x)
        return symmetric_scale(peak_of(x, self.axis), self.bounds), self.zero_point

    @torch.no_grad()
    def take_range(self, weight: Tensor) -> None:
        """Set scale and zero point from the weight."""
        scale, zero_point = weight_range(weight, self.spec, self.axis)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        self.ready = True


def update_ranges(quantizers: Iterable[Any], costly: bool = True) -> None:
    """Turn what activation quantizers have seen since the last call into ranges, over all processes alike.

    Args:
        quantizers: Those that observe take part; all processes must give the same ones in the same order.
        costly: Also move ranges that take long to find (percentile, least squared error).
    """
    moving = [q for q in quantizers if isinstance(q, ActivationQuantizer) and q.observing]
    with torch.no_grad():
        collect([quantizer.observer for quantizer in moving])
        for quantizer in moving:
            if costly or not quantizer.ready or not quantizer.observer.costly:
                quantizer.take_range()


def quantizers_of(module: nn.Module) -> list[Quantizer]:
    """Return all quantizers inside a module, in registration order."""
    return [part for part in module.modules() if isinstance(part, Quantizer)]
