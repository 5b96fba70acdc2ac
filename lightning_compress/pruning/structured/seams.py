"""Operations that a tracer misreads: written in others that it follows, or cut out of what it sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_RESHAPES = (torch.Tensor.view, torch.Tensor.reshape, torch.reshape, torch.Tensor.unflatten, torch.unflatten)
_SHUFFLES = (F.channel_shuffle, torch.channel_shuffle, F.pixel_shuffle, torch.pixel_shuffle, F.pixel_unshuffle)


class Seams(TorchFunctionMode):
    """Lets a tracer see gates and reshapes of channels as what they are.

    A gated linear unit becomes a product of two halves, which keeps both halves alike. Where channels of images are
    shuffled or split over two dimensions (ShuffleNet, Zhang et al. 2018), the trace ends and begins anew: what goes in
    counts as an output. What lies between such seams can still be cut, and a trial tells if it really can.

    Attributes:
        ends: The tensors that went into a seam.

    >>> with Seams() as seams:
    ...     _ = F.channel_shuffle(torch.zeros(1, 4, 2, 2, requires_grad=True), 2)
    >>> len(seams.ends)
    1
    """

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``, or what stands for it."""
        kwargs = kwargs or {}
        if func is F.glu:
            return _gate(*args, **kwargs)
        if func in _SHUFFLES or func in _RESHAPES:
            return self._reshape(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _reshape(self, func: Callable[..., Tensor], tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        made = func(tensor, *args, **kwargs)
        if not made.requires_grad or (func in _RESHAPES and not _splits_channels(tensor, made)):
            return made
        self.ends.append(tensor)
        return made.detach().requires_grad_(True)


def _splits_channels(tensor: Tensor, made: Tensor) -> bool:
    """Return whether images (batch, channels, ...) become (batch, groups, channels of each, ...)."""
    if tensor.dim() < 4 or made.dim() != tensor.dim() + 1:
        return False
    return made.shape[0] == tensor.shape[0] and made.shape[3:] == tensor.shape[2:]


def _gate(input: Tensor, dim: int = -1) -> Tensor:
    value, gate = input.chunk(2, dim)
    return value * gate.sigmoid()
