"""A model's structure without its weights: kept while a model is compressed, so that the two can be compared later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.core.copies import structure_copy
from lightning_compress.core.errors import ArtifactError, ConfigurationError
from lightning_compress.core.files import load_tensors
from lightning_compress.core.hooks import install_hooks
from lightning_compress.core.inputs import example_in
from lightning_compress.core.isolation import batch_size_of
from lightning_compress.core.latency import batch_of
from lightning_compress.evaluation.measurement import Measurement


def take_skeleton(model: nn.Module) -> nn.Module:
    """Return a copy with parameters on the ``meta`` device, which take no memory, and real copies of the buffers.

    >>> skeleton = take_skeleton(nn.BatchNorm1d(3))
    >>> skeleton.weight.is_meta, skeleton.running_var
    (True, tensor([1., 1., 1.]))
    """
    return structure_copy(model, lambda t: t.to("meta") if isinstance(t, nn.Parameter) else t.detach().clone())


def fill_skeleton(skeleton: nn.Module, device: torch.device) -> nn.Module:
    """Give a skeleton weights that cost as much time as trained ones: random, of a scale that keeps activations normal.

    Args:
        skeleton: What :func:`take_skeleton` returned; it is not changed.
        device: Where the weights go.

    Returns:
        A copy that can be run. Its outputs mean nothing.
    """
    generator = torch.Generator().manual_seed(0)

    def fill(tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor.to(device, copy=True)
        if tensor.dim() < 2 or not tensor.is_floating_point():
            return torch.ones(tensor.shape, dtype=tensor.dtype, device=device)
        scale = (tensor.numel() / tensor.shape[0]) ** -0.5
        return (torch.randn(tensor.shape, generator=generator) * scale).to(device, tensor.dtype)

    return structure_copy(skeleton, fill)


def load_baseline(skeleton: nn.Module, path: str | Path, device: torch.device) -> nn.Module:
    """Return the model of a Lightning checkpoint, built on a skeleton of the same class.

    Args:
        skeleton: What :func:`take_skeleton` returned; it is not changed.
        path: A checkpoint of ``Trainer.save_checkpoint`` or a file of a ``state_dict``.
        device: Where the weights go.

    Returns:
        The model.

    Raises:
        ConfigurationError: If the file cannot be read or its weights do not fit.
    """
    try:
        content = load_tensors(path)
    except ArtifactError as error:
        raise ConfigurationError(f"`baseline`: {error}") from error
    state: Mapping[str, Any] = content.get("state_dict", content)
    model = fill_skeleton(skeleton, device)
    install_hooks(model)
    try:
        model.load_state_dict(dict(state))
    except (RuntimeError, ValueError) as error:
        raise ConfigurationError(
            f"`baseline`: the weights in {str(path)!r} do not fit {type(model).__name__}: {error}"
        ) from error
    return model


def combine(structure: Measurement, values: Measurement | None) -> Measurement:
    """Return the structural figures of one measurement with what an earlier one knew about the weights.

    Args:
        structure: Measured on a skeleton, with operations.
        values: Measured on the weights, without operations.

    Returns:
        Everything that is known.
    """
    if values is None:
        return structure
    layers = {
        path: replace(layer, nonzero=values.layers[path].nonzero if path in values.layers else layer.nonzero)
        for path, layer in structure.layers.items()
    }
    reasons = dict(values.reasons)
    reasons.pop("macs", None)
    if "macs" in structure.reasons:
        reasons["macs"] = structure.reasons["macs"]
    return replace(values, macs=structure.macs, layers=layers, reasons=reasons)


def first_sample(model: nn.Module, batch: Any) -> Any:
    """Return the inputs of a batch's first sample, as a batch of one.

    >>> first_sample(nn.Linear(3, 1), (torch.zeros(8, 3), torch.zeros(8))).shape
    torch.Size([1, 3])
    """
    inputs = example_in(model, batch)
    if batch_size_of(inputs) is None:
        raise ConfigurationError(
            f"`example_inputs`: what a batch of the loader gives {type(model).__name__}, a {type(inputs).__name__}, "
            "does not start with a tensor of samples. Pass them."
        )
    return batch_of(inputs, 1)
