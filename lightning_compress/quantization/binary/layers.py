"""Parametrizations that give a weight few values, and layers that take the signs of their inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.verbs import register_kind
from lightning_compress.quantization.binary.functions import (
    binarize_inputs,
    input_scale,
    mean_by_filter,
    random_signs,
    scaled_sign_slope,
    signs,
    straight_through,
    ternary_levels,
    ternary_scale,
)

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class FewLevels(nn.Module, ABC):
    """A parametrization that moves a weight towards few values: real at amount 0, few values alone at amount 1.

    Args:
        amount: 0 to 1, kept in a buffer.
    """

    amount: Tensor

    def __init__(self, amount: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("amount", torch.tensor(float(amount)))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight that the layer uses."""
        return torch.lerp(weight, self.few(weight), self.amount.to(weight.dtype))

    @abstractmethod
    def few(self, weight: Tensor) -> Tensor:
        """Return the few values, with a gradient for the real weight."""


class SignWeight(FewLevels):
    """-1 and +1 (BinaryConnect); in training at random if ``stochastic``, else and in evaluation by sign.

    Real weights live within ``bound`` of zero, where the sign is certain.

    >>> SignWeight()(torch.tensor([-0.2, 0.7])).tolist()
    [-1.0, 1.0]
    """

    def __init__(self, stochastic: bool = False, bound: float = 1.0, amount: float = 1.0) -> None:
        super().__init__(amount)
        self.stochastic, self.bound = stochastic, bound

    def few(self, weight: Tensor) -> Tensor:
        """Return the signs; the gradient passes as it is."""
        draw = self.stochastic and self.training
        with torch.no_grad():
            levels = random_signs(weight / self.bound) if draw else signs(weight)
        return straight_through(weight, levels)


class ScaledSignWeight(FewLevels):
    r""":math:`\alpha\,\mathrm{sign}(w)` with the mean magnitude of each filter as scale (Binary-Weight-Network).

    >>> ScaledSignWeight(filters=2)(torch.tensor([[1.0, -3.0], [0.5, 0.5]])).tolist()
    [[2.0, -2.0], [0.5, 0.5]]
    """

    def __init__(self, filters: int, groups: int = 1, transposed: bool = False, amount: float = 1.0) -> None:
        super().__init__(amount)
        self.filters, self.groups, self.transposed = filters, groups, transposed

    def few(self, weight: Tensor) -> Tensor:
        """Return the scaled signs; the gradient takes the scale along."""
        with torch.no_grad():
            scale = mean_by_filter(weight.abs(), self.groups, self.transposed)
            slope = scaled_sign_slope(weight, scale, weight.numel() // self.filters)
        return straight_through(weight, signs(weight), scale, slope)


class LossAwareWeight(FewLevels):
    r""":math:`\alpha\,\mathrm{sign}(w)` with a scale that follows the curvature of the loss, kept in a buffer."""

    scale: Tensor

    def __init__(self, scale: Tensor, amount: float = 1.0) -> None:
        super().__init__(amount)
        self.register_buffer("scale", scale.detach().clone())

    def few(self, weight: Tensor) -> Tensor:
        """Return the scaled signs; the gradient passes as it is."""
        return straight_through(weight, signs(weight), self.scale.to(weight.dtype))


class TernaryWeight(FewLevels):
    r""":math:`\alpha \cdot \{-1, 0, 1\}` with one scale for the tensor (Ternary Weight Networks).

    >>> TernaryWeight()(torch.tensor([0.1, -1.0, 0.5])).tolist()
    [0.0, -0.75, 0.75]
    """

    def __init__(self, threshold: float = 0.7, amount: float = 1.0) -> None:
        super().__init__(amount)
        self.threshold = threshold

    def few(self, weight: Tensor) -> Tensor:
        """Return the levels times the scale; the gradient passes as it is."""
        with torch.no_grad():
            levels = ternary_levels(weight, self.threshold)
            scale = ternary_scale(weight, levels)
        return straight_through(weight, levels, scale)


@register_kind("parametrize", "sign_weight")
def sign_weight(layer: nn.Module, stochastic: bool = False, bound: float = 1.0, amount: float = 1.0) -> nn.Module:
    """Build a :class:`SignWeight`."""
    return SignWeight(stochastic, bound, amount).to(_device(layer))


@register_kind("parametrize", "scaled_sign_weight")
def scaled_sign_weight(layer: nn.Module, amount: float = 1.0) -> nn.Module:
    """Build a :class:`ScaledSignWeight` for the filters of a Linear layer or a convolution."""
    if isinstance(layer, nn.Linear):
        return ScaledSignWeight(layer.out_features, amount=amount).to(_device(layer))
    convolution = cast(Any, layer)
    transposed = isinstance(layer, TRANSPOSED)
    groups = int(convolution.groups)
    return ScaledSignWeight(int(convolution.out_channels), groups, transposed, amount).to(_device(layer))


@register_kind("parametrize", "loss_aware_weight")
def loss_aware_weight(layer: nn.Module, amount: float = 1.0) -> nn.Module:
    """Build a :class:`LossAwareWeight` whose first scale is the mean magnitude, as if the curvature were even."""
    weight = cast(Tensor, layer.weight)
    return LossAwareWeight(weight.detach().abs().mean().float(), amount).to(weight.device)


@register_kind("parametrize", "ternary_weight")
def ternary_weight(layer: nn.Module, threshold: float = 0.7, amount: float = 1.0) -> nn.Module:
    """Build a :class:`TernaryWeight`."""
    return TernaryWeight(threshold, amount).to(_device(layer))


class BinaryInputs(nn.Module):
    r"""What layers have in common that take the signs of their inputs; a base beside the layer's own class.

    With ``scaled``, the output is multiplied with the mean magnitude of the inputs under the kernel, as in XNOR-Net.
    There is no way back to a plain layer: what a plain layer does with real inputs is another function.
    """

    amount: Tensor
    scaled: bool

    def take_signs(self, scaled: bool, amount: float) -> None:
        """Set up, once the layer's own constructor has run."""
        self.scaled = scaled
        self.register_buffer("amount", torch.tensor(float(amount)))

    def inputs(self, x: Tensor) -> Tensor:
        """Return the inputs as the layer takes them."""
        return torch.lerp(x, binarize_inputs(x), self.amount.to(x.dtype))

    def scaled_output(self, y: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """Return the output, scaled but for the bias."""
        factor = 1 + self.amount.to(y.dtype) * (scale - 1)
        return y * factor if bias is None else (y - bias) * factor + bias


class BinaryInputLinear(BinaryInputs, nn.Linear):
    """A Linear layer of the signs of its inputs."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to (..., in)."""
        y = super().forward(self.inputs(x))
        return self.scaled_output(y, x.abs().mean(-1, keepdim=True), self.bias) if self.scaled else y


class BinaryInputConvolution(BinaryInputs):
    """What the three convolutions of signs have in common."""

    def scales(self, x: Tensor) -> Tensor:
        """Return the scale of every output position: (batch, out, ...), or without the batch, as ``x`` is."""
        own = cast(nn.Conv2d, self)
        batch = x if x.dim() == len(own.kernel_size) + 2 else x.unsqueeze(0)
        found = input_scale(batch, own.kernel_size, own.stride, own.padding, own.dilation, own.groups)
        found = found.repeat_interleave(own.out_channels // own.groups, 1)
        return found if batch is x else found.squeeze(0)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the convolution to (batch, in, ...)."""
        own = cast(nn.Conv2d, self)
        y = super().forward(self.inputs(x))
        if not self.scaled:
            return cast(Tensor, y)
        bias = None if own.bias is None else own.bias.view(-1, *[1] * len(own.kernel_size))
        return self.scaled_output(y, self.scales(x), bias)


class BinaryInputConv1d(BinaryInputConvolution, nn.Conv1d):
    """A Conv1d of the signs of its inputs."""


class BinaryInputConv2d(BinaryInputConvolution, nn.Conv2d):
    """A Conv2d of the signs of its inputs."""


class BinaryInputConv3d(BinaryInputConvolution, nn.Conv3d):
    """A Conv3d of the signs of its inputs."""


_BINARY_INPUT: dict[type[nn.Module], type[Any]] = {
    nn.Linear: BinaryInputLinear,
    nn.Conv1d: BinaryInputConv1d,
    nn.Conv2d: BinaryInputConv2d,
    nn.Conv3d: BinaryInputConv3d,
}


def takes_signs(layer: nn.Module) -> bool:
    """Return whether a layer takes the signs of its inputs already."""
    return isinstance(layer, BinaryInputs)


def no_signs(layer: nn.Module) -> str:
    """Return why a layer cannot take the signs of its inputs; empty if it can, or does."""
    if takes_signs(layer):
        return ""
    if type(layer) not in _BINARY_INPUT:
        return f"kept: inputs of {type(layer).__name__} cannot be binarized, only those of Linear and Conv1d/2d/3d"
    mode = getattr(layer, "padding_mode", "zeros")
    return f"kept: padding_mode {mode!r}, of which XNOR-Net's scale knows only 'zeros'" if mode != "zeros" else ""


@register_kind("replace", "binary_inputs")
def binary_inputs(layer: nn.Module, scaled: bool = False, amount: float = 1.0) -> nn.Module:
    """Build the layer that takes the signs of its inputs, with the very Parameters of ``layer``."""
    why = no_signs(layer)
    if why or takes_signs(layer):
        raise ConfigurationError(why or f"{type(layer).__name__} takes the signs of its inputs already")
    cls, old = _BINARY_INPUT[type(layer)], cast(Any, layer)
    if isinstance(layer, nn.Linear):
        new = cls(layer.in_features, layer.out_features, bias=False, device="meta")
    else:
        geometry = (old.kernel_size, old.stride, old.padding, old.dilation, old.groups)
        new = cls(old.in_channels, old.out_channels, *geometry, bias=False, device="meta")
    new.weight, new.bias = old.weight, old.bias
    new.take_signs(scaled, amount)
    return cast(nn.Module, new.to(old.weight.device))


def _device(layer: nn.Module) -> torch.device:
    return cast(Tensor, layer.weight).device
