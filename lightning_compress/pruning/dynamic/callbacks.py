"""Training that is sparse from the first step on, while connections move to where they help."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.core.callback import CompressionCallback
from lightning_compress.core.errors import ConfigurationError, did_you_mean
from lightning_compress.core.plan import PlanRow
from lightning_compress.core.randomness import common_seed
from lightning_compress.core.run import Layers
from lightning_compress.core.schedule import Schedule, Time
from lightning_compress.core.select import Select, Selection
from lightning_compress.core.targets import PRUNABLE, shape_of, tied_with
from lightning_compress.pruning.callbacks import IterativePruning
from lightning_compress.pruning.dynamic.regrowth import (
    connection_counts,
    cosine_fraction,
    drop_and_grow,
    random_mask,
    zero_state,
)
from lightning_compress.pruning.held import HeldMasks
from lightning_compress.pruning.masks import kept
from lightning_compress.pruning.scores import random

METHODS = ("rigl", "set")
"""What makes a connection worth growing: the magnitude of its gradient, or chance."""

_SEED = "seed:"


class DynamicSparseTraining(CompressionCallback):
    r"""Train with a constant number of connections from the first step (SET, arXiv 1707.04383; RigL, arXiv 1911.11134).

    Masks are random at first. Every ``every`` the share

    .. math:: f(t) = \frac{\alpha}{2}\left(1 + \cos\frac{t\pi}{T_{end}}\right)

    of the connections of each layer, the smallest :math:`|w|`, is dropped and as many are grown: where the dense
    gradient :math:`|\partial L/\partial w|` of that step is largest (``rigl``), or at random (``set``). Grown weights
    start at zero, with their optimizer state (momentum, squared gradients) zeroed. The number of connections of each
    layer never changes, zeros are exact after every optimizer step, and all processes decide the same: gradients
    are taken when they are accumulated and reduced, chance comes from (seed, step, path of the weight). Masks live in
    the checkpoint's callback state, so a run resumes exactly from inside an epoch.

    The model stays dense for torch: zeros are multiplied like other numbers in forward and backward, and RigL's dense
    gradient is the one that is computed anyway. So nothing gets faster and no memory is saved while training, one byte
    a weight for the masks is needed on top; what gets smaller is the saved file. Two details differ from the papers:
    SET draws new weights at random where these start at zero, and ``"uniform"`` makes the first layer sparse too unless
    ``select`` leaves it out.

    Linear, convolution, recurrent and attention layers are sparse; biases, norms, embeddings and the last layer are
    left alone. Weights that are frozen stay dense until the first update after they are unfrozen; parameters tied to a
    layer outside the selection are left alone, and the plan names them all.

    Runs on: any device, ``ddp``; refuses sharded strategies. Put it after ``WeightAveraging`` or
    ``StochasticWeightAveraging`` in the Trainer's list. It is no way to compress a trained model.

    Args:
        sparsity: Share of zeros among all selected weights, 0 to below 1.
        method: ``"rigl"`` or ``"set"``.
        select: Which layers; default all that can be pruned except the last.
        distribution: ``"erk"`` leaves more connections to small layers, ``"uniform"`` the same share to each.
        fraction: The share :math:`\alpha` of connections to exchange at first, 0 to 1; 0 keeps the random masks.
        end: When the share has fallen to 0: an epoch, ``"75%"`` of the run, or ``{"step": N}``.
        every: Time between exchanges, likewise; RigL takes 100 steps.
        name: Tells two of these callbacks apart.

    Raises:
        ConfigurationError: For a value outside its range.
        SelectionError: If no layer is selected.

    >>> DynamicSparseTraining(0.9, method="set", every={"step": 100}).schedule.final
    0.9
    """

    link: ClassVar[str] = "prune"
    supported: ClassVar[tuple[type[nn.Module], ...]] = PRUNABLE
    runs_after: ClassVar[tuple[type[Callback], ...]] = (WeightAveraging, StochasticWeightAveraging)
    conflicts_with: ClassVar[tuple[type[Callback], ...]] = (ModelPruning, IterativePruning)
    needs_training: ClassVar[str] = (
        "it begins with random connections and lets them move while their weights are learnt"
    )

    def __init__(
        self,
        sparsity: float,
        method: str = "rigl",
        select: Select | None = None,
        distribution: str = "erk",
        fraction: float = 0.3,
        end: Time = "75%",
        every: Time = "1%",
        name: str | None = None,
    ) -> None:
        _check_share("sparsity", sparsity, below_one=True)
        _check_share("fraction", fraction, below_one=False)
        if method not in METHODS:
            raise ConfigurationError(f"`method` is {method!r}: {did_you_mean(str(method), METHODS)}")
        schedule = Schedule(final=sparsity, initial=sparsity, shape="linear", start=0, end=end, every=every)
        super().__init__(schedule, Select(not_last=True) if select is None else select, name)
        connection_counts({}, sparsity, distribution)
        self.sparsity = sparsity
        self.method = method
        self.distribution = distribution
        self.fraction = fraction
        self._held = HeldMasks()
        self._counts: dict[str, int] = {}
        self._gradients: dict[str, Tensor] = {}
        self._seed: int | None = None
        self._moved = 0

    def choose(self, root: nn.Module) -> Selection:
        """Select the layers, and find their weights and ties."""
        return self._held.find(root, super().choose(root))

    def plan(self, layers: Layers) -> list[PlanRow]:
        """Return a row for each weight: its shape, and how many of its connections are active."""
        rows = []
        for key, weight in self._held.weights(layers).items():
            share = 1 - self._counts[key] / weight.numel()
            action = f"{self._counts[key]} of {weight.numel()} connections ({share:.1%} zeros), {self.method}"
            action = action if weight.requires_grad else f"dense while frozen, then {action}"
            rows.append(PlanRow("select", key, shape_of(weight), action + tied_with(self._held.targets, key)))
        return rows

    def before_step(self, layers: Layers, optimizer: Optimizer, scale: float) -> None:
        """Keep the dense gradients of the step after which connections move; a scale does not change their order."""
        if self.method != "rigl" or self._run is None or not self._run.timeline.due(self.updates):
            return
        for key, weight in self._held.weights(layers).items():
            if weight.grad is not None:
                self._gradients[key] = weight.grad.detach().abs()

    def update(self, layers: Layers, amount: float) -> None:
        """Exchange connections, and begin with those of weights that were unfrozen."""
        t, self._moved = self.updates - 1, 0
        begun = self._begin(layers, self.updates)
        if self._run is not None and self._run.timeline.due(t):
            start, end = self._run.timeline.start, self._run.timeline.end
            share = cosine_fraction(t - start, end - start, self.fraction)
            for key, weight in self._held.weights(layers).items():
                if weight.requires_grad and key in self._held.masks and key not in begun:
                    self._exchange(key, weight, share)
        self._gradients = {}
        self.enforce(layers)

    def enforce(self, layers: Layers) -> None:
        """Put the zeros back, exactly."""
        self._held.enforce(layers)

    def pending(self, layers: Layers) -> bool:
        """Return whether a weight without a mask has been unfrozen since the last update."""
        return bool(self._held.unmasked(layers))

    def enforce_state(self, state_dict: dict[str, Any]) -> None:
        """Put the zeros into weights that are about to be saved."""
        self._held.enforce_state(state_dict)

    def metrics(self, layers: Layers) -> dict[str, float]:
        """Return ``sparsity`` over the selected weights, and ``moved``: how many connections were exchanged."""
        return {"sparsity": self._held.sparsity(layers), "moved": float(self._moved)}

    def values(self) -> dict[str, Any]:
        """Return the masks as bits, and the seed."""
        return self._held.state() | ({} if self._seed is None else {_SEED: torch.tensor(self._seed)})

    def load_values(self, values: Mapping[str, Any]) -> None:
        """Take masks and seed from a checkpoint."""
        rest = self._held.load(values)
        self._seed = int(rest[_SEED]) if _SEED in rest else None

    def attach_values(self, layers: Layers) -> None:
        """Count the connections of each layer, unpack loaded masks, and draw those that are still missing."""
        weights = self._held.weights(layers)
        shapes = {key: tuple(weight.shape) for key, weight in weights.items()}
        self._counts = connection_counts(shapes, self.sparsity, self.distribution)
        self._held.attach(layers)
        for key, mask in self._held.masks.items():
            if kept({key: mask}) != self._counts[key]:
                raise ConfigurationError(
                    f"the checkpoint has {kept({key: mask})} connections in {key!r}, but `sparsity` {self.sparsity:g} "
                    f"and `distribution` {self.distribution!r} mean {self._counts[key]}, and their number is constant; "
                    "resume with the settings it was written with, or load the weights and start a new fit"
                )
        if self._seed is None:
            self._seed = common_seed(next(iter(weights.values())).device)
        if self.updates == 0:
            self._begin(layers, 0)

    def reset_values(self) -> None:
        """Forget the masks and what they belong to."""
        self._held, self._counts, self._gradients, self._seed, self._moved = HeldMasks(), {}, {}, None, 0

    def _begin(self, layers: Layers, step: int) -> set[str]:
        """Draw the masks of weights that train but have none, and return their names."""
        new = self._held.unmasked(layers)
        for key, weight in new.items():
            self._held.masks[key] = random_mask(weight, self._counts[key], self._seed or 0, step, key)
        return set(new)

    def _exchange(self, key: str, weight: nn.Parameter, share: float) -> None:
        mask = self._held.masks[key]
        count = round(share * self._counts[key])
        growth = self._gradients.get(key) if self.method == "rigl" else None
        if self.method == "set":
            growth = random(weight, self._seed or 0, self.updates, key)
        if growth is None or not count:  # a layer that this step did not use has no gradient to go by
            return
        moved = drop_and_grow(weight, mask, growth, count)
        grown = (moved != 0) & (mask == 0)
        self._held.masks[key] = moved
        self._moved += int(grown.sum())
        if self._run is not None:
            zero_state(self._run.optimizers, weight, grown)


def _check_share(name: str, value: object, below_one: bool) -> None:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
    if not fits or (below_one and value == 1):
        hint = "; 90 % is written 0.9" if isinstance(value, int | float) and 1 < value <= 100 else ""
        limits = "0 to below 1" if below_one else "0 to 1"
        raise ConfigurationError(f"`{name}` must be a number from {limits}, got {value!r}{hint}")
