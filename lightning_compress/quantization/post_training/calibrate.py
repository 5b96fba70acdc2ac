"""Ranges of activations from calibration batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lightning_compress.core.calibration import run_on
from lightning_compress.core.isolation import eval_mode
from lightning_compress.core.paths import clean_path
from lightning_compress.quantization.observers import build_observer
from lightning_compress.quantization.quantizer import ActivationQuantizer, quantizers_of, update_ranges
from lightning_compress.quantization.sites import Sites
from lightning_compress.quantization.spec import FIXED, QuantizerSpec


@torch.no_grad()
def calibrate_activations(
    model: nn.Module, batches: Sequence[Any], specs: Mapping[str, QuantizerSpec] | None = None
) -> list[str]:
    """Let the activation quantizers of a model see batches, and quantize from then on, in ranges that no longer move.

    What observes lives no longer than this call: histograms take more memory than the ranges that are read from them.

    Args:
        model: With quantized layers; it runs in evaluation mode, and its weights as they are.
        batches: As :func:`~lightning_compress.core.calibration.run_on` takes them.
        specs: By path, how a quantizer's range is found; by default as its own spec says.

    Returns:
        Paths of quantizers that have seen nothing, and stay off.

    >>> from lightning_compress.quantization import quantize_output
    >>> net = nn.Sequential(quantize_output(nn.Identity(), bits=2, range="minmax"))
    >>> calibrate_activations(net, [torch.tensor([0.0, 3.0])]), net(torch.tensor([1.2]))
    ([], tensor([1.]))
    """
    found = {path: part for path, part in model.named_modules() if isinstance(part, ActivationQuantizer)}
    kept = {path: quantizer.observer for path, quantizer in found.items()}
    active = {part: part.enabled for part in quantizers_of(model)}
    try:
        for path, quantizer in found.items():
            wanted = (specs or {}).get(clean_path(path), quantizer.spec)
            quantizer.observer = build_observer(wanted).to(quantizer.scale.device)
        with eval_mode(model):
            for part in active:
                part.enabled = False
            for quantizer in found.values():
                quantizer.train()
                quantizer.observing = True
            for index, batch in enumerate(batches):
                run_on(model, batch)
                update_ranges(found.values(), costly=index == len(batches) - 1)
        for path, quantizer in found.items():
            for mine, seen in zip((kept[path].low, kept[path].high), quantizer.observer.range(), strict=True):
                mine.copy_(seen)
            kept[path].ready = quantizer.observer.ready
    finally:
        for path, quantizer in found.items():
            quantizer.observer = kept[path]
    for part, enabled in active.items():
        part.enabled = enabled
    for quantizer in found.values():
        quantizer.observing, quantizer.enabled = False, True
    return [path for path, quantizer in found.items() if not quantizer.ready]


def calibrated_sites(sites: Sites) -> tuple[Sites, dict[str, QuantizerSpec]]:
    """Return the same places with fixed ranges, and by the path of each quantizer how its range is found.

    >>> fixed, specs = calibrated_sites(Sites(outputs={"pool": QuantizerSpec(range="mse")}))
    >>> fixed.outputs["pool"].range, specs["pool.output_quantizer"].range
    ('fixed', 'mse')
    """
    specs = {f"{path}.output_quantizer": spec for path, spec in sites.outputs.items()}
    for path, slots in sites.inputs.items():
        specs |= {f"{path}.{slot}_quantizer": spec for slot, spec in slots.items()}
    inputs = {path: {slot: _fixed(spec) for slot, spec in slots.items()} for path, slots in sites.inputs.items()}
    outputs = {path: _fixed(spec) for path, spec in sites.outputs.items()}
    return replace(sites, inputs=inputs, outputs=outputs), specs


def _fixed(spec: QuantizerSpec) -> QuantizerSpec:
    return replace(spec, range=FIXED)
