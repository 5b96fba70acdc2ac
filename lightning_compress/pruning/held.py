"""Masks held in place on the weights of a module in training: whose they are, applied, saved and restored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.core.errors import ConfigurationError, SelectionError, did_you_mean
from lightning_compress.core.paths import clean_path
from lightning_compress.core.run import Layers
from lightning_compress.core.select import Selection
from lightning_compress.core.targets import Target, find_targets
from lightning_compress.pruning.masks import kept, pack_mask, unpack_mask, zero_weights

_PREFIX = "mask:"


class HeldMasks:
    """The masks of one callback, by path of the weight.

    Attributes:
        targets: The weights that may have a mask.
        masks: Tensors of signed integers, -1 keep and 0 prune; what has none is dense.

    >>> held = HeldMasks()
    >>> net = nn.Sequential(nn.Linear(2, 2))
    >>> layers = held.find(net, Selection({"0": net[0]})).layers
    >>> held.masks["0.weight"] = torch.tensor([[0, -1], [-1, 0]], dtype=torch.int8)
    >>> held.enforce(layers)
    >>> int((net[0].weight == 0).sum()), held.sparsity(layers)
    (2, 0.5)
    """

    def __init__(self) -> None:
        self.targets: list[Target] = []
        self.masks: dict[str, Tensor] = {}
        self._packed: dict[str, Tensor] = {}
        self._scratch: dict[torch.dtype, Tensor] = {}

    def find(self, root: nn.Module, selection: Selection) -> Selection:
        """Find the weights of the selected layers, and name those that are left alone.

        Raises:
            SelectionError: If none of them can have a mask.
        """
        self.targets, reasons = find_targets(root, selection.layers)
        if not self.targets:
            why = "; ".join(f"{key}: {reason}" for key, reason in reasons.items())
            raise SelectionError(f"no tensor of the selected layers can be pruned: {why}")
        return Selection(selection.layers, {**selection.left, **reasons})

    def weights(self, layers: Layers) -> dict[str, nn.Parameter]:
        """Return the weights by path, those of the given layers only."""
        return {target.key: target.weight(layers) for target in self.targets if target.layer in layers}

    def unmasked(self, layers: Layers) -> dict[str, nn.Parameter]:
        """Return the weights that train but have no mask: all at first, later those that were unfrozen."""
        return {k: w for k, w in self.weights(layers).items() if w.requires_grad and k not in self.masks}

    def enforce(self, layers: Layers) -> None:
        """Put the zeros back, exactly."""
        zero_weights(list(self.weights(layers).items()), self.masks, self._scratch)

    def enforce_state(self, state_dict: Mapping[str, Any]) -> None:
        """Put the zeros into weights that are about to be saved."""
        saved = [(clean_path(key), value) for key, value in state_dict.items() if isinstance(value, Tensor)]
        zero_weights(saved, self.masks, self._scratch)

    def sparsity(self, layers: Layers) -> float:
        """Return the share of masked weights among all that may have a mask."""
        total = sum(weight.numel() for weight in self.weights(layers).values())
        masked = sum(mask.numel() for mask in self.masks.values())
        return (masked - kept(self.masks)) / total

    def state(self) -> dict[str, Tensor]:
        """Return the masks as bits, for a checkpoint."""
        return {_PREFIX + key: pack_mask(mask) for key, mask in self.masks.items()} | {
            _PREFIX + key: packed for key, packed in self._packed.items()
        }

    def load(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take masks from a checkpoint, to be unpacked when the weights are at hand; return the other entries."""
        self.masks = {}
        self._packed = {k.removeprefix(_PREFIX): v for k, v in values.items() if k.startswith(_PREFIX)}
        return {key: value for key, value in values.items() if not key.startswith(_PREFIX)}

    def attach(self, layers: Layers) -> None:
        """Unpack loaded masks for the weights they belong to.

        Raises:
            ConfigurationError: If a mask belongs to no selected weight, or to one of another size.
        """
        weights = self.weights(layers)
        for key, packed in self._packed.items():
            if key not in weights:
                raise ConfigurationError(
                    f"the checkpoint has a mask for {key!r}, which is not selected now; {did_you_mean(key, weights)} "
                    "Resume with the `select` it was written with"
                )
            self.masks[key] = unpack_mask(packed, weights[key], key)
        self._packed = {}
