"""Pruning of trained models that moves the weights that stay, from calibration batches and without retraining."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_compress.core.callback import CompressionCallback
from lightning_compress.core.errors import ConfigurationError, SelectionError, did_you_mean
from lightning_compress.core.journal import Edit
from lightning_compress.core.plan import PlanRow
from lightning_compress.core.run import Layers
from lightning_compress.core.schedule import Schedule
from lightning_compress.core.select import Select, Selection
from lightning_compress.pruning.allocation import choose_masks
from lightning_compress.pruning.calibration import (
    Loss,
    calibration_batches,
    check_batches,
    collect_hessians,
    require_batches,
    sample_gradients,
)
from lightning_compress.pruning.layerwise import ROW_SCOPES, obc_prune
from lightning_compress.pruning.patches import CONVOLUTIONS
from lightning_compress.pruning.targets import Target, find_targets
from lightning_compress.pruning.woodfisher import FisherInverse, woodfisher_saliency, woodfisher_update

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

    supported: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, *CONVOLUTIONS)

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
        self.prune(layers[ROOT], chosen, list(calibration_batches(self.batches, self.samples)))
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

    Every selected layer is pruned to the amount. It takes about ``out * in^3 / 3`` operations in float64 per layer, so
    some minutes for a layer with 1,000 inputs and outputs on one core, and is meant for inputs up to a few thousand.
    Frozen layers are pruned too.

    Runs on: CPU and CUDA, ``ddp``. A batch is called as ``model(batch)``, ``model(batch[0])`` or ``model(**batch)``.

    Args:
        amount: Share of zeros in each layer, 0 to below 1.
        batches: Calibration data: a tensor, a list of batches, a loader, or a data module (its training data).
        select: Which layers; default all Linear and Conv1d/2d/3d except the last.
        scope: ``"layer"`` weighs the rows of a layer against each other, ``"row"`` prunes each to the amount.
        damping: Share of the Hessian's mean diagonal that is added to its diagonal.
        samples: How many calibration samples are enough; whole batches are used.
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
        name: str | None = None,
    ) -> None:
        super().__init__(amount, batches, select, damping, samples, name)
        if scope not in ROW_SCOPES:
            raise ConfigurationError(f"`scope` is {scope!r}: {did_you_mean(str(scope), ROW_SCOPES)}")
        self.scope = scope

    def prune(self, model: nn.Module, layers: Layers, batches: list[Any]) -> None:
        """Prune every layer by the inputs that it has in the model as it was."""
        hessians = collect_hessians(model, layers, batches)
        for path, layer in layers.items():
            weight, bias = layer.get_parameter("weight"), dict(layer.named_parameters(recurse=False)).get("bias")
            try:
                new = obc_prune(weight, bias, hessians.pop(path), self.schedule.final, self.scope, self.damping)
            except ConfigurationError as error:
                raise ConfigurationError(f"{path!r}: {error}") from error
            weight.data.copy_(new[0])
            if bias is not None and new[1] is not None:
                bias.data.copy_(new[1])


class FisherPruning(PostTrainingPruning):
    r"""Prune where the loss rises least by its empirical Fisher information (WoodFisher, arXiv:2004.14340).

    All layers are ranked together by :math:`w_q^2 / (2 [F^{-1}]_{qq})`, with F from the gradients of single
    samples in blocks of consecutive weights; the weights of a block that stay move to make up for those that go. With
    ``block=1`` that is Optimal Brain Damage: the diagonal alone, and no update.

    Needs labels. Takes ``weights * block`` numbers of memory, and the time of one backward pass and three passes over
    those numbers per sample. The quadratic is trusted only near the trained weights: beyond some sparsity, repeat it in
    steps with fine-tuning between.

    Runs on: any device, ``ddp``. A batch is a pair of inputs and targets.

    Args:
        amount: Share of zeros over all selected weights, 0 to below 1; each tensor keeps at least 0.5 %.
        batches: As in :class:`OptimalBrainCompression`, with targets.
        loss: Called with output and target of one sample; default cross entropy.
        select: Which layers; default all Linear and Conv1d/2d/3d except the last.
        block: Weights per block, at least 1.
        damping: What is added to the diagonal of F, above 0.
        samples: How many gradients to use.
        name: Tells two of these callbacks apart.

    Raises:
        ConfigurationError: For a value outside its range, or batches without targets.
        SelectionError: If no layer is selected.

    >>> from lightning_compress import compress
    >>> net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> pairs = [(torch.randn(32, 8), torch.randint(0, 2, (32,)))]
    >>> pruned = compress(net, FisherPruning(0.75, batches=pairs, block=8))
    >>> int((pruned[0].weight == 0).sum())
    24
    """

    FLOOR: ClassVar[float] = 0.005
    """Least share of each tensor that stays."""

    def __init__(
        self,
        amount: float,
        batches: Any = None,
        loss: Loss | None = None,
        select: Select | None = None,
        block: int = 50,
        damping: float = 1e-5,
        samples: int = 512,
        name: str | None = None,
    ) -> None:
        super().__init__(amount, batches, select, damping, samples, name)
        if loss is not None and not callable(loss):
            raise ConfigurationError(f"`loss` must be callable with output and target, got {loss!r}")
        if isinstance(block, bool) or not isinstance(block, int) or block < 1:
            raise ConfigurationError(f"`block` must be an int >= 1, got {block!r}")
        self.loss, self.block = loss, block

    def prune(self, model: nn.Module, layers: Layers, batches: list[Any]) -> None:
        """Rank all weights by the Fisher information at the model as it is, and update them once."""
        weights = {target.key: target.weight(layers) for target in self._targets}
        inverses = self._inverses(model, weights, batches)
        scores = {key: woodfisher_saliency(weight, inverses[key]) for key, weight in weights.items()}
        for key, mask in choose_masks(scores, self.schedule.final, "global", self.FLOOR).items():
            weights[key].data.copy_(woodfisher_update(weights[key], inverses[key], mask != 0))

    def _inverses(self, model: nn.Module, weights: dict[str, nn.Parameter], batches: list[Any]) -> dict[str, Any]:
        taken = itertools.islice(sample_gradients(model, weights, batches, self.loss), self.samples)
        total = min(self.samples, sum(_targets_in(batch) for batch in batches))
        inverses = {
            key: FisherInverse(weight.numel(), max(total, 1), self.block, self.damping, device=weight.device)
            for key, weight in weights.items()
        }
        for gradients in taken:
            for key, gradient in gradients.items():
                inverses[key].add(gradient)
        return inverses


def _targets_in(batch: Any) -> int:
    return len(batch[1]) if isinstance(batch, list | tuple) and len(batch) > 1 and isinstance(batch[1], Tensor) else 0
