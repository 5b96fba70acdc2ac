"""Rounding of what a layer returns, and of the errors that come back to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn
from torch.autograd import Function

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.verbs import register_kind
from lightning_compress.quantization.fixed_point.functions import ROUNDINGS, FixedPoint, round_to


class _Rounded(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: FixedPoint | None, backward: FixedPoint | None, rounding: str) -> Tensor:
        ctx.form, ctx.rounding = backward, rounding
        return x.clone() if forward is None else round_to(x, forward, rounding)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None]:
        gradient = gradients[0]
        return (gradient if ctx.form is None else round_to(gradient, ctx.form, ctx.rounding)), None, None, None


class FixedPointActivation(nn.Module):
    """Round activations on their way forward and errors on their way back; in evaluation to the nearest.

    Args:
        activations: Format of activations; ``None`` leaves them as they are.
        errors: Format of the gradients by activations; ``None`` leaves them as they are.
        rounding: ``"nearest"`` or ``"stochastic"``, in training.

    >>> import torch
    >>> FixedPointActivation(FixedPoint(2, 1), None, "nearest")(torch.tensor([0.7, -9.0])).tolist()
    [0.5, -2.0]
    """

    def __init__(self, activations: FixedPoint | None, errors: FixedPoint | None, rounding: str) -> None:
        super().__init__()
        self.activations, self.errors, self.rounding = activations, errors, rounding

    def forward(self, x: Tensor) -> Tensor:
        """Return the rounded activations."""
        rounding = self.rounding if self.training else "nearest"
        return cast(Tensor, _Rounded.apply(x, self.activations, self.errors, rounding))


def has_fixed_point(layer: nn.Module) -> bool:
    """Return whether the outputs of a layer are rounded already."""
    return isinstance(dict(layer.named_children()).get("fixed_point"), FixedPointActivation)


def _round_output(layer: nn.Module, args: Any, output: Any) -> Any:
    rounded = layer.get_submodule("fixed_point")
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return (rounded(output[0]), *output[1:])
    return rounded(output) if isinstance(output, Tensor) else output


@register_kind("replace", "fixed_point_output")
def fixed_point_output(
    layer: nn.Module,
    activations: Sequence[int] | None = None,
    errors: Sequence[int] | None = None,
    rounding: str = "nearest",
) -> nn.Module:
    """Round what ``layer`` returns, in place: a child ``fixed_point`` without tensors, and a hook that calls it.

    Raises:
        ConfigurationError: If the layer has one already, or an argument is out of range.
    """
    if has_fixed_point(layer):
        raise ConfigurationError(f"{type(layer).__name__} rounds its outputs to fixed point already")
    if rounding not in ROUNDINGS:
        raise ConfigurationError(f"`rounding` must be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
    forms = [None if bits is None else FixedPoint(*bits) for bits in (activations, errors)]
    layer.add_module("fixed_point", FixedPointActivation(forms[0], forms[1], rounding).train(layer.training))
    layer.register_forward_hook(_round_output)
    return layer
