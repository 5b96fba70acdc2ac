"""Training that makes weights, filters, channels or whole layers zero by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.core.callback import CompressionCallback
from lightning_compress.core.errors import ConfigurationError, SelectionError, did_you_mean
from lightning_compress.core.paths import get_layer, named_layers
from lightning_compress.core.plan import PlanRow
from lightning_compress.core.rules import build_rules
from lightning_compress.core.run import Layers
from lightning_compress.core.schedule import Schedule
from lightning_compress.core.select import Select, Selection
from lightning_compress.pruning.sparsity.groups import (
    BN_SCALE,
    GroupTarget,
    find_groups,
    layer_types,
    parse_groups,
    zero_groups,
)
from lightning_compress.pruning.sparsity.penalties import (
    LAYER,
    group_lasso,
    group_lasso_gradient,
    group_soft_threshold,
)
from lightning_compress.pruning.sparsity.rules import StrengthRule, check_rising, checked_strength
from lightning_compress.pruning.sparsity.zeros import StayingZeros

MODES = ("proximal", "penalty")


class SparsityRegularization(CompressionCallback):
    r"""Train with a penalty that makes groups of weights zero: L1, group lasso, batch-norm slimming.

    The loss becomes :math:`L(w) + \lambda \sum_g \sqrt{|g|} \lVert w_g \rVert_2` over the groups g of ``granularity``:
    single weights (L1), filters, channels, shapes or layers (Structured Sparsity Learning, Wen et al., arXiv
    1608.03665), or the scales of batch norms (network slimming, Liu et al., arXiv 1708.06519). A bias belongs to the
    group of its filter, so that a zero filter gives zero. Combine kinds of groups by callbacks with a ``name`` each.

    With ``mode="proximal"`` every optimizer step is followed by the penalty's proximal operator at the learning rate of
    the weight's parameter group, :math:`\tau = \eta \lambda`, which gives exact zeros; with Adam this is decoupled from
    the gradient's scaling, as AdamW's weight decay is. With ``mode="penalty"`` the (sub)gradient of the penalty is
    added to the gradients right before the step: after unscaling and accumulation, before clipping, so the same as
    adding the penalty to the loss, once an update. (LBFGS, which asks for the loss itself, cannot take it.) Momentum m
    carries gradients 1/(1-m) times as far as the rate says, but not proximal steps: they need a larger strength.

    The schedule says which share of the strength acts. When it reaches its end, what is zero (or below ``threshold``)
    becomes exactly zero and stays so, the batch norm behind a zero filter falls silent too, and the penalty ends: the
    rest of the run trains what is left without shrinking it. Zeros hold as those of ``IterativePruning`` do. Follow
    with ``ZeroChannelRemoval``, in the same fit or later, to really cut zero filters and channels out.

    It needs training: ``compress(model, ...)`` refuses it. It makes the file smaller, and nothing faster by itself.

    Runs on: any device, ``ddp``; refuses sharded strategies. Put it after ``WeightAveraging`` or
    ``StochasticWeightAveraging`` in the Trainer's list.

    Args:
        strength: :math:`\lambda` at the end of the schedule, at least 0. A weight that no gradient holds moves towards
            zero by :math:`\eta \lambda` a step: try 0.03 to 0.3 for proximal steps with Adam, 1e-4 to 1e-2 else.
        granularity: What becomes zero as one, see :func:`~lightning_compress.pruning.sparsity.groups.parse_groups`;
            ``"layer"`` takes only layers that a shortcut leads around.
        schedule: Share of the strength over time; default cubic from 0 to 1 at 80 % of the run. It must rise.
        mode: ``"proximal"`` or ``"penalty"``.
        select: Which layers; default all but the last (for ``"bn_scale"`` all batch norms).
        rules: Named exceptions with a strength of their own; the last that matches a layer wins.
        threshold: At the end of the schedule, groups whose root mean square is at most this share of that of the
            largest group of the tensor (for ``"layer"``: of all) become zero; 0 to below 1, 0 for exact zeros only.
        name: Tells two of these callbacks apart.

    Raises:
        ConfigurationError: For a value outside its range, a schedule that does not rise, or a layer without shortcut.
        SelectionError: If no layer is selected, or a rule matches none.

    >>> SparsityRegularization(1e-3, "filter", rules={"stem": StrengthRule("conv1", 1e-4)}).schedule.end
    '80%'
    """

    link: ClassVar[str] = "prune"
    runs_after: ClassVar[tuple[type[Callback], ...]] = (WeightAveraging, StochasticWeightAveraging)
    conflicts_with: ClassVar[tuple[type[Callback], ...]] = (ModelPruning,)

    def __init__(
        self,
        strength: float,
        granularity: str = "element",
        schedule: Schedule | None = None,
        mode: str = "proximal",
        select: Select | None = None,
        rules: Mapping[str, StrengthRule] | None = None,
        threshold: float = 0.01,
        name: str | None = None,
    ) -> None:
        self.strength = checked_strength(strength, "`strength`")
        self._groups = parse_groups(granularity)
        schedule = Schedule(final=1.0, end="80%") if schedule is None else schedule
        default = Select(not_last=self._groups.kind != BN_SCALE)
        super().__init__(schedule, default if select is None else select, name)
        check_rising(schedule)
        if mode not in MODES:
            raise ConfigurationError(f"`mode` is {mode!r}: {did_you_mean(str(mode), MODES)}")
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold < 1:
            raise ConfigurationError(f"`threshold` must be a number from 0 to below 1, got {threshold!r}")
        self.granularity, self.mode, self.threshold = granularity, mode, float(threshold)
        self.rules = build_rules(rules, StrengthRule, "strength")
        self._targets: list[GroupTarget] = []
        self._strengths: dict[str, tuple[str, float]] = {}
        self._zeros = StayingZeros()

    def choose(self, root: nn.Module) -> Selection:
        """Select the layers, those that only a rule names included, and find their groups."""
        types = layer_types(self._groups)
        selection = self._select(root, types)
        layers, left, rule_of = dict(selection.layers), dict(selection.left), dict[str, str]()
        for name, rule in self.rules.items():
            try:
                ruled = rule.select.resolve(root, types).layers
            except SelectionError as error:
                raise SelectionError(f"rule {name!r}: {error}") from error
            layers |= ruled
            rule_of |= dict.fromkeys(ruled, name)
        layers = {path: layer for path, layer in named_layers(root).items() if path in layers}
        found = find_groups(root, layers, self._groups)
        left = {path: why for path, why in left.items() if path not in layers} | dict(found.left)
        self._check_found(found.targets, left)
        self._targets = found.targets
        own = {path: (name, self.rules[name].strength) for path, name in rule_of.items()}
        self._strengths = {t.key: own.get(t.target.layer, ("select", self.strength)) for t in found.targets}
        paths = {t.target.layer for t in found.targets} | {t.norm for t in found.targets if t.norm is not None}
        return Selection({path: get_layer(root, path) for path in named_layers(root) if path in paths}, left)

    def plan(self, layers: Layers) -> list[PlanRow]:
        """Return a row for each tensor: its groups, how many of them are zero already, and the strength."""
        rows = []
        for target in self._targets:
            rule, strength = self._strengths[target.key]
            action = f"shrink at {strength:g} ({self.granularity}, {self.mode}) {target.describe(layers)}"
            weight = target.target.weight(layers)
            action = action if weight.requires_grad else f"kept while frozen, then {action}"
            rows.append(PlanRow(rule, target.key, "x".join(map(str, weight.shape)), action))
        return rows

    def before_step(self, layers: Layers, optimizer: Optimizer, scale: float) -> None:
        """Add the gradient of the penalty, for mode ``"penalty"``."""
        if self.mode != "penalty" or self.at_target:
            return
        for target, _ in self._trained(layers, optimizer):
            weight, bias = target.tensors(layers)
            gradients = group_lasso_gradient(weight, target.granularity, target.layout, bias)
            for parameter, gradient in zip((weight, bias), gradients, strict=True):
                if parameter is not None and gradient is not None:
                    _add_gradient(parameter, gradient * (self._now(target) * scale))

    def after_step(self, layers: Layers, optimizer: Optimizer) -> None:
        """Shrink the groups, for mode ``"proximal"``."""
        if self.mode != "proximal" or self.at_target:
            return
        for target, rate in self._trained(layers, optimizer):
            weight, bias = target.tensors(layers)
            new, new_bias = group_soft_threshold(
                weight, self._now(target) * rate, target.granularity, target.layout, bias
            )
            weight.copy_(new)
            if bias is not None and new_bias is not None:
                bias.copy_(new_bias)

    def update(self, layers: Layers, amount: float) -> None:
        """At the end of the schedule choose the groups that stay zero; before it, warn where nothing would be left."""
        if not self.in_fit:
            raise ConfigurationError(
                "SparsityRegularization works while a model trains, and `compress` does not train: give it to a "
                "Trainer as a callback. For a trained model use IterativePruning or StructuredPruning"
            )
        zero = zero_groups(self._targets, layers, self.threshold)
        for target in self._targets:
            if bool(zero[target.key].all()) and target.granularity.kind != LAYER and not self.at_target:
                rank_zero_warn(
                    f"{self.state_key}: every group of {target.key!r} is zero; unless a shortcut leads around it, "
                    "nothing gets through the layer any more. Lower `strength`, or give it a rule of its own"
                )
        if amount >= self.schedule.final and not self._zeros.masks:
            for target in self._targets:
                if target.tensors(layers)[0].requires_grad:
                    self._zeros.masks |= target.silence(zero[target.key], layers)
            self.enforce(layers)

    def enforce(self, layers: Layers) -> None:
        """Put the zeros back, exactly."""
        self._zeros.enforce(layers)

    def enforce_state(self, state_dict: dict[str, Any]) -> None:
        """Put the zeros into weights that are about to be saved."""
        self._zeros.enforce_state(state_dict)

    def metrics(self, layers: Layers) -> dict[str, float]:
        """Return the ``penalty``, the ``strength``, and how many of all ``groups`` are zero, also for each tensor.

        Groups below the threshold count as zero, as they will be.
        """
        zero = {key: int(flags.sum()) for key, flags in zero_groups(self._targets, layers, self.threshold).items()}
        total = sum(target.norms(layers).numel() for target in self._targets)
        penalty = 0.0
        for target in self._targets:
            weight, bias = target.tensors(layers)
            penalty += self._now(target) * float(group_lasso(weight, target.granularity, target.layout, bias))
        return {
            "penalty": penalty,
            "strength": self._share * self.strength,
            "groups": float(total),
            "zero_groups": float(sum(zero.values())),
            **{f"zero_groups/{key}": float(count) for key, count in zero.items()},
        }

    def values(self) -> dict[str, Any]:
        """Return the masks as bits, once they are chosen."""
        return self._zeros.state()

    def load_values(self, values: Mapping[str, Any]) -> None:
        """Take masks from a checkpoint; they are unpacked when the weights are at hand."""
        self._zeros.load(values)

    def attach_values(self, layers: Layers) -> None:
        """Unpack loaded masks for the tensors they belong to."""
        self._zeros.attach(layers)

    def reset_values(self) -> None:
        """Forget the masks and what they belong to."""
        self._targets, self._strengths, self._zeros = [], {}, StayingZeros()

    @property
    def _share(self) -> float:
        return self._amount or 0.0

    def _now(self, target: GroupTarget) -> float:
        """Return the present strength for a tensor."""
        return self._share * self._strengths[target.key][1]

    def _trained(self, layers: Layers, optimizer: Optimizer) -> list[tuple[GroupTarget, float]]:
        """Return the targets whose weight ``optimizer`` changes and the penalty acts on, with their learning rates."""
        rates = {id(p): group.get("lr") for group in optimizer.param_groups for p in group["params"]}
        found = []
        for target in self._targets:
            weight = target.target.weight(layers) if target.target.layer in layers else None
            if weight is None or not weight.requires_grad or id(weight) not in rates or self._now(target) == 0:
                continue
            if rates[id(weight)] is None and self.mode == "proximal":
                raise ConfigurationError(
                    f"{type(optimizer).__name__} has no learning rate `lr` for {target.key!r}, which proximal steps "
                    "are scaled with; use mode='penalty'"
                )
            found.append((target, float(rates[id(weight)] or 0.0)))
        return found

    def _select(self, root: nn.Module, types: tuple[type[nn.Module], ...]) -> Selection:
        try:
            return self.select.resolve(root, types)
        except SelectionError:
            if self.rules and self.select.include == ("*",):
                return Selection({})
            raise

    def _check_found(self, targets: list[GroupTarget], left: Mapping[str, str]) -> None:
        why = "; ".join(f"{path}: {reason}" for path, reason in left.items())
        named = {*self.select.include, *(path for rule in self.rules.values() for path in rule.include)}
        missed = [key for key in left if key.rpartition(".")[0] in named] if self._groups.kind == LAYER else []
        if missed:
            raise ConfigurationError(
                f"`granularity` 'layer' cannot remove {missed[0]!r}: {left[missed[0]].removeprefix('kept: ')}; "
                "leave it out, or use 'filter'"
            )
        if not targets:
            raise SelectionError(f"no tensor of the selected layers has groups to shrink: {why}")


def _add_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = gradient.to(parameter.dtype)
    else:
        parameter.grad.add_(gradient)
