"""Pruning of trained models by Fisher information, across layers."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.first_look import first_batch
from lightning_compress.core.gradients import Loss, sample_gradients
from lightning_compress.core.isolation import evaluating
from lightning_compress.core.run import Layers
from lightning_compress.core.select import Select, Selection
from lightning_compress.pruning.allocation import choose_masks
from lightning_compress.pruning.post_training import FLOOR, PostTrainingPruning
from lightning_compress.pruning.woodfisher import FisherInverse, woodfisher_saliency, woodfisher_update


class FisherPruning(PostTrainingPruning):
    r"""Prune where the loss rises least by its empirical Fisher information (WoodFisher, arXiv:2004.14340).

    All layers are ranked together by :math:`w_q^2 / (2 [F^{-1}]_{qq})`, with F from the gradients of single
    samples in blocks of consecutive weights; the weights of a block that stay move to make up for those that go. With
    ``block=1`` that is Optimal Brain Damage: the diagonal alone, and no update.

    Needs labels. Takes ``weights * block`` numbers of memory, and the time of one backward pass and three passes over
    those numbers per sample. The quadratic is trusted only near the trained weights: beyond some sparsity, repeat it in
    steps with fine-tuning between.

    Runs on: CPU and CUDA, ``ddp``. A batch is a pair of inputs and targets.

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

    >>> import torch
    >>> from lightning_compress import compress
    >>> net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> pairs = [(torch.randn(32, 8), torch.randint(0, 2, (32,)))]
    >>> pruned = compress(net, FisherPruning(0.75, batches=pairs, block=8))
    >>> int((pruned[0].weight == 0).sum())
    24
    """

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

    def examine(self, root: nn.Module, example_inputs: Any) -> Selection:
        """Refuse data without targets, and a loss that does not take them, before the model is trained."""
        selection = super().examine(root, example_inputs)
        layers = self.layers(root)
        weights = {target.key: target.weight(layers) for target in self._targets}
        with evaluating(root):
            next(sample_gradients(root, weights, [first_batch(self.batches)], self.loss), None)
        return selection

    def prune(self, model: nn.Module, layers: Layers, batches: list[Any]) -> None:
        """Rank all weights by the Fisher information at the model as it is, and update them once."""
        weights = {target.key: target.weight(layers) for target in self._targets}
        inverses = self._inverses(model, weights, batches)
        scores = {key: woodfisher_saliency(weight, inverses[key]) for key, weight in weights.items()}
        for key, mask in choose_masks(scores, self.schedule.final, "global", FLOOR).items():
            weights[key].data.copy_(woodfisher_update(weights[key], inverses[key], mask != 0))

    def _inverses(self, model: nn.Module, weights: dict[str, nn.Parameter], batches: list[Any]) -> dict[str, Any]:
        taken = itertools.islice(sample_gradients(model, weights, batches, self.loss), self.samples)
        total = min(self.samples, sum(_targets_in(batch) for batch in batches))
        # one number a weight: twice the bytes are cheap, and float32 cancels where the damping is tiny
        dtype = torch.float64 if self.block == 1 else torch.float32
        inverses = {
            key: FisherInverse(weight.numel(), max(total, 1), self.block, self.damping, dtype, weight.device)
            for key, weight in weights.items()
        }
        for gradients in taken:
            for key, gradient in gradients.items():
                inverses[key].add(gradient)
        return inverses


def _targets_in(batch: Any) -> int:
    return len(batch[1]) if isinstance(batch, list | tuple) and len(batch) > 1 and isinstance(batch[1], Tensor) else 0
