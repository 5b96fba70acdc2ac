"""Lottery tickets over several fits of one module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn

from lightning_compress.core.callback import CompressionCallback
from lightning_compress.core.errors import ConfigurationError, did_you_mean
from lightning_compress.core.plan import PlanRow
from lightning_compress.core.randomness import common_seed
from lightning_compress.core.run import Layers
from lightning_compress.core.schedule import Time, parse_time
from lightning_compress.core.select import Select, Selection
from lightning_compress.core.targets import PRUNABLE, shape_of, tied_with
from lightning_compress.pruning.allocation import SCOPES
from lightning_compress.pruning.callbacks import IterativePruning
from lightning_compress.pruning.dynamic.callbacks import DynamicSparseTraining
from lightning_compress.pruning.held import HeldMasks
from lightning_compress.pruning.lottery.rewinding import (
    RewindSchedule,
    prune_remaining,
    put_back,
    remaining_share,
    shuffled,
    take_copy,
)
from lightning_compress.pruning.masks import kept

RESETS = ("rewind", "none", "random")
"""What weights begin a round with: the copy, what they were trained to, or new values."""

_COPY, _ROUND, _TRAINED, _SEED = "copy:", "round:", "trained:", "seed:"


class LotteryTicket(CompressionCallback):
    r"""Find a sparse net that trains as well as the dense one (Frankle & Carbin 2018, arXiv 1803.03635).

    One fit is one round. The first trains the dense module. Each later one begins by pruning the share :math:`p` of the
    weights that are left, the smallest :math:`|w|` of the last round, and by setting all parameters and buffers back to
    what they were at step k of the first round, :math:`\theta_k \odot m` (k = 0: their initial values; k > 0: late
    rewinding, arXiv 1903.01611 and 1912.05671). Then it trains as ever, with an optimizer of its own. After n
    prunings :math:`(1 - p)^n` of the weights are left. By hand, with ``ticket = LotteryTicket(0.2)``::

        for _ in range(8):  # dense, then seven prunings: 21 % of the weights are left
            Trainer(max_epochs=20, callbacks=[ticket]).fit(module)

    and in a recipe ``rounds: 8`` in a stage. Pass the same module each time, to a new Trainer;
    another module begins at round 0. Round,
    masks and the copy (on the CPU, as large as the model) live in the checkpoint's callback state: a round that was cut
    off goes on with ``fit(module, ckpt_path=...)``, and the loop with the rounds after it.

    Zeros are exact after every optimizer step. Biases, norms, embeddings and the last layer are not pruned, but they
    are rewound. Frozen weights are not pruned while they are frozen; parameters tied to a layer outside the selection
    never are, and the plan names them all. It makes the file smaller but, on dense kernels, nothing faster, and
    training costs one whole run a round. Large nets with high learning rates need k > 0 or a warm-up.

    Runs on: any device, ``ddp``; refuses sharded strategies. Put it after ``WeightAveraging`` or
    ``StochasticWeightAveraging`` in the Trainer's list. It is no way to compress a trained model.

    Args:
        fraction: The share :math:`p`, above 0 and below 1.
        rewind: The point k: 0, an epoch, ``"5%"`` of the round, or ``{"step": k}``.
        reset: ``"rewind"``; ``"none"`` goes on from the trained weights (fine-tuning; with the same learning rates
            again it is learning-rate rewinding, arXiv 2003.02389); ``"random"`` is the control: the initial values in
            another order within each tensor, so new weights from the same distribution.
        select: Which layers; default all that can be pruned except the last.
        scope: ``"global"`` ranks all selected weights together, ``"layer"`` prunes the share of each; for others see
            :func:`~lightning_compress.pruning.allocation.allocate`.
        floor: Least share of each weight that stays, 0 to below 1.
        name: Tells two of these callbacks apart.

    Attributes:
        round: Number of prunings so far.

    Raises:
        ConfigurationError: For a value outside its range.
        SelectionError: If no layer is selected.

    >>> LotteryTicket(0.2, rewind="5%").round
    0
    """

    link: ClassVar[str] = "prune"
    supported: ClassVar[tuple[type[nn.Module], ...]] = PRUNABLE
    runs_after: ClassVar[tuple[type[Callback], ...]] = (WeightAveraging, StochasticWeightAveraging)
    conflicts_with: ClassVar[tuple[type[Callback], ...]] = (ModelPruning, IterativePruning, DynamicSparseTraining)
    counts_fits: ClassVar[bool] = True
    needs_training: ClassVar[str] = "it prunes between rounds of training, each from the same early weights"

    def __init__(
        self,
        fraction: float = 0.2,
        rewind: Time = 0,
        reset: str = "rewind",
        select: Select | None = None,
        scope: str = "global",
        floor: float = 0.005,
        name: str | None = None,
    ) -> None:
        for argument, value, low in (("fraction", fraction, "above 0"), ("floor", floor, "from 0")):
            fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1
            if not fits or (value == 0 and low == "above 0"):
                hint = "; 20 % is written 0.2" if isinstance(value, int | float) and value >= 1 else ""
                raise ConfigurationError(f"`{argument}` must be a number {low} to below 1, got {value!r}{hint}")
        if reset not in RESETS:
            raise ConfigurationError(f"`reset` is {reset!r}: {did_you_mean(str(reset), RESETS)}")
        if scope not in SCOPES:
            raise ConfigurationError(f"`scope` is {scope!r}: {did_you_mean(str(scope), SCOPES)}")
        if parse_time(rewind, "rewind")[1] and reset != "rewind":
            raise ConfigurationError(f"`rewind` is {rewind!r}, but `reset` {reset!r} rewinds to no step; leave it at 0")
        super().__init__(RewindSchedule(0.0, shape="linear"), Select(not_last=True) if select is None else select, name)
        self.fraction, self.floor = float(fraction), float(floor)
        self.rewind, self.reset, self.scope = rewind, reset, scope
        self.round = 0
        self._held = HeldMasks()
        self._copy: dict[str, Tensor] = {}
        self._trained = False
        self._seed: int | None = None
        self._enter(0)

    def choose(self, root: nn.Module) -> Selection:
        """Select the layers, and find their weights and ties."""
        return self._held.find(root, super().choose(root))

    def plan(self, layers: Layers) -> list[PlanRow]:
        """Return a row for each weight: its shape, how many stay in this round, and what it begins with."""
        begins = {"rewind": f"rewound to {self.rewind!r}", "none": "not rewound", "random": "drawn anew"}[self.reset]
        rows = []
        for key, weight in self._held.weights(layers).items():
            mask = self._held.masks.get(key)
            action = f"{kept({key: mask})} of {weight.numel()} stay, {begins}" if mask is not None else "dense"
            action += "" if self.round else f"; each later round prunes {self.fraction:.1%} of what is left"
            action = action if weight.requires_grad else f"{action}, not pruned while frozen"
            rows.append(PlanRow("select", key, shape_of(weight), action + tied_with(self._held.targets, key)))
        return rows

    def update(self, layers: Layers, amount: float) -> None:
        """Note that the round has trained, and take the copy when it is time."""
        self._trained = True
        late = self._run is not None and self.updates > self._run.timeline.end
        if self.reset == "rewind" and not self._copy and self.round == 0 and late:
            self._copy = take_copy(self.module)

    def enforce(self, layers: Layers) -> None:
        """Put the zeros back, exactly."""
        self._held.enforce(layers)

    def enforce_state(self, state_dict: dict[str, Any]) -> None:
        """Put the zeros into weights that are about to be saved."""
        self._held.enforce_state(state_dict)

    def metrics(self, layers: Layers) -> dict[str, float]:
        """Return ``sparsity`` over the selected weights, and ``round``: the number of prunings so far."""
        return {"sparsity": self._held.sparsity(layers), "round": float(self.round)}

    def values(self) -> dict[str, Any]:
        """Return round, masks and the copy."""
        position = {_ROUND: torch.tensor(self.round), _TRAINED: torch.tensor(self._trained)}
        seed = {} if self._seed is None else {_SEED: torch.tensor(self._seed)}
        copy = {_COPY + name: tensor for name, tensor in self._copy.items()}
        return {**position, **seed, **self._held.state(), **copy}

    def load_values(self, values: Mapping[str, Any]) -> None:
        """Take round, masks and the copy from a checkpoint."""
        rest = self._held.load(values)
        self._copy = {k.removeprefix(_COPY): v for k, v in rest.items() if k.startswith(_COPY)}
        self._trained = bool(rest[_TRAINED])
        self._seed = int(rest[_SEED]) if _SEED in rest else None
        self._enter(int(rest[_ROUND]))

    def attach_values(self, layers: Layers) -> None:
        """Unpack loaded masks; at the beginning of a round prune and rewind, in that of the first take the copy."""
        self._held.attach(layers)
        if self.updates:  # a round that goes on
            return
        if self.reset == "random" and self._seed is None:
            self._seed = common_seed(next(iter(self._held.weights(layers).values())).device)
        if self._trained:
            self._next_round(layers)
        elif not self._copy and self.reset != "none" and not parse_time(self.rewind, "rewind")[1]:
            self._copy = take_copy(self.module)

    def reset_values(self) -> None:
        """Forget round, masks and copy."""
        self._held, self._copy, self._trained, self._seed = HeldMasks(), {}, False, None
        self._enter(0)

    def _enter(self, number: int) -> None:
        """Let the schedule be that of a round; only the first has a point at which to take the copy."""
        self.round = number
        amount = 1 - remaining_share(self.fraction, number)
        rewind = self.rewind if number == 0 else 0
        self.schedule = RewindSchedule(amount, initial=amount, shape="linear", rewind=rewind)

    def _next_round(self, layers: Layers) -> None:
        left = remaining_share(self.fraction, self.round + 1)
        if left < self.floor:
            raise ConfigurationError(
                f"round {self.round + 1} would leave {left:.2%} of the weights, but `floor` keeps {self.floor:.2%} of "
                "each; stop before it, or lower the floor"
            )
        if self.reset != "none" and not self._copy:
            raise ConfigurationError(
                f"`rewind` is {self.rewind!r}, but the first round ended before that and took no copy of the weights; "
                "train it longer, or rewind to an earlier step"
            )
        weights = {
            key: weight
            for key, weight in self._held.weights(layers).items()
            if weight.requires_grad or key in self._held.masks
        }
        masks = prune_remaining(weights, self._held.masks, 1 - left, self.scope, self.floor)
        if self.reset != "none":
            again = self._copy if self.reset == "rewind" else shuffled(self._copy, self._seed or 0, self.round + 1)
            put_back(self.module, again)
        self._held.masks.update(masks)
        self._trained = False
        self._enter(self.round + 1)
