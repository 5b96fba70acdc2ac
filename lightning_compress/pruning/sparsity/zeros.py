"""Zeros that stay: chosen once, held on weights, biases and norms alike, and kept in checkpoints as bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_compress.core.errors import ConfigurationError, did_you_mean
from lightning_compress.core.paths import clean_path
from lightning_compress.core.run import Layers
from lightning_compress.pruning.masks import apply_mask, pack_mask, unpack_mask


class StayingZeros:
    """The masks of one callback, by path of the tensor; none at first.

    Attributes:
        masks: As :func:`~lightning_compress.pruning.masks.apply_mask` takes them.

    >>> import torch
    >>> zeros = StayingZeros()
    >>> zeros.masks["0.bias"] = torch.tensor([0, -1], dtype=torch.int8)
    >>> layer = torch.nn.Linear(1, 2)
    >>> _ = layer.bias.data.fill_(3.0)
    >>> zeros.enforce({"0": layer})
    >>> layer.bias.tolist()
    [0.0, 3.0]
    """

    def __init__(self) -> None:
        self.masks: dict[str, Tensor] = {}
        self._packed: dict[str, Tensor] = {}

    def enforce(self, layers: Layers) -> None:
        """Put the zeros back, exactly."""
        for key in self.masks:
            path, _, name = key.rpartition(".")
            if path in layers:
                self._zero(key, layers[path].get_parameter(name))

    def enforce_state(self, state_dict: Mapping[str, Any]) -> None:
        """Put the zeros into tensors that are about to be saved."""
        tensors = {clean_path(key): value for key, value in state_dict.items() if isinstance(value, Tensor)}
        for key in self.masks:
            if key in tensors:
                self._zero(key, tensors[key])

    def state(self) -> dict[str, Tensor]:
        """Return the masks as bits, for a checkpoint."""
        return {key: pack_mask(mask) for key, mask in self.masks.items()} | self._packed

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Take masks from a checkpoint, to be unpacked when the tensors are at hand."""
        self.masks, self._packed = {}, dict(values)

    def attach(self, layers: Layers) -> None:
        """Unpack loaded masks for the tensors they belong to.

        Raises:
            ConfigurationError: If there is no such tensor among the layers; names the nearest.
        """
        known = {f"{path}.{name}": p for path, m in layers.items() for name, p in m.named_parameters(recurse=False)}
        for key, packed in self._packed.items():
            if key not in known:
                raise ConfigurationError(
                    f"the checkpoint has zeros for {key!r}, which is not selected now; {did_you_mean(key, known)} "
                    "Resume with the `select`, `rules` and `granularity` it was written with"
                )
            self.masks[key] = unpack_mask(packed, known[key], key)
        self._packed = {}

    def _zero(self, key: str, tensor: Tensor) -> None:
        mask = self.masks[key]
        if mask.device != tensor.device:
            mask = self.masks[key] = mask.to(tensor.device)
        apply_mask(tensor, mask)
