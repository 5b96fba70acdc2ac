"""Pruning while a model trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn

from lightning_compress.core.callback import CompressionCallback
from lightning_compress.core.errors import ConfigurationError, SelectionError, did_you_mean
from lightning_compress.core.paths import clean_path, named_layers
from lightning_compress.core.plan import PlanRow
from lightning_compress.core.run import Layers
from lightning_compress.core.schedule import Schedule
from lightning_compress.core.select import Select, Selection
from lightning_compress.pruning.allocation import SCOPES, choose_masks
from lightning_compress.pruning.masks import apply_mask, kept, pack_mask, unpack_mask
from lightning_compress.pruning.rules import Rule, as_rules
from lightning_compress.pruning.targets import PRUNABLE, Target, find_targets


class IterativePruning(CompressionCallback):
    r"""Set the smallest weights to zero, more and more of them, for good (Han et al. 2015, arXiv 1506.02626).

    At each update of the schedule the weights with the smallest magnitude are masked until the share of zeros,
    :math:`s = \#\{w = 0\} / \#w` over the selected weights, equals the schedule's amount exactly: an absolute target,
    not a share of what is left. Masks are applied in place right after every optimizer step, so zeros are exact
    under momentum, weight decay, mixed precision, several optimizers and gradient accumulation, and ``state_dict``
    keys, weight averaging, ``torch.compile`` and DDP see an ordinary model. Pruning happens before validation: a
    monitored metric belongs to the weights that are saved. Masks live in the checkpoint's callback state and survive
    ``fit(ckpt_path=...)`` from any point.

    Weights of Linear, convolution, recurrent and attention layers are pruned; biases, norms, embeddings and the
    last layer are left alone. Weights that are frozen at an update are left alone until the first update after they
    are unfrozen; parameters tied to a layer outside the selection are kept, and the plan names them all.

    It makes the file smaller (``save_compressed`` stores zeros as a bitmap) but, on dense kernels, nothing faster.

    Runs on: any device, ``ddp``; refuses sharded strategies. Put it after ``WeightAveraging`` or
    ``StochasticWeightAveraging`` in the Trainer's list.

    Args:
        schedule: When and how much; a number is the final sparsity, reached at 70 % of the run on a cubic curve.
        select: Which layers; default all that can be pruned except the last.
        scope: ``"global"`` ranks all selected weights together, ``"layer"`` prunes each tensor to the amount.
        rules: Named exceptions with an amount of their own; the last that matches a layer wins.
        floor: Least share of each tensor that stays, 0 to 1; at least one weight always does.
        name: Tells two of these callbacks apart.

    Raises:
        ConfigurationError: For a value outside its range, or amounts that the floor makes unreachable.
        SelectionError: If no layer is selected, or a rule matches none.

    >>> callback = IterativePruning(Schedule(final=0.9, start="10%", end="60%"), rules={"stem": Rule("conv1", 0.5)})
    >>> callback.schedule.final
    0.9
    """

    supported: ClassVar[tuple[type[nn.Module], ...]] = PRUNABLE
    runs_after: ClassVar[tuple[type[Callback], ...]] = (WeightAveraging, StochasticWeightAveraging)
    conflicts_with: ClassVar[tuple[type[Callback], ...]] = (ModelPruning,)

    def __init__(
        self,
        schedule: Schedule | float,
        select: Select | None = None,
        scope: str = "global",
        rules: Mapping[str, Rule] | None = None,
        floor: float = 0.005,
        name: str | None = None,
    ) -> None:
        schedule = schedule if isinstance(schedule, Schedule) else Schedule(final=schedule)
        super().__init__(schedule, Select(not_last=True) if select is None else select, name)
        if scope not in SCOPES:
            raise ConfigurationError(f"`scope` is {scope!r}: {did_you_mean(str(scope), SCOPES)}")
        if isinstance(floor, bool) or not isinstance(floor, int | float) or not 0 <= floor < 1:
            raise ConfigurationError(f"`floor` must be a number from 0 to below 1, got {floor!r}")
        self.scope = scope
        self.rules = as_rules(rules)
        self.floor = float(floor)
        self._targets: list[Target] = []
        self._rule_of: dict[str, str] = {}
        self._masks: dict[str, Tensor] = {}
        self._packed: dict[str, Tensor] = {}
        self._scratch: dict[torch.dtype, Tensor] = {}
        self._check_amounts()

    def choose(self, root: nn.Module) -> Selection:
        """Select the layers, those that only a rule names included, and find their tensors and ties."""
        selection = self._select(root)
        layers, left = dict(selection.layers), dict(selection.left)
        self._rule_of = {}
        for name, rule in self.rules.items():
            try:
                ruled = rule.select.resolve(root, PRUNABLE).layers
            except SelectionError as error:
                raise SelectionError(f"rule {name!r}: {error}") from error
            for path, layer in ruled.items():
                self._rule_of[path] = name
                left.pop(path, None)
                layers[path] = layer
        layers = {path: layer for path, layer in named_layers(root).items() if path in layers}
        self._targets, reasons = find_targets(root, layers)
        if not self._targets:
            raise SelectionError(
                f"no tensor of the selected layers can be pruned: {'; '.join(f'{k}: {v}' for k, v in reasons.items())}"
            )
        return Selection(layers, {**left, **reasons})

    def plan(self, layers: Layers) -> list[PlanRow]:
        """Return a row for each tensor: which rule, its shape, and to which amount."""
        rows = []
        for target in self._targets:
            weight, rule = target.weight(layers), self._rule_of.get(target.layer)
            amount = self.rules[rule].amount if rule else self.schedule.final
            action = f"prune to {amount:g}" + ("" if rule or self.scope == "layer" else " of all, by magnitude")
            action = "kept: the rule's amount is 0" if amount == 0 else action
            action += f", tied with {', '.join(target.tied)}" if target.tied else ""
            action = action if weight.requires_grad else f"kept while frozen, then {action}"
            rows.append(PlanRow(rule or "select", target.key, "x".join(map(str, weight.shape)), action))
        return rows

    def update(self, layers: Layers, amount: float) -> None:
        """Choose the masks for a sparsity and apply them."""
        weights = {t.key: (t, t.weight(layers)) for t in self._targets if self._may_prune(t.weight(layers), t.key)}
        pool = {key: weight for key, (target, weight) in weights.items() if target.layer not in self._rule_of}
        self._masks.update(choose_masks(pool, amount, self.scope, self.floor) if pool else {})
        share = amount / self.schedule.final if self.schedule.final else 0.0
        for key, (target, weight) in weights.items():
            rule = self.rules.get(self._rule_of.get(target.layer, ""))
            if rule is not None and rule.amount > 0:
                self._masks.update(choose_masks({key: weight}, rule.amount * share, "layer", self.floor))
        self.enforce(layers)

    def enforce(self, layers: Layers) -> None:
        """Put the zeros back, exactly."""
        for target in self._targets:
            if target.key in self._masks and target.layer in layers:
                self._zero(target.key, target.weight(layers))

    def pending(self, layers: Layers) -> bool:
        """Return whether a weight without a mask has been unfrozen since the last update."""
        spared = {path for path, name in self._rule_of.items() if self.rules[name].amount == 0}
        unmasked = (t for t in self._targets if t.key not in self._masks and t.layer not in spared)
        return any(target.weight(layers).requires_grad for target in unmasked)

    def enforce_state(self, state_dict: dict[str, Any]) -> None:
        """Put the zeros into weights that are about to be saved."""
        tensors = {clean_path(key): value for key, value in state_dict.items() if isinstance(value, Tensor)}
        for key in self._masks:
            if key in tensors:
                self._zero(key, tensors[key])

    def metrics(self, layers: Layers) -> dict[str, float]:
        """Return ``sparsity``: the share of zeros among the selected weights."""
        total = sum(target.weight(layers).numel() for target in self._targets)
        unmasked = sum(t.weight(layers).numel() for t in self._targets if t.key not in self._masks)
        return {"sparsity": 1 - (kept(self._masks) + unmasked) / total}

    def values(self) -> dict[str, Any]:
        """Return the masks as bits."""
        return {key: pack_mask(mask) for key, mask in self._masks.items()} | dict(self._packed)

    def load_values(self, values: Mapping[str, Any]) -> None:
        """Take masks from a checkpoint; they are unpacked when the weights are at hand."""
        self._masks, self._packed = {}, dict(values)

    def attach_values(self, layers: Layers) -> None:
        """Unpack loaded masks for the weights they belong to."""
        weights = {target.key: target.weight(layers) for target in self._targets}
        for key, packed in self._packed.items():
            if key not in weights:
                raise ConfigurationError(
                    f"the checkpoint has a mask for {key!r}, which is not selected now; {did_you_mean(key, weights)} "
                    "Resume with the `select` and `rules` it was written with"
                )
            self._masks[key] = unpack_mask(packed, weights[key], key)
        self._packed = {}

    def reset_values(self) -> None:
        """Forget the masks and what they belong to."""
        self._targets, self._rule_of, self._masks, self._packed, self._scratch = [], {}, {}, {}, {}

    def _zero(self, key: str, weight: Tensor) -> None:
        mask = self._masks[key]
        if mask.device != weight.device:
            mask = self._masks[key] = mask.to(weight.device)
        apply_mask(weight, mask, self._scratch)

    def _select(self, root: nn.Module) -> Selection:
        try:
            return self.select.resolve(root, PRUNABLE)
        except SelectionError:
            if self.rules and self.select.include == ("*",):
                return Selection({})
            raise

    def _may_prune(self, weight: nn.Parameter, key: str) -> bool:
        return weight.requires_grad or key in self._masks or not self.in_fit

    def _check_amounts(self) -> None:
        amounts = {"final": self.schedule.final, **{f"amount of rule {k!r}": r.amount for k, r in self.rules.items()}}
        for name, amount in amounts.items():
            if 1 - amount < self.floor - 1e-9:
                raise ConfigurationError(
                    f"`{name}` is {amount:g}, but `floor` keeps {self.floor:g} of every tensor; lower one of them"
                )
        idle = [name for name, rule in self.rules.items() if rule.amount > 0 and self.schedule.final == 0]
        if idle:
            raise ConfigurationError(
                f"`final` is 0, so rule {idle[0]!r}, which follows the schedule's progress, would never prune; give a "
                "`final` above 0 and put a rule with amount 0 for '*' before it, or name its layers in `select`"
            )
        if self.schedule.initial > self.schedule.final:
            raise ConfigurationError(
                f"`initial` ({self.schedule.initial:g}) is above `final` ({self.schedule.final:g}): pruning only grows"
            )
