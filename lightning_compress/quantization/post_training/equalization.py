"""Cross-layer equalization: channels of consecutive layers get ranges of one size; the network computes the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_compress.core.calibration import run_on
from lightning_compress.core.copies import tensors_in
from lightning_compress.core.isolation import eval_mode
from lightning_compress.quantization.post_training.chains import Pair

_LIMIT = 256.0
"""Greatest factor by which one sweep moves a channel."""
_TOLERANCE = 1e-3
"""Greatest change of an output, as a share of the greatest output, that counts as rounding."""


def equalizing_scales(first: Tensor, second: Tensor) -> Tensor:
    r"""Return :math:`s_i = \sqrt{r_i^{(1)} / r_i^{(2)}}`, by which the first layer is divided (arXiv:1906.04721, 4.1).

    Both then have the range :math:`\sqrt{r^{(1)} r^{(2)}}` in this channel. A silent channel keeps its scale.

    Args:
        first: (channels,) greatest magnitudes of the first layer's weights for each output channel.
        second: (channels,) of the second layer's weights for each input channel.

    >>> equalizing_scales(torch.tensor([8.0, 0.0]), torch.tensor([2.0, 1.0]))
    tensor([2., 1.])
    """
    scales = torch.sqrt(first / second).clamp(1 / _LIMIT, _LIMIT)
    return torch.where((first > 0) & (second > 0), scales, 1.0)


def output_peaks(layer: nn.Module) -> Tensor:
    """Return the greatest magnitude of a weight for each output channel of a Linear or convolution layer."""
    return _weight(layer).abs().flatten(1).amax(1)


def input_view(layer: nn.Module, channels: int) -> Tensor:
    """Return a view of a weight as (groups, outputs, channels / groups, places), for each input channel.

    Args:
        layer: Linear (of flattened images: several places a channel) or convolution.
        channels: How many channels its input has.

    >>> input_view(nn.Conv2d(4, 4, 3, groups=4), 4).shape, input_view(nn.Linear(8, 3), 2).shape
    (torch.Size([4, 1, 1, 9]), torch.Size([1, 3, 2, 4]))
    """
    weight, groups = _weight(layer), getattr(layer, "groups", 1)
    return weight.view(groups, len(weight) // groups, channels // groups, -1)


def equalize_pair(first: nn.Module, second: nn.Module, norm: nn.Module | None = None) -> Tensor:
    r"""Move scales from one layer to the next, in place: rows of the first, columns of the second.

    .. math:: W^{(1)}_i \leftarrow W^{(1)}_i / s_i,\quad b_i \leftarrow b_i / s_i,\quad
              W^{(2)}_{\cdot i} \leftarrow W^{(2)}_{\cdot i}\, s_i

    With a batch norm between them the first layer's rows are free: they get one size, its statistics follow, and s goes
    into gamma and beta.

    Args:
        first: Linear or Conv1d/2d/3d.
        second: The layer behind it.
        norm: The batch norm right behind the first.

    Returns:
        (channels,), s.

    >>> first, second = nn.Linear(1, 1), nn.Linear(1, 1)
    >>> _ = first.weight.data.fill_(8.0), second.weight.data.fill_(2.0)
    >>> equalize_pair(first, second), first.weight.item(), second.weight.item()
    (tensor([2.]), 4.0, 4.0)
    """
    peaks = output_peaks(first)
    columns = input_view(second, len(peaks))
    own = torch.ones_like(peaks) if norm is None else _row_sizes(peaks)
    factor = torch.ones_like(peaks) if norm is None else _factor(norm).to(peaks)
    scales = equalizing_scales(peaks * factor.abs(), columns.abs().amax((1, 3)).flatten())
    rows = scales if norm is None else own
    _weight(first).div_(_rows_shape(rows, _weight(first)))
    if isinstance(first.bias, nn.Parameter):
        first.bias.data.div_(rows)
    if norm is not None:
        _rescale(cast(nn.BatchNorm2d, norm), own, scales)
    columns.mul_(scales.view(columns.shape[0], 1, columns.shape[2], 1))
    return scales


@torch.no_grad()
def equalize(
    model: nn.Module, layers: Mapping[str, nn.Module], pairs: Sequence[Pair], batch: Any, sweeps: int = 8
) -> dict[str, str]:
    """Equalize pairs of layers until nothing moves, in place, and keep what leaves the network's outputs as they were.

    Args:
        model: Put into evaluation mode meanwhile.
        layers: By path, at least those of the pairs.
        pairs: From :func:`~lightning_compress.quantization.post_training.chains.find_pairs`.
        batch: Calibration data on which the outputs are compared.
        sweeps: Most rounds over all pairs.

    Returns:
        Why a pair was left as it was, by the path of its second layer.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> equalize(net, dict(net.named_children()), [Pair("0", "2")], torch.randn(4, 2))
    {}
    """
    left: dict[str, str] = {}
    with eval_mode(model):
        wanted = _outputs(model, batch)
        usable: list[tuple[nn.Module, nn.Module, nn.Module | None]] = []
        for pair in pairs:
            parts = layers[pair.first], layers[pair.second], layers[pair.norm] if pair.norm else None
            reason = _unfit(*parts)
            if not reason:
                with _undoing(parts) as undo:
                    equalize_pair(*parts)
                    if not _close(_outputs(model, batch), wanted):
                        undo()
                        reason = "the network would compute something else"
            if reason:
                left[pair.second] = f"not equalized with {pair.first}: {reason}"
            else:
                usable.append(parts)
        for _ in range(sweeps - 1):
            moved = [equalize_pair(*parts) for parts in usable]
            if all(bool(((scales - 1).abs() < 0.01).all()) for scales in moved):
                break
    return left


def _unfit(first: Any, second: Any, norm: Any) -> str:
    if getattr(second, "in_channels", getattr(second, "in_features", 0)) % len(_weight(first)):
        return "its inputs are no multiple of the channels"
    if norm is not None and (norm.weight is None or norm.running_mean is None):
        return "its batch norm has no scale or no statistics"
    return ""


def _weight(layer: nn.Module) -> Tensor:
    return cast(Tensor, layer.weight).data


def _rows_shape(values: Tensor, weight: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (weight.dim() - 1))


def _row_sizes(peaks: Tensor) -> Tensor:
    """Return what to divide each row by, so that all have the mean size; silent rows stay."""
    alive = peaks > 0
    mean = peaks[alive].mean() if bool(alive.any()) else peaks.new_ones(())
    return torch.where(alive, peaks / mean, 1.0)


def _factor(norm: Any) -> Tensor:
    return cast(Tensor, norm.weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps))


def _rescale(norm: nn.BatchNorm2d, own: Tensor, scales: Tensor) -> None:
    """Let a batch norm take inputs that were divided by ``own``, and return outputs divided by ``scales``."""
    mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    factor = _factor(norm) * own / scales
    mean.div_(own)
    variance.div_(own.square())
    norm.weight.data.copy_(factor * torch.sqrt(variance.double() + norm.eps))
    norm.bias.data.div_(scales)


def _outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors_in(run_on(model, batch)) if tensor.is_floating_point()]


def _close(outputs: list[Tensor], wanted: list[Tensor]) -> bool:
    pairs = list(zip(outputs, wanted, strict=True))
    return bool(pairs) and all(float((a - b).abs().max()) <= _TOLERANCE * float(b.abs().max()) for a, b in pairs)


@contextmanager
def _undoing(parts: Sequence[nn.Module | None]) -> Any:
    """Give a function that puts the tensors of some modules back."""
    kept = [
        (t, t.detach().clone()) for part in parts if part is not None for t in part.state_dict(keep_vars=True).values()
    ]

    def undo() -> None:
        for tensor, old in kept:
            tensor.data.copy_(old)

    yield undo
