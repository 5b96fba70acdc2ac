"""Pruning while a model trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging, WeightAveraging
from torch import Tensor, distributed, nn

from lightning_compress.core.callback import CompressionCallback
from lightning_compress.core.errors import CompressionError, ConfigurationError, SelectionError, did_you_mean
from lightning_compress.core.paths import clean_path, get_layer, named_layers
from lightning_compress.core.plan import PlanRow
from lightning_compress.core.run import Layers
from lightning_compress.core.schedule import Schedule
from lightning_compress.core.select import Select, Selection
from lightning_compress.core.targets import PRUNABLE, Target, find_targets
from lightning_compress.pruning.allocation import SCOPES, allocate, choose_masks
from lightning_compress.pruning.fitting import fit_targets, most_pruned, rank_groups
from lightning_compress.pruning.granularity import Layout, expand_mask, layout_of, parse_granularity
from lightning_compress.pruning.masks import kept, pack_mask, unpack_mask, zero_weights
from lightning_compress.pruning.rules import Rule, as_rules, check_amounts
from lightning_compress.pruning.scorer import Scorer
from lightning_compress.pruning.scores import SCORES, check_score, find_score
from lightning_compress.pruning.threshold import NotNumbers


class IterativePruning(CompressionCallback):
    r"""Set the least important weights to zero, more and more of them, for good (Han et al. 2015, arXiv 1506.02626).

    At each update of the schedule the weights with the lowest score, by default the smallest, are masked until the
    share of zeros, :math:`s = \#\{w = 0\} / \#w` over the selected weights, equals the schedule's amount: an absolute
    target, not a share of what is left, met exactly by single weights and as nearly from below as their size allows by
    filters, blocks and other groups. Masks are applied in place right after every optimizer step, so zeros are exact
    under momentum, weight decay, mixed precision, several optimizers and gradient accumulation, and ``state_dict``
    keys, weight averaging, ``torch.compile`` and DDP see an ordinary model. Pruning happens before validation: a
    monitored metric belongs to the weights that are saved. Masks live in the checkpoint's callback state and survive
    ``fit(ckpt_path=...)`` from any point.

    Weights of Linear, convolution, recurrent and attention layers are pruned; biases, norms, embeddings and the
    last layer are left alone. Weights that are frozen at an update are left alone until the first update after they
    are unfrozen; parameters tied to a layer outside the selection are kept, and the plan names them all.

    Scores that look at gradients (``gradient``, ``movement``, ``snip``, ``obd``) collect them in float32, four bytes a
    weight, until the schedule ends; ``wanda`` looks at inputs in the batch before each update only. Both go into the
    checkpoint, and are averaged over processes. Layers that a score or a granularity does not fit (2:4 over 3 inputs,
    ``bn_scale`` without a batch norm behind it) are kept, and the plan says why.

    It makes the file smaller (``save_compressed`` codes where the weights are) but, on dense kernels, nothing faster:
    whole filters are zeroed, not cut out.

    Runs on: any device, ``ddp``; refuses sharded strategies. Put it after ``WeightAveraging`` or
    ``StochasticWeightAveraging`` in the Trainer's list.

    Args:
        schedule: When and how much; a number is the final sparsity, reached at 70 % of the run on a cubic curve.
        select: Which layers; default all that can be pruned except the last.
        scope: ``"global"`` ranks all selected weights together, ``"layer"`` prunes each tensor to the amount;
            ``"global_normalized"``, ``"erk"`` and ``"lamp"`` as in
            :func:`~lightning_compress.pruning.allocation.allocate`.
        rules: Named exceptions with an amount of their own; the last that matches a layer wins.
        floor: Least share of each tensor that stays, 0 to 1; at least one weight always does.
        score: What makes a weight worth keeping, a word of :data:`~lightning_compress.pruning.scores.SCORES`.
        granularity: What is pruned as one: ``"element"``, ``"filter"``, ``"block:4x1"``, ``"2:4"`` and more, see
            :func:`~lightning_compress.pruning.granularity.parse_granularity`; N:M asks for its own final amount.
        name: Tells two of these callbacks apart.

    Raises:
        ConfigurationError: For a value outside its range, or amounts that the floor makes unreachable.
        SelectionError: If no layer is selected, or a rule matches none.

    >>> callback = IterativePruning(Schedule(final=0.9, start="10%", end="60%"), rules={"stem": Rule("conv1", 0.5)})
    >>> callback.schedule.final
    0.9
    >>> IterativePruning(0.5, granularity="2:4", score="wanda").granularity
    '2:4'
    """

    link: ClassVar[str] = "prune"
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
        score: str = "magnitude",
        granularity: str = "element",
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
        self.score = score
        self.granularity = granularity
        self._groups = parse_granularity(granularity)
        self._scorer = Scorer(find_score(score))
        check_score(self._scorer.score, self._groups, scope)
        self._norms: dict[str, str] = {}
        self._targets: list[Target] = []
        self._rule_of: dict[str, str] = {}
        self._masks: dict[str, Tensor] = {}
        self._packed: dict[str, Tensor] = {}
        self._scratch: dict[torch.dtype, Tensor] = {}
        check_amounts(schedule, self.rules, self.floor, self._groups)

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
        targets, reasons = find_targets(root, layers)
        self._targets, unfit, self._norms = fit_targets(root, targets, self._scorer.score, self._groups)
        reasons |= unfit
        layers |= {path: get_layer(root, path) for path in self._norms.values()}
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
            action = f"prune to {amount:g}" + ("" if rule or self.scope == "layer" else f" of all ({self.scope})")
            action += f", by {self.score}" + ("" if self.granularity == "element" else f", {self.granularity}")
            most = most_pruned(weight, self._groups, layout_of(layers[target.layer]), self.floor)
            action += f", here {most:g} at most, as some have to stay" if amount > most + 1e-6 else ""
            action = "kept: the rule's amount is 0" if amount == 0 else action
            action += f", tied with {', '.join(target.tied)}" if target.tied else ""
            action = action if weight.requires_grad else f"kept while frozen, then {action}"
            rows.append(PlanRow(rule or "select", target.key, "x".join(map(str, weight.shape)), action))
        return rows

    def update(self, layers: Layers, amount: float) -> None:
        """Choose the masks for a sparsity and apply them."""
        weights = {t.key: t.weight(layers) for t in self._targets if self._may_prune(t.weight(layers), t.key)}
        rules = {t.key: self.rules.get(self._rule_of.get(t.layer, "")) for t in self._targets if t.key in weights}
        choose = self._chooser(layers, weights)
        pool = [key for key, rule in rules.items() if rule is None]
        share = min(1.0, amount / self.schedule.final) if self.schedule.final else 0.0
        try:
            self._masks.update(choose(pool, amount, self.scope) if pool else {})
            for key, rule in rules.items():
                if rule is not None and rule.amount > 0:
                    self._masks.update(choose([key], rule.amount * share, "layer"))
        except NotNumbers as error:
            bad = [key for key, weight in weights.items() if bool(weight.isnan().any())]
            where = f"weights of {bad[0]!r}" if bad else f"{self.score!r} scores of finite weights"
            raise CompressionError(f"{where}: {error}") from error
        self._scorer.updated()
        self.enforce(layers)

    def observe(self, layers: Layers) -> None:
        """Collect gradients, if the score looks at them and an update is to come."""
        if self._scorer.score.needs == "gradients" and self._run is not None:
            timeline, t = self._run.timeline, self.updates
            if not self.at_target or timeline.due(t) or not timeline.reached(t) or self.pending(layers):
                self._scorer.observe({t.key: t.weight(layers) for t in self._targets})

    def anticipate(self, layers: Layers) -> None:
        """Look at inputs, if the score needs them."""
        if self._scorer.score.needs == "inputs":
            self._scorer.watch({target.key: layers[target.layer] for target in self._targets}, self._layouts(layers))

    def release(self) -> None:
        """Stop looking at inputs, should a batch have failed."""
        self._scorer.unwatch()

    def enforce(self, layers: Layers) -> None:
        """Put the zeros back, exactly."""
        here = [(t.key, t.weight(layers)) for t in self._targets if t.layer in layers]
        zero_weights(here, self._masks, self._scratch)

    def pending(self, layers: Layers) -> bool:
        """Return whether a weight without a mask has been unfrozen since the last update."""
        spared = {path for path, name in self._rule_of.items() if self.rules[name].amount == 0}
        unmasked = (t for t in self._targets if t.key not in self._masks and t.layer not in spared)
        return any(target.weight(layers).requires_grad for target in unmasked)

    def enforce_state(self, state_dict: dict[str, Any]) -> None:
        """Put the zeros into weights that are about to be saved."""
        saved = [(clean_path(key), value) for key, value in state_dict.items() if isinstance(value, Tensor)]
        zero_weights(saved, self._masks, self._scratch)

    def metrics(self, layers: Layers) -> dict[str, float]:
        """Return ``sparsity``: the share of zeros among the selected weights."""
        total = sum(target.weight(layers).numel() for target in self._targets)
        unmasked = sum(t.weight(layers).numel() for t in self._targets if t.key not in self._masks)
        return {"sparsity": 1 - (kept(self._masks) + unmasked) / total}

    def values(self) -> dict[str, Any]:
        """Return the masks as bits, and what the score has collected."""
        masks = {key: pack_mask(mask) for key, mask in self._masks.items()} | dict(self._packed)
        return masks | self._scorer.state()

    def load_values(self, values: Mapping[str, Any]) -> None:
        """Take masks from a checkpoint; they are unpacked when the weights are at hand."""
        self._masks, self._packed = {}, self._scorer.load(values)

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
        self._scorer.attach(weights, self._layouts(layers), distributed.is_available() and distributed.is_initialized())

    def reset_values(self) -> None:
        """Forget the masks and what they belong to."""
        self._targets, self._rule_of, self._masks, self._packed, self._scratch = [], {}, {}, {}, {}
        self._scorer, self._norms = Scorer(self._scorer.score), {}

    def _select(self, root: nn.Module) -> Selection:
        try:
            return self.select.resolve(root, PRUNABLE)
        except SelectionError:
            if self.rules and self.select.include == ("*",):
                return Selection({})
            raise

    def _may_prune(self, weight: nn.Parameter, key: str) -> bool:
        blind = self._scorer.score.needs == "gradients"  # what is frozen has none: its mask stays as it is
        return weight.requires_grad or (key in self._masks and not blind) or not self.in_fit

    def _layouts(self, layers: Layers) -> dict[str, Layout]:
        return {target.key: layout_of(layers[target.layer]) for target in self._targets}

    def _chooser(
        self, layers: Layers, weights: Mapping[str, nn.Parameter]
    ) -> Callable[[Iterable[str], float, str], dict[str, Tensor]]:
        """Return what makes masks of some of the weights, at an amount and in a scope."""
        if (self.score, self.granularity) == ("magnitude", "element") and self.scope in ("global", "layer"):
            return lambda keys, amount, scope: choose_masks({k: weights[k] for k in keys}, amount, scope, self.floor)
        self._check_trains()
        layouts = self._layouts(layers)
        norms = {key: layers[path].get_parameter("weight") for key, path in self._norms.items()}
        shared = self.in_fit and distributed.is_available() and distributed.is_initialized()
        scores = self._scorer.rate_groups(weights, layouts, self._groups, norms, self.updates, shared)

        def choose(keys: Iterable[str], amount: float, scope: str) -> dict[str, Tensor]:
            ranked = {
                k: rank_groups(scores[k], weights[k], self._groups, layouts[k], self._masks.get(k), self.floor)
                for k in keys
            }
            chosen = allocate(ranked, amount, scope)
            return {k: expand_mask(mask, self._groups, layouts[k], weights[k]) for k, mask in chosen.items()}

        return choose

    def _check_trains(self) -> None:
        if self._scorer.score.needs in ("gradients", "inputs") and not self.in_fit:
            others = [repr(name) for name, score in SCORES.items() if score.needs in ("weights", "norms")]
            raise ConfigurationError(
                f"`score` {self.score!r} needs the {self._scorer.score.needs} of training batches, and `compress` has "
                f"no data: give the callback to a Trainer, or use {', '.join(others)}"
            )
