"""Removing whole channels while a model trains, or from a trained one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_compress.core.callback import CompressionCallback
from lightning_compress.core.cost import count_macs, count_parameters
from lightning_compress.core.errors import ConfigurationError, SelectionError, did_you_mean
from lightning_compress.core.hooks import journal_of
from lightning_compress.core.journal import Edit
from lightning_compress.core.latency import LatencyGoal, as_goal
from lightning_compress.core.paths import clean_path, get_layer, named_layers
from lightning_compress.core.plan import PlanRow
from lightning_compress.core.run import Layers
from lightning_compress.core.schedule import Schedule
from lightning_compress.core.select import Select, Selection
from lightning_compress.pruning.structured.budget import Costs, costs_of
from lightning_compress.pruning.structured.goal import check_reachable, resolve_goal
from lightning_compress.pruning.structured.groups import (
    ChannelGroup,
    Zeroing,
    left_between,
    parameter_in,
    slice_edits,
)
from lightning_compress.pruning.structured.importance import has_scales
from lightning_compress.pruning.structured.latency_search import LatencySearch
from lightning_compress.pruning.structured.limits import Limit, Limits, as_limits
from lightning_compress.pruning.structured.ranking import Ranking, as_ranking
from lightning_compress.pruning.structured.roles import SELECTABLE
from lightning_compress.pruning.structured.trace import coupled_groups
from lightning_compress.pruning.structured.widths import choose_widths, lowest

ROOT = ""
"""Path of the model itself, whose journal says what others have cut; selected beside the layers."""


class StructuredPruning(CompressionCallback):
    r"""Remove the least important channels, so that the model gets smaller and faster (DepGraph, Fang et al. 2023).

    Channels that are coupled by additions, concatenations, depthwise and grouped convolutions or flattening go
    together; their importance is the norm of all slices that would go (:func:`channel_importance`). At each update of
    the schedule the least important ones are set to zero wherever they appear, for good; after fit the zeroed slices
    are cut out of a copy, ``callback.compressed``, whose outputs equal those of the masked model. Nothing but indices
    is saved: a reload needs no tracing. Train the copy on with a fresh optimizer to regain what the cut cost.

    What cannot be cut is named in the plan with the reason: outputs of the model, frozen or tied tensors, attention
    and whatever LayerNorm mixes, shortcuts that pad channels, layers coupled to one that is not selected.

    Linear, convolution, recurrent and embedding layers are cut, with the norms that follow them, and whole heads of
    ``nn.MultiheadAttention``. A single share of channels p leaves about :math:`(1-p)^2` of parameters and operations;
    ``macs`` and ``parameters`` are searched for and met, and ``latency`` is measured on this machine. Needs
    Torch-Pruning (``lightning-compress[structured]``) to find groups.

    Runs on: any device, ``ddp``; refuses sharded strategies. Put it after ``WeightAveraging`` or
    ``StochasticWeightAveraging`` in the Trainer's list.

    Args:
        schedule: When, and how large a share of channels goes; a number is the final share. With another goal it says
            when only, and its ``final`` becomes what the goal takes away (1 for ``latency``).
        macs: Share of multiply-accumulate operations that remains, between 0 and 1.
        parameters: Share of parameters that remains, between 0 and 1.
        latency: Share of the time of a forward pass that remains, or a :class:`LatencyGoal` such as
            ``{"ms": 5.0, "batch": 1}``. Widths are searched for at the first update by measuring, once: they are part
            of the checkpoint. Multiples of 8 and 16 channels are used where they are faster.
        select: Layers whose output channels may go; default all that can be cut.
        ranking: Which channels go first: a word such as ``"l2"``, ``"taylor"`` or ``"fpgm"``, or a :class:`Ranking`,
            which also says how groups are compared (``scope``).
        limits: How far each group may be cut: a :class:`Limits` or a mapping such as ``{"floor": 0.25, "round_to": 8}``
            with ``rules`` for single layers. By default wide groups keep multiples of 4, 8 or 16 channels.
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

    supported: ClassVar[tuple[type[nn.Module], ...]] = SELECTABLE
    prunes_after_fit: ClassVar[bool] = True
    runs_after: ClassVar[tuple[type[Callback], ...]] = (WeightAveraging, StochasticWeightAveraging)
    conflicts_with: ClassVar[tuple[type[Callback], ...]] = (ModelPruning,)
    _searches_with: ClassVar[type[LatencySearch]] = LatencySearch

    def __init__(
        self,
        schedule: Schedule | float | None = None,
        macs: float | None = None,
        parameters: float | None = None,
        latency: LatencyGoal | float | Mapping[str, Any] | None = None,
        select: Select | None = None,
        ranking: Ranking | str | Mapping[str, Any] = "l2",
        limits: Limits | Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> None:
        self.goal, schedule = resolve_goal(schedule, {"macs": macs, "parameters": parameters, "latency": latency})
        super().__init__(schedule, Select() if select is None else select, name)
        self.macs, self.parameters = macs, parameters
        self.latency = None if latency is None else as_goal(latency)
        self.ranking, self.limits = as_ranking(ranking), as_limits(limits)
        if self.schedule.initial > self.schedule.final:
            raise ConfigurationError(
                f"`initial` ({self.schedule.initial:g}) is above the final amount ({self.schedule.final:g}): "
                "channels that are gone do not come back"
            )
        self._search = None if self.latency is None else self._searches_with(self.latency)
        self._groups: tuple[ChannelGroup, ...] = ()
        self._limits: dict[str, Limit] = {}
        self._costs: dict[str, Costs] = {}
        self._cuts: dict[str, list[int]] = {}
        self._zeros: Zeroing | None = None
        self._seen: dict[str, Tensor] = {}

    def examine(self, root: nn.Module, example_inputs: Any) -> Selection:
        """Find the groups of the selected layers, what each channel costs, and how long the model takes."""
        selected = self.choose(root)
        everything = {ROOT: root, **named_layers(root)}
        outside = {p: "not selected" for p, m in everything.items() if isinstance(m, SELECTABLE)}
        outside = {path: why for path, why in outside.items() if path not in selected.layers} | dict(selected.left)
        found = coupled_groups(root, example_inputs, outside)
        groups, unscaled = self._ranked(found.groups, everything)
        left = {path: f"kept: {why}" for path, why in {**found.left, **unscaled}.items() if why != "not selected"}
        if not groups:
            raise SelectionError(
                f"no channels of {type(root).__name__} can be cut: "
                + "; ".join(f"{path}: {why}" for path, why in list(left.items())[:8])
            )
        self._groups, self._limits = groups, self._steps.of(groups, root)
        layers = {touch.path: get_layer(root, touch.path) for group in groups for touch in group.touches}
        self._costs = self._count(root, example_inputs, layers)
        check_reachable(self._wanted, self._counted, self._least, left)
        if self._search is not None:
            self._search.look(root, example_inputs, groups, self._least)
        return Selection({path: layer for path, layer in everything.items() if path in layers or path == ROOT}, left)

    def plan(self, layers: Layers) -> list[PlanRow]:
        """Return a row for each group: how wide it is, and the layers whose outputs it holds."""
        rows = []
        for group in self._groups:
            others = [path for path in group.producers if path != group.name]
            coupled = f", with {', '.join(others[:3])}{' ...' if len(others) > 3 else ''}" if others else ""
            least, limit = self._least[group.name], self._limits[group.name]
            action = (
                f"cut to {least} or more" if limit.amount is None else f"cut to {least}" if limit.amount else "keep"
            )
            rows.append(PlanRow("select", group.name, f"{group.channels} channels", action + coupled))
        if self._search is not None:
            rows.append(PlanRow("latency", "the whole model", "", self._search.describe()))
        return rows

    def observe(self, layers: Layers) -> None:
        """Add up what gradients say of each channel, if the ranking asks for that, until the last channels are gone."""
        if not self.at_target:
            self.ranking.look(self._groups, layers, self._seen)

    def update(self, layers: Layers, amount: float) -> None:
        """Choose the channels that go, those that are gone already first, and set them to zero."""
        scores = self.ranking.score(self._groups, layers, self._seen)
        done = amount / self.schedule.final if self.schedule.final else 1.0
        if self._search is None:
            counted, beside = self._counted, self._beside
            scope, limits = self.ranking.scope, self._limits
            widths = choose_widths(scores, 1 - amount, counted, scope, limits, self._cuts, done, beside)
        else:
            self._solve(self._search, scores)
            widths = {
                g.name: g.channels - round(done * (g.channels - self._search.widths[g.name])) for g in self._groups
            }
        self._cuts = lowest(scores, widths, self._cuts)
        self._seen = {}
        self.enforce(layers)

    def enforce(self, layers: Layers) -> None:
        """Put the zeros back, in whatever makes, scales or takes a channel that is gone."""
        self._zeroing(parameter_in(layers))

    @property
    def _zeroing(self) -> Zeroing:
        zeros = self._zeros
        if zeros is None or zeros.cuts is not self._cuts or zeros.groups is not self._groups:
            zeros = self._zeros = Zeroing(self._groups, self._cuts)
        return zeros

    def enforce_state(self, state_dict: dict[str, Any]) -> None:
        """Put the zeros into weights that are about to be saved."""
        tensors = {clean_path(key): value for key, value in state_dict.items() if isinstance(value, Tensor)}

        def find(path: str, name: str) -> Tensor | None:
            return None if name.startswith("running_") else tensors.get(clean_path(f"{path}.{name}"))

        self._zeroing(find)

    def finalize(self, layers: Layers) -> Iterable[Edit]:
        """Return the edits that cut the zeroed channels out; the first says what was measured, if anything was."""
        order = {path: index for index, path in enumerate(layers)}
        found = journal_of(self.module if self.in_fit else layers[ROOT])
        left = left_between(found, journal_of(layers[ROOT]))  # others may have cut the copy
        edits = sorted(slice_edits(self._groups, self._cuts, left), key=lambda edit: order[edit.path])
        if self._search is not None and edits:
            first = edits[0]
            edits[0] = Edit(first.verb, first.path, first.kind, {**first.config, "measured": self._search.record()})
        return edits

    def metrics(self, layers: Layers) -> dict[str, float]:
        """Return the shares of ``channels``, ``parameters`` and, if known, ``macs`` that are left after the cut.

        With a latency goal, ``latency`` is the measured share at the widths that the schedule leads to.
        """
        kept = {group.name: group.channels - len(self._cuts.get(group.name, ())) for group in self._groups}
        shares = {goal: costs.share(kept) for goal, costs in self._costs.items()}
        return shares if self._search is None else {**shares, "latency": self._search.figures["after_share"]}

    def values(self) -> dict[str, Any]:
        """Return the channels that are gone and what gradients said so far, by group, and measured widths."""
        cuts = {f"cut:{name}": torch.tensor(channels) for name, channels in self._cuts.items()}
        seen = {f"seen:{name}": scores for name, scores in self._seen.items()}
        return cuts | seen | (self._search.values() if self._search is not None else {})

    def load_values(self, values: Mapping[str, Any]) -> None:
        """Take the channels from a checkpoint."""
        self._cuts = {key.removeprefix("cut:"): v.tolist() for key, v in values.items() if key.startswith("cut:")}
        self._seen = {key.removeprefix("seen:"): v for key, v in values.items() if key.startswith("seen:")}
        if self._search is not None:
            self._search.load_values(values)

    def attach_values(self, layers: Layers) -> None:
        """Check that loaded channels belong to groups that were found."""
        widths = {group.name: group.channels for group in self._groups}
        decided = {} if self._search is None else self._search.widths
        last = {name: max([0, *channels]) for name, channels in {**dict.fromkeys(decided, ()), **self._cuts}.items()}
        for name in [*last, *(name for name in widths if decided and name not in decided)]:
            if name not in widths or last.get(name, widths[name]) >= widths[name]:
                raise ConfigurationError(
                    f"the checkpoint cuts channels of {name!r}, which cannot be cut now; {did_you_mean(name, widths)} "
                    "Resume with the `select` and the model it was written with"
                )

    def reset_values(self) -> None:
        """Forget the channels and the groups."""
        self._groups, self._costs, self._cuts, self._limits, self._seen, self._zeros = (), {}, {}, {}, {}, None
        self._search = None if self.latency is None else self._searches_with(self.latency)

    @property
    def _least(self) -> dict[str, int]:
        return {group.name: self._limits[group.name].least(group.channels) for group in self._groups}

    @property
    def _counted(self) -> Costs:
        """What the goal counts; a latency is searched for along the operations, if they are known."""
        return self._costs[self.goal] if self._search is None else self._costs.get("macs", self._costs["parameters"])

    @property
    def _beside(self) -> Costs | None:
        """What must not rise where widths are rounded."""
        return self._costs.get({"macs": "parameters", "parameters": "macs", "latency": "parameters"}.get(self.goal, ""))

    @property
    def _steps(self) -> Limits:
        """The limits; which multiples are fast is measured, where a latency is the goal."""
        measured = self._search is not None and self.limits.round_to is None
        return replace(self.limits, round_to=1) if measured else self.limits

    @property
    def _wanted(self) -> tuple[str, float]:
        return (self.goal, 1 - self.schedule.final) if self._search is None else ("macs", 1.0)

    def _solve(self, search: LatencySearch, scores: Mapping[str, Tensor]) -> None:
        def widths_at(share: float, step: int) -> dict[str, int]:
            whole = {group.name for group in self._groups if group.rebuilt is not None}
            limits = {
                name: limit if name in whole or limit.round_to % step == 0 else replace(limit, round_to=step)
                for name, limit in self._limits.items()
            }
            scope, beside = self.ranking.scope, self._beside
            return choose_widths(scores, share, self._counted, scope, limits, self._cuts, beside=beside)

        share_of = self._counted.share
        search.solve(widths_at, share_of, share_of(self._least), self._steps.round_to or 1)
        if not search.record()["met"]:
            rank_zero_warn(f"{self.state_key}: measured {search.describe()}, which is missed; is the machine busy?")

    def _ranked(
        self, groups: tuple[ChannelGroup, ...], layers: Layers
    ) -> tuple[tuple[ChannelGroup, ...], dict[str, str]]:
        """Return the groups that the ranking has a score for, and why the layers of others stay."""
        if self.ranking.importance != "bn_scale":
            return groups, {}
        scaled = tuple(group for group in groups if has_scales(group, layers))
        why = "no batch norm scales its channels, which 'bn_scale' ranks"
        return scaled, {path: why for group in groups if group not in scaled for path in group.producers}

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
