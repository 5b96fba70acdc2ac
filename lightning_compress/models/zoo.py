"""Any torchvision model by name, without a download unless weights are asked for."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from torchvision import models

from lightning_compress.core.errors import ConfigurationError, did_you_mean


def torchvision_model(
    name: str, weights: str | None = None, num_classes: int | None = None, **options: Any
) -> nn.Module:
    """Build a torchvision model by its name.

    Args:
        name: A name from ``torchvision.models.list_models()``, such as ``"resnet18"``.
        weights: ``None`` for random weights; ``"DEFAULT"`` or ``"IMAGENET1K_V1"`` downloads trained ones.
        num_classes: Length of the output; ``None`` keeps torchvision's (or the weights') own.
        **options: Handed to torchvision's builder.

    Returns:
        The model. Backbones of detection and segmentation models start from random weights too, unless
        ``weights_backbone`` says otherwise.

    Raises:
        ConfigurationError: If ``name`` or ``weights`` is unknown, or ``num_classes`` contradicts ``weights``.

    >>> torchvision_model("resnet18", num_classes=7).fc.out_features
    7
    """
    known = models.list_models()
    if name not in known:
        raise ConfigurationError(f"`name` of a torchvision model is unknown: {name!r}; {did_you_mean(name, known)}")
    builder = models.get_model_builder(name)
    chosen = _find_weights(name, weights)
    if chosen is not None and num_classes is not None:
        categories = len(chosen.meta.get("categories", ()))
        if categories and categories != num_classes:
            raise ConfigurationError(
                f"`num_classes` is {num_classes}, but `weights`={weights!r} of {name!r} were trained for {categories} "
                "classes; leave `num_classes` out and replace the last layer, or set `weights` to null"
            )
    if "weights_backbone" in inspect.signature(builder).parameters:
        options.setdefault("weights_backbone", None)
    if num_classes is not None:
        options["num_classes"] = num_classes
    return builder(weights=chosen, **options)


def _find_weights(name: str, weights: str | None) -> Any:
    if weights is None:
        return None
    entries = models.get_model_weights(name).__members__
    if weights not in entries:
        raise ConfigurationError(f"`weights` of {name!r} is unknown: {weights!r}; {did_you_mean(weights, entries)}")
    return entries[weights]
