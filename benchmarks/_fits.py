"""Fits to compare: the same network trained plainly, with this package's callback and with Lightning's own."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from functools import partial

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset
from torchvision.models import resnet18

from benchmarks._common import Times
from benchmarks._turns import time_in_turns
from lightning_compress import IterativePruning, Schedule

SPARSITY = 0.9
PLAIN, OURS, THEIRS = "plain training", "IterativePruning", "Lightning's ModelPruning"
CASES = (PLAIN, OURS, THEIRS)


class Batches(Dataset[tuple[Tensor, Tensor]]):
    """A few ready batches over and over, so that loading costs nothing and hides nothing.

    Args:
        shape: Shape of a batch of inputs.
        count: How many batches the loader sees.
    """

    def __init__(self, shape: Sequence[int], count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.count = count
        self.stored = [
            (torch.randn(*shape, generator=generator), torch.randint(10, (shape[0],), generator=generator))
            for _ in range(4)
        ]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.stored[index % len(self.stored)]


class Classifier(LightningModule):
    """A network with cross entropy and SGD with momentum and weight decay.

    Args:
        net: The network.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Optimizer:
        """Return SGD, whose momentum and decay would move pruned weights away from zero."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)


class PruneAtStart(Callback):
    """Let ModelPruning prune before the first batch rather than after each epoch.

    Args:
        pruning: The callback.
    """

    def __init__(self, pruning: ModelPruning) -> None:
        self.pruning = pruning

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune once."""
        self.pruning.apply_pruning(SPARSITY)


def resnet() -> nn.Module:
    """Return torchvision's ResNet-18 for ten classes."""
    return resnet18(num_classes=10)


def mlp(width: int = 1024) -> nn.Module:
    """Return a perceptron with three hidden layers; 4.2 M weights at width 1024."""
    sizes = [2 * width, width, width, width]
    hidden = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, 10))


def deep(width: int = 2048, layers: int = 10) -> nn.Module:
    """Return equal linear layers; 168 MB of parameters at the default size."""
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))


def weights_to_prune(net: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return the weights that both pruning callbacks prune: all layers with kernels or matrices but the last."""
    layers = [module for module in net.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    return [(layer, "weight") for layer in layers[:-1]]


def pruning_callbacks(case: str, net: nn.Module) -> list[Callback]:
    """Return the callbacks that prune ``net`` to the target before or right after the first step."""
    if case == OURS:
        return [IterativePruning(Schedule(SPARSITY, shape="once", start=0))]
    if case == THEIRS:
        chosen = weights_to_prune(net)
        theirs = ModelPruning("l1_unstructured", parameters_to_prune=chosen, amount=SPARSITY, apply_pruning=False)
        return [theirs, PruneAtStart(theirs)]
    return []


def fit(case: str, net: nn.Module, shape: Sequence[int], steps: int, watch: Callback) -> None:
    """Train ``net`` for some steps as a case of :data:`CASES` says, and check that it was pruned."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[watch, *pruning_callbacks(case, net)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(net), DataLoader(Batches(shape, steps), batch_size=None))
    weights = [getattr(layer, name) for layer, name in weights_to_prune(net)]
    zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    if abs(zeros - (0.0 if case == PLAIN else SPARSITY)) > 1e-3:
        raise RuntimeError(f"{case}: {zeros:.4f} of the weights are zero after the fit; the comparison is void")


def timed_fit(case: str, build: Callable[[], nn.Module], shape: Sequence[int], watch: Callback, steps: int) -> None:
    """Run a case of :data:`CASES` as one of the fits that take turns; each case gets the same initial weights."""
    torch.manual_seed(0)
    fit(case, build(), shape, steps, watch)


def time_steps(
    build: Callable[[], nn.Module], shape: Sequence[int], rounds: int, burst: int = 6, threads: int = 1
) -> dict[str, tuple[Times, Times]]:
    """Return wall and processor seconds of a training step of every case, one median per round.

    Args:
        build: Makes a network; a function of a module, or a ``functools.partial`` of one.
        shape: Shape of a batch of inputs.
        rounds: Rounds that are kept.
        burst: Steps of each fit in a round, at least 3.
        threads: Threads of torch in each fit.
    """
    fits = {case: partial(timed_fit, case, build, shape) for case in CASES}
    return time_in_turns(fits, rounds, burst, threads)
