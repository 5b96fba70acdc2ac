"""Low-rank factorization of trained models, of models that train on, and of models that train from scratch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_compress.core.calibration import check_batches
from lightning_compress.core.callback import CompressionCallback
from lightning_compress.core.errors import ConfigurationError, SelectionError, did_you_mean
from lightning_compress.core.examples import own_example
from lightning_compress.core.first_look import check_first_batch, look_ahead
from lightning_compress.core.journal import Edit
from lightning_compress.core.latency import LatencyGoal
from lightning_compress.core.paths import get_layer
from lightning_compress.core.plan import PlanRow, render_plan
from lightning_compress.core.progress import slow
from lightning_compress.core.run import Layers
from lightning_compress.core.schedule import Schedule
from lightning_compress.core.select import Select, Selection
from lightning_compress.low_rank.factors import Factors, as_factors
from lightning_compress.low_rank.goals import Goal, resolve_goal
from lightning_compress.low_rank.layers import Factorized
from lightning_compress.low_rank.ranking import RankSearch
from lightning_compress.low_rank.selection import factorized, find_layers, takes_norm
from lightning_compress.low_rank.shapes import LAYERS
from lightning_compress.low_rank.tables import count_weights, layer_text, shape_text, sizes_of

WHEN = ("after", "before")
ROOT = ""
"""Path of the model itself, selected beside the layers."""


class LowRank(CompressionCallback):
    r"""Write layers as products of smaller ones: fewer weights, fewer operations, faster on any kernel.

    :math:`W \approx B A` of rank k: a layer with m outputs of n inputs keeps :math:`k (m + n)` of its :math:`m n`
    weights. Kernels are separated along their axes (Tai et al. 2016, arXiv 1511.06067), all else by an SVD of channels,
    or by the method that ``factors`` names. Ranks are given, found in the weights, or chosen so that the whole model
    meets a goal, with what each rank of each layer costs in output error.

    What would grow, or do more operations, stays as it is, and the plan says so; so do tied weights, depthwise
    convolutions, recurrent layers, and attention, which reads the weight of ``out_proj`` without calling it. Layers
    that hardly share directions (a network at its random initialization) lose much at any rank; and a closed form is a
    start: from about twofold compression on, train on. Repeat it to compress step by step with training in between
    (MUSCO, Gusak et al. 2019, arXiv 1903.09973): a goal is relative to the model as it is, and factors are multiplied
    out and split at smaller ranks, so that a layer remains as many factors as its method makes.

    Runs on: any device, ``ddp``; refuses sharded strategies. Put it after ``WeightAveraging`` or
    ``StochasticWeightAveraging`` in the Trainer's list if it works after fit.

    Args:
        compression_rate: How many times fewer parameters the whole model should have, above 1.
        macs: Share of multiply-accumulate operations that remains, between 0 and 1.
        latency: Share of the time of a forward pass that remains, or a :class:`LatencyGoal` such as
            ``{"ms": 5.0, "batch": 1}``, measured on this machine.
        factors: A method (``"auto"``, ``"spatial_svd"``, ``"svd"``, ...), a rank, ``"evbmf"``, or a :class:`Factors` or
            mapping such as ``{"rank": {"energy": 0.9}, "round_to": 8}`` with ``rules`` for single layers. It gives the
            ranks if there is no goal.
        when: ``"after"`` factorizes a copy after fit, ``callback.compressed``; ``"before"`` factorizes the module
            before its optimizers exist, so that it trains as factors. Ranks chosen then are part of every checkpoint.
            In ``compress`` both are the same.
        select: Which layers; default all that can be factorized.
        batches: Calibration data (a tensor, a list of batches, a loader, a data module) by whose inputs errors are
            weighed; without it the error of the weights counts. With ``factors={"keep": "outputs"}`` the factors
            themselves are those that keep the outputs for it (activation-aware SVD).
        name: Tells two of these callbacks apart.

    Raises:
        ConfigurationError: For a value outside its range, none or two of goal and rank, or a goal that cannot be
            reached; says what can.
        SelectionError: If no layer is selected, or none of them can be factorized.

    >>> import lightning_compress as lc
    >>> net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> smaller = lc.compress(net, LowRank(factors=8))
    >>> smaller[0].ranks, sum(p.numel() for p in smaller.parameters()), sum(p.numel() for p in net.parameters())
    ((8,), 1434, 2762)
    """

    supported: ClassVar[tuple[type[nn.Module], ...]] = LAYERS
    runs_after: ClassVar[tuple[type[Callback], ...]] = (WeightAveraging, StochasticWeightAveraging)
    conflicts_with: ClassVar[tuple[type[Callback], ...]] = (ModelPruning,)
    needs_example: ClassVar[bool] = False
    _searches_with: ClassVar[type[RankSearch]] = RankSearch

    def __init__(
        self,
        compression_rate: float | None = None,
        macs: float | None = None,
        latency: LatencyGoal | float | Mapping[str, Any] | None = None,
        factors: Factors | str | int | Mapping[str, Any] | None = None,
        when: str = "after",
        select: Select | None = None,
        batches: Any = None,
        name: str | None = None,
    ) -> None:
        if when not in WHEN:
            raise ConfigurationError(f"`when` is {when!r}: {did_you_mean(str(when), WHEN)}")
        super().__init__(Schedule(final=1.0, shape="once"), Select() if select is None else select, name)
        self.factors = as_factors(factors)
        self.goal: Goal | None = resolve_goal(compression_rate, macs, latency, self.factors)
        check_batches(batches, self.factors.samples)
        if self.factors.keep == "outputs" and batches is None:
            raise ConfigurationError("`factors` keeps `outputs`, which takes data: give calibration `batches` too")
        self.when, self.batches = when, batches
        self.replaces_after_fit = self.remakes_after_fit = when == "after"
        self._search = self._searches_with(self.goal, self.factors, batches)
        self._methods: dict[str, str] = {}

    def choose(self, root: nn.Module) -> Selection:
        """Select the layers that can be factorized, and the model itself; the others are named with the reason."""
        if not self.at_once and self._search.made(root):  # a copy of the model that was factorized before
            paths = list(self._search.decisions)
            return Selection({ROOT: root, **{path: get_layer(root, path) for path in paths}}, dict(self._left))
        self._search = self._searches_with(self.goal, self.factors, self.batches)
        selection, self._methods = find_layers(root, self.select, self.factors)
        if not self._methods:
            reasons = "; ".join(f"{path}: {why}" for path, why in list(selection.left.items())[:8])
            raise SelectionError(f"no layer of {type(root).__name__} can be factorized: {reasons}")
        return Selection({ROOT: root, **selection.layers}, selection.left)

    def prepare(self, layers: Layers) -> Iterable[Edit]:
        """Factorize before training, if that is wanted: once, unless the factors are not there any more."""
        decided = any(path in factorized(layers) for path, one in self._search.decisions.items() if one.ranks)
        if self.when != "before" or self.at_once or decided:
            return ()
        if not self._search.decisions:
            self._search.example = own_example(layers[ROOT])
            self._decide(layers)
        return self._edits(layers)

    def examine(self, root: nn.Module, example_inputs: Any) -> Selection:
        """Keep the example, and refuse goals that cannot be reached before the model trains for them."""
        layers = {path: layer for path, layer in self.layers(root).items() if path != ROOT}
        if self.when == "after" and not self.at_once and self.batches is not None:
            check_first_batch(root, self.batches)
            look_ahead(root, layers, self.batches, self.factors.samples)
        self._search.example = example_inputs
        if self.when == "after" and not self.at_once:
            self._search.check(root, layers, self._methods)
        return Selection({ROOT: root, **layers}, dict(self._left))

    def plan(self, layers: Layers) -> list[PlanRow]:
        """Return a row for each layer: method, ranks and what they save, or why it stays; and their sum."""
        mine = {path: layer for path, layer in layers.items() if path != ROOT}
        return [*(self._row(path, layer) for path, layer in mine.items()), *_sum(list(mine.values()))]

    def update(self, layers: Layers, amount: float) -> None:
        """Choose the ranks, unless a Trainer is training the model now."""
        if self.at_once:
            self._decide(layers)

    def finalize(self, layers: Layers) -> Iterable[Edit]:
        """Factorize the copy of a model that a Trainer has trained."""
        if self.at_once:
            return self._edits(layers)
        if self.when == "before":
            return ()
        self._decide(layers)
        return self._edits(layers)

    def metrics(self, layers: Layers) -> dict[str, float]:
        """Return ``parameters``: the share that is left of those of the selected layers, and a measured ``latency``.

        In ``compress`` also ``output_error``: the sum over layers of the relative error of their outputs, as estimated.
        """
        before = after = 0
        for path, layer in layers.items():
            if path != ROOT:
                decision = self._search.decisions.get(path) if self.at_once else None
                one, other = sizes_of(layer, decision, self.factors.batch_norm)
                before, after = before + one, after + other
        figures = self._search.figures
        timed = {"latency": figures["after_ms"] / figures["before_ms"]} if figures else {}
        lost = sum(decision.error for decision in self._search.decisions.values())
        return {"parameters": after / before, **timed, **({"output_error": lost} if self.at_once else {})}

    def values(self) -> dict[str, Any]:
        """Return what was measured."""
        return self._search.values()

    def load_values(self, values: Mapping[str, Any]) -> None:
        """Take what was measured from a checkpoint."""
        self._search.load_values(values)

    def _decide(self, layers: Layers) -> None:
        self._search.decide(
            layers[ROOT], {path: layer for path, layer in layers.items() if path != ROOT}, self._methods
        )
        noisy = [path for path, decision in self._search.decisions.items() if decision.noisy]
        if noisy:
            rank_zero_warn(
                f"{self.state_key}: variational Bayes finds nothing but noise in {', '.join(noisy[:4])}, so the "
                "smallest rank was taken; are these weights trained?"
            )
        figures = self._search.figures
        if figures and figures["after_ms"] > figures["target_ms"]:
            rank_zero_warn(
                f"{self.state_key}: measured {figures['after_ms']:.3g} ms, the goal was {figures['target_ms']:.3g} ms; "
                "is the machine busy?"
            )

    def _edits(self, layers: Layers) -> list[Edit]:
        edits, rows, left = [], [], []
        for path, decision in slow(list(self._search.decisions.items()), "Factorizing"):
            layer, row = layers[path], self._row(path, layers[path])
            if decision.ranks:
                norm = self.factors.batch_norm and takes_norm(layer)
                found = self._search.factorize(path, layer, norm)
                lost = decision.error if found.output_error is None else found.output_error
                of_outputs = f", of outputs {lost:.3g}" if lost else ""
                row = self._row(path, found.module, f", error of the weight {found.error:.3g}{of_outputs}")
                edits.append(found.edit(path))
                layer = found.module
            rows.append(row)
            left.append(layer)
        self._search.forget()
        kept = [PlanRow("kept", path, "", why) for path, why in self._left.items()]
        self.plan_text = render_plan(f"{self.state_key}: {self.goal or 'given ranks'}", [*rows, *_sum(left), *kept])
        rank_zero_info(self.plan_text)
        return edits

    def _row(self, path: str, layer: nn.Module, more: str = "") -> PlanRow:
        decision = self._search.decisions.get(path)
        shape = shape_text(layer.shape) if isinstance(layer, Factorized) else layer_text(layer)
        if decision is None:
            action = f"{self._methods[path]} after fit"
        elif isinstance(layer, Factorized):
            before, after = sizes_of(layer, None, False)
            why = f"; stays: {decision.why}" if decision.why else more
            action = f"{layer.method}, rank {_times(layer.ranks)}: {before:,} to {after:,} parameters{why}"
        else:
            action = f"stays: {decision.why or 'as it was saved'}"
        return PlanRow("select", path, shape, action)


def _sum(layers: Sequence[nn.Module]) -> list[PlanRow]:
    """Return a row about all selected layers, once some of them are factors."""
    if not any(isinstance(layer, Factorized) for layer in layers):
        return []
    before, after = (sum(numbers) for numbers in zip(*map(count_weights, layers), strict=True))
    words = f"{before:,} to {after:,} weights, {before / after:.2f} times fewer; biases and norms not counted"
    return [PlanRow("sum", f"{len(layers)} layers", "", words)]


def _times(ranks: tuple[int, ...]) -> str:
    return " x ".join(map(str, ranks))
