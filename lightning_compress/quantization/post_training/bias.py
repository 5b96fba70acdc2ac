"""Bias correction: a quantized layer gets back the mean output that it had in float."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.core.calibration import run_on
from lightning_compress.core.isolation import eval_mode

Means = Mapping[str, Sequence[Tensor]]
"""For each layer the mean output of each channel, once for each call."""


def channel_means(layer: nn.Module, output: Tensor) -> Tensor:
    """Return the mean of each channel of a layer's output, in float64.

    >>> channel_means(nn.Conv1d(1, 2, 1), torch.tensor([[[1.0, 3.0], [0.0, 1.0]]])).tolist()
    [2.0, 0.5]
    """
    return output.detach().double().movedim(_channels(layer, output), 0).flatten(1).mean(1)


@torch.no_grad()
def output_means(model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Any]) -> dict[str, list[Tensor]]:
    """Return the mean output of each channel of the layers, for each call; layers that are never called are missing.

    Args:
        model: Put into evaluation mode meanwhile.
        layers: Linear and convolution layers of it, by path.
        batches: Calibration data.

    >>> net = nn.Sequential(nn.Linear(1, 1, bias=False))
    >>> _ = net[0].weight.data.fill_(2.0)
    >>> float(output_means(net, {"0": net[0]}, [torch.tensor([[1.0], [2.0]])])["0"][0])
    3.0
    """
    means: dict[str, list[Tensor]] = {}

    def note(path: str, layer: nn.Module, output: Tensor) -> None:
        means.setdefault(path, []).append(channel_means(layer, output))

    _run_watched(model, layers, batches, note)
    return means


@torch.no_grad()
def bias_shifts(
    model: nn.Module, layers: Mapping[str, nn.Module], wanted: Means, batches: Iterable[Any]
) -> dict[str, Tensor]:
    r"""Return what to add to each layer's output: :math:`E[y] - E[\hat y]` (Nagel et al. 2019, arXiv:1906.04721, 4.2).

    One pass does: each call is corrected on the way, so that later layers see inputs that are right in the mean; what
    is returned is the mean over the calls.

    Args:
        model: The quantized network, put into evaluation mode meanwhile.
        layers: Layers of it to correct, by path.
        wanted: From :func:`output_means` of the same network in float, on the same batches.
        batches: Calibration data.

    Returns:
        (channels,) for each layer, in float64.
    """
    shifts: dict[str, list[Tensor]] = {}

    def correct(path: str, layer: nn.Module, output: Tensor) -> Tensor:
        calls = shifts.setdefault(path, [])
        calls.append(wanted[path][len(calls)] - channel_means(layer, output))
        shape = [1] * output.dim()
        shape[_channels(layer, output)] = -1
        return output + calls[-1].to(output.dtype).reshape(shape)

    _run_watched(model, {path: layer for path, layer in layers.items() if path in wanted}, batches, correct)
    return {path: torch.stack(calls).mean(0) for path, calls in shifts.items()}


def shift_output(layer: nn.Module, norm: nn.Module | None, shift: Tensor) -> bool:
    """Add a shift to a layer's output: to its bias, or by the running mean of the batch norm that alone follows it.

    Returns:
        Whether there was a place for it.

    >>> layer = nn.Linear(1, 1)
    >>> before = layer.bias.item()
    >>> shift_output(layer, None, torch.tensor([0.5])), round(layer.bias.item() - before, 4)
    (True, 0.5)
    """
    bias, mean = getattr(layer, "bias", None), getattr(norm, "running_mean", None)
    if isinstance(bias, nn.Parameter):
        bias.data.add_(shift.to(bias.dtype))
        return True
    if isinstance(mean, Tensor):
        mean.sub_(shift.to(mean.dtype))
        return True
    return False


def _channels(layer: nn.Module, output: Tensor) -> int:
    """Return the dimension of an output that counts channels."""
    kernel = getattr(layer, "kernel_size", None)
    return output.dim() - 1 if kernel is None else output.dim() - 1 - len(kernel)


def _run_watched(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Any], see: Callable[..., Any]
) -> None:
    def watch(path: str) -> Callable[..., Any]:
        return lambda layer, args, output: see(path, layer, output)

    with ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        for path, layer in layers.items():  # before a quantizer of the output, which is a hook too
            stack.callback(layer.register_forward_hook(watch(path), prepend=True).remove)
        for batch in batches:
            run_on(model, batch)
