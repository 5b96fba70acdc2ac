"""Ranges of activations from calibration batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lightning_compress.core.calibration import run_on
from lightning_compress.core.isolation import eval_mode
from lightning_compress.quantization.quantizer import ActivationQuantizer, quantizers_of, update_ranges


@torch.no_grad()
def calibrate_activations(model: nn.Module, batches: Sequence[Any]) -> list[str]:
    """Let the activation quantizers of a model see batches, and quantize from then on, in ranges that no longer move.

    Args:
        model: With quantized layers; it runs in evaluation mode, and its weights as they are.
        batches: As :func:`~lightning_compress.core.calibration.run_on` takes them.

    Returns:
        Paths of quantizers that have seen nothing, and stay off.

    >>> from lightning_compress.quantization import quantize_output
    >>> net = nn.Sequential(quantize_output(nn.Identity(), bits=2, range="minmax"))
    >>> calibrate_activations(net, [torch.tensor([0.0, 3.0])]), net(torch.tensor([1.2]))
    ([], tensor([1.]))
    """
    found = {path: part for path, part in model.named_modules() if isinstance(part, ActivationQuantizer)}
    active = {part: part.enabled for part in quantizers_of(model)}
    with eval_mode(model):
        for part in active:
            part.enabled = False
        for quantizer in found.values():
            quantizer.train()
            quantizer.observing = True
        for index, batch in enumerate(batches):
            run_on(model, batch)
            update_ranges(found.values(), costly=index == len(batches) - 1)
    for part, enabled in active.items():
        part.enabled = enabled
    for quantizer in found.values():
        quantizer.observing, quantizer.enabled = False, True
    return [path for path, quantizer in found.items() if not quantizer.ready]
