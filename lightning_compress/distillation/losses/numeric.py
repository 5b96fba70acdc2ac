"""Arithmetic that distillation losses share: enough precision, masked classes, empty batches."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import ParamSpec

import torch
from torch import Tensor

from lightning_compress.core.copies import tensors_in
from lightning_compress.core.errors import ConfigurationError, did_you_mean
from lightning_compress.core.isolation import map_tensors

_P = ParamSpec("_P")


def widen(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in float32 if it is a narrower float, otherwise as it is.

    >>> widen(torch.zeros(1, dtype=torch.bfloat16)).dtype, widen(torch.zeros(1, dtype=torch.float64)).dtype
    (torch.float32, torch.float64)
    """
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() < 4 else tensor


def full_precision(function: Callable[_P, Tensor]) -> Callable[_P, Tensor]:
    """Let ``function`` compute in at least float32, also inside autocast: half-precision tensors are widened first.

    >>> full_precision(torch.mean)(torch.full((4,), 60000.0, dtype=torch.float16))
    tensor(60000.)
    """

    @functools.wraps(function)
    def precise(*args: _P.args, **kwargs: _P.kwargs) -> Tensor:
        device = next((tensor.device.type for tensor in tensors_in((args, kwargs))), "cpu")
        args, kwargs = map_tensors(widen, args), map_tensors(widen, kwargs)
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return precise


def mean_or_zero(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean of ``values`` where ``mask`` is true; 0, still in the graph, if there are none.

    >>> mean_or_zero(torch.tensor([1.0, 3.0])), mean_or_zero(torch.zeros(0))
    (tensor(2.), tensor(0.))
    >>> mean_or_zero(torch.tensor([1.0, torch.nan]), torch.tensor([True, False]))
    tensor(1.)
    """
    if mask is None:
        return values.sum() / max(values.numel(), 1)
    return values.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)


def divergence_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    r"""Return :math:`p (\log p - \log q)`, with 0 where :math:`p = 0`, and a gradient that is finite there.

    Args:
        log_p: Logarithms of probabilities, any shape; may hold minus infinity.
        log_q: The same; infinite where :math:`p > 0` gives an infinite term.

    >>> zero = torch.tensor([0.0, -torch.inf])
    >>> divergence_terms(zero, zero), divergence_terms(zero, torch.tensor([0.5, 0.5]).log())
    (tensor([0., 0.]), tensor([0.6931, 0.0000]))
    """
    p = log_p.exp()
    gone = p == 0
    return p * (log_p.masked_fill(gone, 0) - log_q.masked_fill(gone, 0))


def unit(vectors: Tensor) -> Tensor:
    """Return ``vectors`` divided by their length along the last dimension; a zero vector stays, with gradient 0.

    >>> unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    size = vectors.detach().abs().amax(-1, keepdim=True) if vectors.shape[-1] else vectors.detach().sum(-1, True)
    scaled = vectors / torch.where(size > 0, size, 1)  # so that squares neither overflow nor vanish
    square = scaled.square().sum(-1, keepdim=True)
    return scaled * torch.where(square > 0, square, 1).rsqrt()


def check_same(student: Tensor, teacher: Tensor, name: str) -> None:
    """Refuse tensors of different shapes.

    Raises:
        ConfigurationError: With both shapes and the next step.
    """
    if student.shape != teacher.shape:
        raise ConfigurationError(
            f"`{name}` compares tensors of one shape; the student's is {tuple(student.shape)} and the teacher's "
            f"{tuple(teacher.shape)}; give both the same batch, and match features with an adapter (`loss.adapt`)"
        )


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that is not a finite number above 0.

    Raises:
        ConfigurationError: With the value.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ConfigurationError(f"`temperature` must be a finite number above 0; got {temperature!r}")


def check_range(name: str, value: float, low: float, high: float = math.inf, open_low: bool = False) -> None:
    """Refuse what is no finite number in ``[low, high]``, or ``(low, high]`` if ``open_low``.

    Raises:
        ConfigurationError: With the range and the value.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    inside = number and (low < value if open_low else low <= value) and value <= high and not math.isinf(value)
    if not inside:
        above = f"above {low}" if open_low else f"at least {low}"
        raise ConfigurationError(
            f"`{name}` must be {above}{'' if math.isinf(high) else f' and at most {high}'}; got {value!r}"
        )


def check_integer(name: str, value: int | None, low: int | None = None) -> None:
    """Refuse what is no integer of at least ``low``; ``None`` passes.

    Raises:
        ConfigurationError: With the value.
    """
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or (low is not None and value < low):
        raise ConfigurationError(
            f"`{name}` must be an integer{'' if low is None else f', at least {low}'}; got {value!r}"
        )


def check_word(name: str, word: str, words: tuple[str, ...]) -> None:
    """Refuse a word that is not among ``words``.

    Raises:
        ConfigurationError: With the nearest.
    """
    if word not in words:
        raise ConfigurationError(f"`{name}` is {word!r}: {did_you_mean(str(word), words)}")


def check_channel_dim(channel_dim: int) -> None:
    """Refuse a place of the channels other than second or last.

    Raises:
        ConfigurationError: With the value.
    """
    if channel_dim not in (1, -1):
        raise ConfigurationError(
            f"`channel_dim` must be 1 for (N, C, ...) or -1 for tokens (N, L, C) and channels-last maps; got "
            f"{channel_dim!r}"
        )
