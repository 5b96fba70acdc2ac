"""Channels that are zero already: nobody makes them or nobody reads them, so they can be cut out as they are."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_compress.core.callback import CompressionCallback
from lightning_compress.core.errors import SelectionError
from lightning_compress.core.journal import Edit
from lightning_compress.core.paths import get_layer, named_layers
from lightning_compress.core.plan import PlanRow
from lightning_compress.core.run import Layers
from lightning_compress.core.schedule import Horizon, Schedule, Time, Timeline
from lightning_compress.core.select import Select, Selection
from lightning_compress.pruning.fitting import following_norms
from lightning_compress.pruning.merging import NeuronMerging
from lightning_compress.pruning.structured.callbacks import StructuredPruning
from lightning_compress.pruning.structured.groups import ChannelGroup, Touch, slice_edits
from lightning_compress.pruning.structured.roles import CUTTABLE, PASSING
from lightning_compress.pruning.structured.trace import coupled_groups


def zero_channels_in(group: ChannelGroup, layers: Layers, norms: Mapping[str, str]) -> list[int]:
    """Return the channels of a group that are zero wherever they are made, or wherever they are read.

    A channel is *unread* if every weight that takes it is zero; removing it never changes the output. It is *silent* if
    every batch norm in the group has zero scale and shift for it, and every layer that makes it without such a norm
    behind it has zero weights and bias; removing it does not change the output either if what stands between maps zero
    to zero (ReLU, tanh, GELU and pooling do, a sigmoid does not).

    Args:
        group: The channels.
        layers: Modules by path.
        norms: The norm behind a layer, by path, see :func:`~lightning_compress.pruning.fitting.following_norms`.

    Returns:
        Channels in order; at least one of the group stays.

    >>> fc = nn.Linear(1, 3)
    >>> _ = fc.weight.data.copy_(torch.tensor([[1.0], [0.0], [-1.0]])), fc.bias.data.fill_(0)
    >>> touch = Touch("fc", (("weight", 0), ("bias", 0)), (0, 1, 2), (0, 1, 2), 3, (), True)
    >>> zero_channels_in(ChannelGroup("fc", 3, (touch,)), {"fc": fc}, {})
    [1]
    """
    scaling = [t for t in group.touches if isinstance(layers[t.path], PASSING) and _tensors(t, layers)]
    scaling = [touch for touch in scaling if not isinstance(layers[touch.path], nn.PReLU)]
    scaled = {touch.path for touch in scaling}
    made = [t for t in group.touches if t.produces and norms.get(t.path) not in scaled]
    weights = [touch for touch in group.touches if not touch.beside]
    taken = [t for t in weights if not t.produces and not isinstance(layers[t.path], PASSING)]
    zero = torch.zeros(group.channels, dtype=torch.bool)
    for touches in ([*scaling, *made], taken):
        if touches:
            zero |= torch.stack([_zero_at(touch, layers, group.channels) for touch in touches]).all(0)
    found: list[int] = zero.nonzero().flatten().tolist()
    return found[1:] if len(found) == group.channels else found


def _tensors(touch: Touch, layers: Layers) -> list[tuple[Tensor, int]]:
    own = [(getattr(layers[touch.path], name, None), dim) for name, dim in touch.tensors]
    return [(value.detach(), dim) for value, dim in own if isinstance(value, nn.Parameter)]


def _zero_at(touch: Touch, layers: Layers, channels: int) -> Tensor:
    """Return for each channel whether every weight of it in one layer is zero."""
    filled = torch.zeros(channels, dtype=torch.int64)
    for value, dim in _tensors(touch, layers):
        rows = (value != 0).movedim(dim, 0).flatten(1) if value.dim() > 1 else (value != 0)[:, None]
        by_position = rows.any(1).cpu()[torch.tensor(touch.positions)]
        filled.index_add_(0, torch.tensor(touch.channels), by_position.long())
    return filled == 0


class _Watched(Schedule):
    """Looks at a run twenty times; at its beginning only, if it has no end."""

    def times(self) -> tuple[tuple[str, Time], ...]:
        return ()

    def resolve(self, horizon: Horizon, clamp: bool = False) -> Timeline:
        if horizon.total is None:
            return Schedule(final=1.0, shape="once").resolve(horizon, clamp)
        return super().resolve(horizon, clamp)


class ZeroChannelRemoval(CompressionCallback):
    """Cut out channels that training has made zero, for a model that is really smaller and faster.

    The second half of Structured Sparsity Learning (Wen et al., arXiv 1608.03665) and network slimming (Liu et al.,
    arXiv 1708.06519): ``SparsityRegularization`` makes zeros, this finds the channels that are zero wherever they are
    made or read (:func:`zero_channels_in`), with all that is coupled to them, and slices them out of a copy after fit,
    ``callback.compressed``; in ``compress(model, ...)`` at once. The output stays what it was, except where a function
    turns a zero channel into a constant. Channels that a bias or a shift keeps from zero stay. Needs Torch-Pruning
    (``lightning-compress[structured]``) to find groups; a reload does not.

    Runs on: any device, ``ddp``; refuses sharded strategies.

    Args:
        select: Layers whose output channels may go; default all that can be cut.
        name: Tells two of these callbacks apart.

    Raises:
        SelectionError: If no layer is selected, or none of them can be cut.

    >>> import lightning_compress as lc
    >>> net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> _ = net[0].weight.data[10:].zero_(), net[0].bias.data[10:].zero_()
    >>> lc.compress(net, ZeroChannelRemoval(), example_inputs=torch.zeros(1, 8))[0]
    Linear(in_features=8, out_features=10, bias=True)
    """

    supported: ClassVar[tuple[type[nn.Module], ...]] = CUTTABLE
    prunes_after_fit: ClassVar[bool] = True

    def __init__(self, select: Select | None = None, name: str | None = None) -> None:
        watched = _Watched(final=1.0, end="100%", every="5%", shape="linear")
        super().__init__(watched, Select() if select is None else select, name)
        self._groups: tuple[ChannelGroup, ...] = ()
        self._norms: dict[str, str] = {}

    def examine(self, root: nn.Module, example_inputs: Any) -> Selection:
        """Find the groups of the selected layers."""
        selected = self.choose(root)
        everything = {"": root, **named_layers(root)}
        outside = {p: "not selected" for p, m in everything.items() if isinstance(m, CUTTABLE)}
        outside = {path: why for path, why in outside.items() if path not in selected.layers} | dict(selected.left)
        found = coupled_groups(root, example_inputs, outside)
        left = {path: f"kept: {why}" for path, why in found.left.items() if why != "not selected"}
        if not found.groups:
            raise SelectionError(
                f"no channels of {type(root).__name__} can be cut: "
                + "; ".join(f"{path}: {why}" for path, why in list(left.items())[:8])
            )
        self._groups, self._norms = found.groups, following_norms(root)
        touched = {touch.path for group in found.groups for touch in group.touches}
        return Selection({path: get_layer(root, path) for path in everything if path in touched}, left)

    def plan(self, layers: Layers) -> list[PlanRow]:
        """Return a row for each group: how wide it is, and how much of it is zero now."""
        cuts = self._cuts(layers)
        return [
            PlanRow(
                "select",
                group.name,
                f"{group.channels} channels",
                f"cut those that are zero after fit, on a copy; {len(cuts.get(group.name, ()))} are zero now",
            )
            for group in self._groups
        ]

    def update(self, layers: Layers, amount: float) -> None:
        """Do nothing: channels go after fit, and until then their number is logged."""

    def finalize(self, layers: Layers) -> Iterable[Edit]:
        """Return the edits that cut the zero channels out."""
        cuts = self._cuts(layers)
        if not cuts:
            warnings.warn(
                "ZeroChannelRemoval: no channel is zero, so nothing is cut. Train with SparsityRegularization at a "
                "higher `strength` first, or use StructuredPruning, which chooses channels itself",
                stacklevel=2,
            )
        order = {path: index for index, path in enumerate(layers)}
        return sorted(slice_edits(self._groups, cuts), key=lambda edit: order[edit.path])

    def metrics(self, layers: Layers) -> dict[str, float]:
        """Return ``channels``: the share that is not zero."""
        total = sum(group.channels for group in self._groups)
        return {"channels": 1 - sum(map(len, self._cuts(layers).values())) / total}

    def reset_values(self) -> None:
        """Forget the groups of another model."""
        self._groups, self._norms = (), {}

    def _cuts(self, layers: Layers) -> dict[str, list[int]]:
        cuts = {group.name: zero_channels_in(group, layers, self._norms) for group in self._groups}
        return {name: channels for name, channels in cuts.items() if channels}


ZeroChannelRemoval.conflicts_after_fit = (ZeroChannelRemoval, StructuredPruning, NeuronMerging)  # they would cut twice
