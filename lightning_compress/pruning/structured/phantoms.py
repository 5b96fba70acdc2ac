"""Zero channels that a model pads, seen by a tracer as outputs of layers of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_LAYERS: Mapping[int, Callable[[int], nn.Module]] = {
    2: lambda width: nn.Linear(1, width),
    4: lambda width: nn.Conv2d(1, width, 1),
    5: lambda width: nn.Conv3d(1, width, 1),
}


class Phantoms(TorchFunctionMode):
    """Replaces each padding of the channel dimension by a concatenation with what a phantom layer computes.

    A tracer takes padding for an element-wise operation, so that it would couple channel 0 before with channel 0
    behind. Concatenation it understands: the padded channels get groups of their own, the same on both sides where as
    many are added before as behind (option-A shortcuts of residual networks, He et al. 2016). Whether a model can do
    without some of them is left to a trial.

    Args:
        layers: The phantom layers in the order of the calls, or ``None`` to find out which are needed.

    Attributes:
        needed: Dimensions of the tensor, and channels before and behind, for each padding that was seen.
    """

    def __init__(self, layers: Iterable[nn.Module] | None = None) -> None:
        super().__init__()
        self._layers = None if layers is None else iter(layers)
        self.needed: list[tuple[int, int, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``, unless it pads channels with zeros."""
        kwargs = kwargs or {}
        if func is not F.pad:
            return func(*args, **kwargs)
        return self._pad(func, *args, **kwargs)

    def _pad(
        self, func: Any, tensor: Tensor, pad: Iterable[int], mode: str = "constant", value: float | None = None
    ) -> Any:
        sizes = list(pad)
        first = 2 * (tensor.dim() - 2)  # sizes go from the last dimension backwards
        before, behind = sizes[first : first + 2] if tensor.dim() in _LAYERS and len(sizes) > first + 1 else (0, 0)
        if mode != "constant" or value or before < 0 or behind < 0 or not before + behind:
            return func(tensor, sizes, mode, value)
        self.needed.append((tensor.dim(), before, behind))
        if self._layers is None:
            return func(tensor, sizes, mode, value)
        sizes[first : first + 2] = [0, 0]
        inner = func(tensor, sizes)
        layers = next(self._layers).children()
        ones = inner.new_ones((inner.shape[0], 1, *inner.shape[2:]))
        made = [layer(ones) for layer in layers]
        sides = [made[0].clone(), inner, made[-1].clone()]
        return torch.cat([side for side, width in zip(sides, (before, 1, behind), strict=True) if width], 1)


def phantom_layers(run: Callable[[], object]) -> nn.ModuleList:
    """Return the layers that stand for the zero channels that ``run`` pads: one list for each padding.

    >>> len(phantom_layers(lambda: F.pad(torch.ones(1, 4, 2, 2), (0, 0, 0, 0, 2, 2)))[0])
    1
    """
    with Phantoms() as seen, torch.no_grad():
        run()
    found = []
    for dims, before, behind in seen.needed:
        widths = [before] if before == behind else [width for width in (before, behind) if width]
        found.append(nn.ModuleList(_LAYERS[dims](width) for width in widths))
    return nn.ModuleList(found)
