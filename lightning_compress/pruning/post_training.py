"""Pruning of trained models that moves the weights that stay, from calibration batches and without retraining."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_compress.core.calibration import calibration_batches, check_batches, require_batches
from lightning_compress.core.callback import CompressionCallback
from lightning_compress.core.errors import ConfigurationError, SelectionError, did_you_mean
from lightning_compress.core.finite import require_finite
from lightning_compress.core.first_look import check_first_batch, look_ahead
from lightning_compress.core.hessians import collect_hessians
from lightning_compress.core.journal import Edit
from lightning_compress.core.patches import CONVOLUTIONS
from lightning_compress.core.plan import PlanRow
from lightning_compress.core.run import Layers
from lightning_compress.core.schedule import Schedule
from lightning_compress.core.select import Select, Selection
from lightning_compress.core.targets import Target, find_targets
from lightning_compress.pruning.granularity import layout_of, misfit, parse_granularity
from lightning_compress.pruning.layerwise import ROW_SCOPES, TracedLayer, counts_over_layers, obc_prune, trace_layer

SCOPES = (*ROW_SCOPES, "global")
FLOOR = 0.005
"""Least share of each tensor that stays where layers are weighed against each other."""
ROOT = ""
"""Path of the model itself, which these methods run; selected beside the layers."""


class PostTrainingPruning(CompressionCallback):
    """What methods share that prune a trained model once and move the weights that stay.

    In ``compress(model, ...)`` that is all there is to it. In a Trainer nothing happens while it fits; after fit a copy
    is pruned and offered as ``callback.compressed``.

    Args:
        amount: Share of the selected weights to prune, 0 to below 1.
        batches: Calibration data, see :func:`calibration_batches`. With DDP those of the first process count.
        select: Which layers; default all of the supported types except the last.
        damping: What is added to the diagonal of the curvature, above 0.
        samples: How many calibration samples are enough.
        name: Tells two of these callbacks apart.

    Raises:
        ConfigurationError: For a value outside its range.
    """

    link: ClassVar[str] = "prune"
    prunes_after_fit: ClassVar[bool] = True
    supported: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, *CONVOLUTIONS)
    needs_example: ClassVar[bool] = False

    def __init__(
        self, amount: float, batches: Any, select: Select | None, damping: float, samples: int, name: str | None
    ) -> None:
        if isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 <= amount < 1:
            raise ConfigurationError(f"`amount` must be a number from 0 to below 1, got {amount!r}; 90 % is 0.9")
        if isinstance(damping, bool) or not isinstance(damping, int | float) or not damping > 0:
            raise ConfigurationError(f"`damping` must be a number above 0, got {damping!r}")
        check_batches(batches, samples)
        schedule = Schedule(final=float(amount), shape="once")
        super().__init__(schedule, Select(not_last=True) if select is None else select, name)
        self.batches, self.damping, self.samples = batches, float(damping), samples
        self._targets: list[Target] = []

    @abstractmethod
    def prune(self, model: nn.Module, layers: Layers, batches: list[Any]) -> None:
        """Prune the selected layers of ``model`` in place."""

    def choose(self, root: nn.Module) -> Selection:
        """Select the layers that are plain, are called and are not tied, and the model itself."""
        require_batches(self.batches)
        found = self.select.resolve(root, self.supported)
        inside = {
            id(part)
            for module in root.modules()
            if isinstance(module, nn.MultiheadAttention)
            for part in module.children()
        }
        skipped = {path: "kept: attention uses its weight without calling it" for path, m in found.layers.items()}
        skipped = {path: why for path, why in skipped.items() if id(found.layers[path]) in inside}
        layers = {path: layer for path, layer in found.layers.items() if path not in skipped}
        self._targets, reasons = find_targets(root, layers)
        left = {**found.left, **skipped, **reasons}
        if not self._targets:
            raise SelectionError(
                f"no weight of the selected layers can be pruned: {'; '.join(f'{k}: {v}' for k, v in left.items())}"
            )
        return Selection({ROOT: root, **{target.layer: layers[target.layer] for target in self._targets}}, left)

    def examine(self, root: nn.Module, example_inputs: Any) -> Selection:
        """Refuse calibration data that the model cannot run on, or that is no numbers, before it is trained."""
        check_first_batch(root, self.batches)
        if not self.at_once:
            layers = {path: layer for path, layer in self.layers(root).items() if path != ROOT}
            look_ahead(root, layers, self.batches, self.samples)
        return Selection(self.layers(root), dict(self._left))

    def plan(self, layers: Layers) -> list[PlanRow]:
        """Return a row for each weight."""
        action = f"prune to {self.schedule.final:g} after fit, on a copy"
        shapes = {target.key: target.weight(layers).shape for target in self._targets}
        return [PlanRow("select", key, "x".join(map(str, shape)), action) for key, shape in shapes.items()]

    def update(self, layers: Layers, amount: float) -> None:
        """Prune, unless a Trainer is training the model now."""
        if not self.in_fit:
            self._prune_all(layers)

    def finalize(self, layers: Layers) -> Iterable[Edit]:
        """Prune the copy of a model that a Trainer has trained."""
        if self.in_fit:
            self._prune_all(layers)
        return ()

    def metrics(self, layers: Layers) -> dict[str, float]:
        """Return ``sparsity``: the share of zeros among the selected weights; of the model in training, before."""
        weights = [target.weight(layers) for target in self._targets]
        zeros = sum(weight.numel() - int(torch.count_nonzero(weight)) for weight in weights)
        return {"sparsity": zeros / sum(weight.numel() for weight in weights)}

    def reset_values(self) -> None:
        """Forget the weights of another model."""
        self._targets = []

    def _prune_all(self, layers: Layers) -> None:
        chosen = {path: layer for path, layer in layers.items() if path != ROOT}
        batches = list(calibration_batches(self.batches, self.samples))
        require_finite(layers[ROOT], chosen, batches)
        self.prune(layers[ROOT], chosen, batches)
        if self.in_fit and torch.distributed.is_available() and torch.distributed.is_initialized():
            for layer in chosen.values():  # processes may have read different batches: the first decides for all
                for parameter in layer.parameters(recurse=False):
                    torch.distributed.broadcast(parameter.data, 0)


class OptimalBrainCompression(PostTrainingPruning):
    r"""Prune each layer so that its outputs change least, and move the rest to make up for it (arXiv:2208.11580).

    For every output row the squared error on calibration data is a quadratic with Hessian :math:`H = 2 X X^\top`.
    Weights go greedily by :math:`w_p^2 / [H^{-1}]_{pp}`; those that stay are the least-squares solution on their
    support, and so is the bias. Needs no labels and no retraining. Layer-wise errors add up through the network: far
    beyond 90 % a few epochs of fine-tuning do more.

    It takes about ``out * in^3`` operations in float64 per layer, two to three minutes for a layer with 1,000 inputs
    and outputs on one core, and is meant for inputs up to a few thousand. Frozen layers are pruned too.

    Runs on: CPU and CUDA, ``ddp``. A batch is ``inputs`` or ``(inputs, targets)``; inputs are a tensor, a tuple of
    several positional ones, or a mapping of keywords (of which those that ``forward`` does not take are left out).

    Args:
        amount: Share of zeros, 0 to below 1; of each layer, unless ``scope`` is ``"global"``.
        batches: Calibration data: a tensor, a list of batches, a loader, or a data module (its training data).
        select: Which layers; default all Linear and Conv1d/2d/3d except the last.
        scope: ``"layer"`` weighs the rows of a layer against each other, ``"row"`` prunes each to the amount,
            ``"global"`` weighs all layers against each other, by the error of each as a share of its output; every
            layer keeps 0.5 %.
        damping: Share of the Hessian's mean diagonal that is added to its diagonal.
        samples: How many calibration samples are enough; whole batches are used.
        granularity: ``"element"``, or a pattern such as ``"2:4"`` of which each N of M consecutive inputs stay; then
            the amount is the pattern's, and layers whose inputs are no multiple of M are left alone. Not together with
            ``scope="global"``: a pattern gives every layer the same amount.
        name: Tells two of these callbacks apart.

    Raises:
        ConfigurationError: For a value outside its range, or a layer that the batches never reach.
        SelectionError: If no layer is selected.

    >>> from lightning_compress import compress
    >>> net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> pruned = compress(net, OptimalBrainCompression(0.75, batches=torch.randn(64, 8)))
    >>> int((pruned[0].weight == 0).sum())
    24
    """

    def __init__(
        self,
        amount: float,
        batches: Any = None,
        select: Select | None = None,
        scope: str = "layer",
        damping: float = 0.01,
        samples: int = 1024,
        granularity: str = "element",
        name: str | None = None,
    ) -> None:
        super().__init__(amount, batches, select, damping, samples, name)
        if scope not in SCOPES:
            raise ConfigurationError(f"`scope` is {scope!r}: {did_you_mean(str(scope), SCOPES)}")
        self.scope, self.granularity = scope, parse_granularity(granularity)
        if self.granularity.kind not in ("element", "n:m"):
            raise ConfigurationError(f"`granularity` must be 'element' or a pattern such as '2:4', got {granularity!r}")
        final = self.granularity.final
        if final is not None and not math.isclose(amount, final):
            raise ConfigurationError(f"`amount` is {amount:g}, but {granularity!r} removes {final:g}; write {final!r}")
        if final is not None and scope == "global":
            raise ConfigurationError(
                f"`scope` 'global' gives each layer an amount of its own, {granularity!r} all the same; use 'layer'"
            )

    def choose(self, root: nn.Module) -> Selection:
        """Select as the others do, and leave out what a pattern does not fit."""
        selection = super().choose(root)
        unfit = {
            target.key: f"kept: {why}"
            for target in self._targets
            if (
                why := misfit(
                    target.weight(selection.layers).shape, self.granularity, layout_of(selection.layers[target.layer])
                )
            )
        }
        self._targets = [target for target in self._targets if target.key not in unfit]
        if not self._targets:
            raise SelectionError(
                f"no layer fits {str(self.granularity)!r}: {'; '.join(f'{k}: {v}' for k, v in unfit.items())}"
            )
        kept = {ROOT, *(target.layer for target in self._targets)}
        return Selection({p: m for p, m in selection.layers.items() if p in kept}, {**selection.left, **unfit})

    def prune(self, model: nn.Module, layers: Layers, batches: list[Any]) -> None:
        """Prune every layer by the inputs that it has in the model as it was."""
        hessians = collect_hessians(model, layers, batches)
        traced: dict[str, TracedLayer] = {}
        for path, layer in layers.items():
            weight, bias = layer.get_parameter("weight"), dict(layer.named_parameters(recurse=False)).get("bias")
            try:
                if self.scope == "global":
                    traced[path] = trace_layer(weight, bias, hessians.pop(path), self.damping)
                else:
                    scope, damping = self.scope, self.damping
                    new = obc_prune(
                        weight, bias, hessians.pop(path), self.schedule.final, scope, damping, self.granularity
                    )
                    _put(layer, *new)
            except ConfigurationError as error:
                raise ConfigurationError(f"{path!r}: {error}") from error
        for path, count in counts_over_layers(traced, self.schedule.final, FLOOR).items() if traced else ():
            _put(layers[path], *traced.pop(path).prune(count))


def _put(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    layer.get_parameter("weight").data.copy_(weight)
    if bias is not None:
        layer.get_parameter("bias").data.copy_(bias)
