"""Removing whole channels while a model trains, or from a trained one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn

from lightning_compress.core.callback import CompressionCallback
from lightning_compress.core.cost import count_macs, count_parameters
from lightning_compress.core.errors import ConfigurationError, SelectionError, did_you_mean
from lightning_compress.core.journal import Edit
from lightning_compress.core.paths import clean_path, get_layer, named_layers
from lightning_compress.core.plan import PlanRow
from lightning_compress.core.run import Layers
from lightning_compress.core.schedule import Schedule
from lightning_compress.core.select import Select, Selection
from lightning_compress.pruning.structured.budget import GOALS, SCOPES, Costs, Limits, choose_cuts, costs_of
from lightning_compress.pruning.structured.groups import ChannelGroup, parameter_in, slice_edits, zero_channels
from lightning_compress.pruning.structured.importance import channel_importance
from lightning_compress.pruning.structured.roles import CUTTABLE
from lightning_compress.pruning.structured.trace import coupled_groups


class StructuredPruning(CompressionCallback):
    r"""Remove the least important channels, so that the model gets smaller and faster (DepGraph, Fang et al. 2023).

    Channels that are coupled by additions, concatenations, depthwise and grouped convolutions or flattening go
    together; their importance is the norm of all slices that would go (:func:`channel_importance`). At each update of
    the schedule the least important ones are set to zero wherever they appear, for good; after fit the zeroed slices
    are cut out of a copy, ``callback.compressed``, whose outputs equal those of the masked model. Nothing but indices
    is saved: a reload needs no tracing. Train the copy on with a fresh optimizer to regain what the cut cost.

    What cannot be cut is named in the plan with the reason: outputs of the model, frozen or tied tensors, attention
    and whatever LayerNorm mixes, shortcuts that pad channels, layers coupled to one that is not selected.

    Linear, convolution, LSTM (one layer, one direction) and embedding layers are cut, with the norms that follow them.
    A single share of channels p leaves about :math:`(1-p)^2` of parameters and operations; ``macs`` and
    ``parameters`` are searched for and met. Needs Torch-Pruning (``lightning-compress[structured]``) to find groups.

    Runs on: any device, ``ddp``; refuses sharded strategies. Put it after ``WeightAveraging`` or
    ``StochasticWeightAveraging`` in the Trainer's list.

    Args:
        schedule: When, and how large a share of channels goes; a number is the final share. With ``macs`` or
            ``parameters`` it says when only, and its ``final`` becomes what the goal takes away.
        macs: Share of multiply-accumulate operations that remains, between 0 and 1.
        parameters: Share of parameters that remains, between 0 and 1.
        select: Layers whose output channels may go; default all that can be cut.
        scope: ``"global"`` ranks all channels together, ``"layer"`` takes the same share of every group.
        round_to: Keep multiples of so many channels, which fast kernels like (8 or 16), where layers are wide enough.
        floor: Least share of each group's channels that stays; at least one always does.
        name: Tells two of these callbacks apart.

    Raises:
        ConfigurationError: For a value outside its range, or a goal that cannot be reached; says what can.
        SelectionError: If no layer is selected, or none of them can be cut.

    >>> import lightning_compress as lc
    >>> net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> smaller = lc.compress(net, StructuredPruning(macs=0.5), example_inputs=torch.zeros(1, 8))
    >>> smaller[0], smaller[2].in_features
    (Linear(in_features=8, out_features=16, bias=True), 16)
    """

    supported: ClassVar[tuple[type[nn.Module], ...]] = CUTTABLE
    runs_after: ClassVar[tuple[type[Callback], ...]] = (WeightAveraging, StochasticWeightAveraging)
    conflicts_with: ClassVar[tuple[type[Callback], ...]] = (ModelPruning,)

    def __init__(
        self,
        schedule: Schedule | float | None = None,
        macs: float | None = None,
        parameters: float | None = None,
        select: Select | None = None,
        scope: str = "global",
        round_to: int = 1,
        floor: float = 0.1,
        name: str | None = None,
    ) -> None:
        self.goal, schedule = _goal(schedule, macs, parameters)
        super().__init__(schedule, Select() if select is None else select, name)
        if scope not in SCOPES:
            raise ConfigurationError(f"`scope` is {scope!r}: {did_you_mean(str(scope), SCOPES)}")
        if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
            raise ConfigurationError(f"`round_to` must be an int >= 1, got {round_to!r}")
        if isinstance(floor, bool) or not isinstance(floor, int | float) or not 0 <= floor < 1:
            raise ConfigurationError(f"`floor` must be a number from 0 to below 1, got {floor!r}")
        if self.schedule.initial > self.schedule.final:
            raise ConfigurationError(
                f"`initial` ({self.schedule.initial:g}) is above the final amount ({self.schedule.final:g}): "
                "channels that are gone do not come back"
            )
        self.macs, self.parameters, self.scope = macs, parameters, scope
        self.round_to, self.floor = round_to, float(floor)
        self._groups: tuple[ChannelGroup, ...] = ()
        self._costs: dict[str, Costs] = {}
        self._cuts: dict[str, list[int]] = {}

    def examine(self, root: nn.Module, example_inputs: Any) -> Selection:
        """Find the groups of the selected layers, and what each channel costs."""
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
        self._groups = found.groups
        layers = {touch.path: get_layer(root, touch.path) for group in found.groups for touch in group.touches}
        self._costs = self._count(root, example_inputs, layers)
        self._check_reachable(left)
        return Selection({path: layer for path, layer in everything.items() if path in layers}, left)

    def plan(self, layers: Layers) -> list[PlanRow]:
        """Return a row for each group: how wide it is, and the layers whose outputs it holds."""
        rows = []
        for group in self._groups:
            others = group.producers[1:]
            coupled = f", with {', '.join(others[:3])}{' ...' if len(others) > 3 else ''}" if others else ""
            least = Limits(self.floor, self.round_to).kept(group.channels, group.channels)
            rows.append(PlanRow("select", group.name, f"{group.channels} channels", f"cut to {least} or more{coupled}"))
        return rows

    def update(self, layers: Layers, amount: float) -> None:
        """Choose the channels that go, those that are gone already first, and set them to zero."""
        scores = {group.name: channel_importance(group, layers) for group in self._groups}
        costs = self._costs[self.goal]
        self._cuts = choose_cuts(scores, 1 - amount, costs, self.scope, self._limits, gone=self._cuts)
        self.enforce(layers)

    def enforce(self, layers: Layers) -> None:
        """Put the zeros back, in whatever makes, scales or takes a channel that is gone."""
        zero_channels(self._groups, self._cuts, parameter_in(layers))

    def enforce_state(self, state_dict: dict[str, Any]) -> None:
        """Put the zeros into weights that are about to be saved."""
        tensors = {clean_path(key): value for key, value in state_dict.items() if isinstance(value, Tensor)}

        def find(path: str, name: str) -> Tensor | None:
            return None if name.startswith("running_") else tensors.get(clean_path(f"{path}.{name}"))

        zero_channels(self._groups, self._cuts, find)

    def finalize(self, layers: Layers) -> Iterable[Edit]:
        """Return the edits that cut the zeroed channels out."""
        order = {path: index for index, path in enumerate(layers)}
        return sorted(slice_edits(self._groups, self._cuts), key=lambda edit: order[edit.path])

    def metrics(self, layers: Layers) -> dict[str, float]:
        """Return the shares of ``channels``, ``parameters`` and, if known, ``macs`` that are left after the cut."""
        kept = {group.name: group.channels - len(self._cuts.get(group.name, ())) for group in self._groups}
        return {goal: costs.share(kept) for goal, costs in self._costs.items()}

    def values(self) -> dict[str, Any]:
        """Return the channels that are gone, by group."""
        return {name: torch.tensor(channels) for name, channels in self._cuts.items()}

    def load_values(self, values: Mapping[str, Any]) -> None:
        """Take the channels from a checkpoint."""
        self._cuts = {name: channels.tolist() for name, channels in values.items()}

    def attach_values(self, layers: Layers) -> None:
        """Check that loaded channels belong to groups that were found."""
        widths = {group.name: group.channels for group in self._groups}
        for name, channels in self._cuts.items():
            if name not in widths or (channels and channels[-1] >= widths[name]):
                raise ConfigurationError(
                    f"the checkpoint cuts channels of {name!r}, which cannot be cut now; {did_you_mean(name, widths)} "
                    "Resume with the `select` and the model it was written with"
                )

    def reset_values(self) -> None:
        """Forget the channels and the groups."""
        self._groups, self._costs, self._cuts = (), {}, {}

    @property
    def _limits(self) -> Limits:
        return Limits(self.floor, self.round_to)

    def _count(self, root: nn.Module, example_inputs: Any, layers: Layers) -> dict[str, Costs]:
        counted = count_macs(root, example_inputs)
        if counted.total is None and self.goal == "macs":
            raise ConfigurationError(
                f"`macs`: the operations of {type(root).__name__} could not be counted ({counted.reason}); "
                "give a share of channels or `parameters` instead"
            )
        totals = {"channels": 1, "macs": counted.total, "parameters": count_parameters(root).total}
        return {
            goal: costs_of(goal, self._groups, layers, total, counted.per_layer)
            for goal, total in totals.items()
            if total
        }

    def _check_reachable(self, left: Mapping[str, str]) -> None:
        costs = self._costs[self.goal]
        least = costs.share({group.name: self._limits.kept(group.channels, group.channels) for group in self._groups})
        wanted = 1 - self.schedule.final
        if least > wanted + 1e-9:
            kept = "; ".join(f"{path} ({why.removeprefix('kept: ')})" for path, why in list(left.items())[:4])
            raise ConfigurationError(
                f"`{self.goal if self.goal != 'channels' else 'schedule'}` asks for {wanted:.3g} of the {self.goal} to "
                f"remain, but at least {least:.3g} stay with floor={self.floor:g} and round_to={self.round_to}; lower "
                f"those or ask for less. What cannot be cut: {kept}"
            )


def _goal(schedule: Schedule | float | None, macs: float | None, parameters: float | None) -> tuple[str, Schedule]:
    """Return what is counted, and the schedule of the share of it that goes."""
    given = {name: value for name, value in zip(GOALS[1:], (macs, parameters), strict=True) if value is not None}
    if len(given) > 1 or (not given and schedule is None) or (given and isinstance(schedule, int | float)):
        raise ConfigurationError(
            f"give one of: a number or Schedule as `schedule` (share of channels that goes), `macs` or `parameters` "
            f"(share that remains); got schedule={schedule!r}, macs={macs!r}, parameters={parameters!r}"
        )
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise ConfigurationError(f"`{name}` is the share that remains, above 0 and at most 1, got {value!r}")
        final = 1 - value
        return name, replace(schedule, final=final) if isinstance(schedule, Schedule) else Schedule(final=final)
    return "channels", schedule if isinstance(schedule, Schedule) else Schedule(final=schedule or 0.0)
