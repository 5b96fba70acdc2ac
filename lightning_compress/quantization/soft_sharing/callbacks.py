"""Weight sharing by a mixture prior that is learnt together with the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.core.callback import CompressionCallback
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.finite import require_finite_weights
from lightning_compress.core.plan import PlanRow
from lightning_compress.core.run import Layers
from lightning_compress.core.schedule import Schedule
from lightning_compress.core.select import Select, Selection
from lightning_compress.core.targets import shape_of, tied_with
from lightning_compress.quantization.sharing import WeightSharing
from lightning_compress.quantization.sharing.held import SHAREABLE, HeldCodes
from lightning_compress.quantization.soft_sharing.mixture import (
    Mixture,
    adam_step,
    assign,
    initial_mixture,
    load_mixture,
    merge,
    mixture_state,
    precision_pull,
    pull,
)

_GROUP = "mixture"
_OTHERWISE = ", leave weights out by `select` or freeze them, or use WeightSharing, with a codebook for each tensor"


class SoftWeightSharing(CompressionCallback):
    r"""Let a mixture prior draw weights together while they train (Ullrich et al. 2017, arXiv:1702.04008).

    The loss becomes :math:`L(w) - \tau \sum_i \log p(w_i)` with
    :math:`p = \pi_0 N(0, \sigma_0^2) + \sum_j \pi_j N(\mu_j, \sigma_j^2)` over all selected weights. Means, widths and
    shares are learnt beside the weights, with an Adam of their own; the share :math:`\pi_0` of the component at zero is
    fixed, so that most weights end there, and Gamma priors keep the widths from collapsing. At the end of the schedule
    components that say the same are merged, every weight is put on the mean of the component that most likely made it
    (or on zero), and the rest of the run trains the shared values as ``WeightSharing`` does. Prunes and shares at once.

    It works on trained networks, with a small learning rate, and needs tens of epochs: the pull is weak where it
    matters. Pruning followed by ``WeightSharing`` takes less time and less tuning. Each step takes 17 exponentials a
    weight. Frozen weights are left alone until they are unfrozen.

    Runs on: any device, ``ddp``; refuses sharded strategies. Put it after ``WeightAveraging`` or
    ``StochasticWeightAveraging`` in the Trainer's list.

    Args:
        strength: :math:`\tau` for a loss that is a mean over samples, at least 0: 0.003 to 0.005 over the number of
            training samples in the paper.
        components: J beside the one at zero, at least 2.
        zero: :math:`\pi_0`, between 0 and 1; 0.99 to 0.999 in the paper.
        rate: Learning rate of the mixture, at least 0.
        divergence: Below which divergence two components are merged, at least 0.
        schedule: Share of the strength over time; default cubic from 0 to all
            of it at 80 % of the run.
        select: Which layers; default all whose weights can be shared.
        name: Tells two of these callbacks apart.

    Raises:
        ConfigurationError: For a value outside its range.
        SelectionError: If no layer is selected.

    >>> SoftWeightSharing(0.005 / 60_000).schedule.end
    '80%'
    """

    link: ClassVar[str] = "share"
    supported: ClassVar[tuple[type[nn.Module], ...]] = SHAREABLE
    runs_after: ClassVar[tuple[type[Callback], ...]] = (WeightAveraging, StochasticWeightAveraging)
    conflicts_with: ClassVar[tuple[type[Callback], ...]] = (WeightSharing,)
    needs_training: ClassVar[str] = "it learns the mixture together with the weights (use WeightSharing instead)"

    def __init__(
        self,
        strength: float,
        components: int = 16,
        zero: float = 0.99,
        rate: float = 5e-4,
        divergence: float = 1e-3,
        schedule: Schedule | None = None,
        select: Select | None = None,
        name: str | None = None,
    ) -> None:
        schedule = Schedule(1.0, end="80%") if schedule is None else schedule
        super().__init__(schedule, Select() if select is None else select, name)
        for argument, value in (("strength", strength), ("rate", rate), ("divergence", divergence)):
            _check_number(argument, value)
        _check_number("zero", zero, below=1)
        if isinstance(components, bool) or not isinstance(components, int) or components < 2:
            raise ConfigurationError(f"`components` must be an int >= 2, got {components!r}")
        if schedule.final != 1 or schedule.initial >= 1 or schedule.shape == "once":
            raise ConfigurationError(
                "`schedule` must rise to the full strength, 1, over some time, such as Schedule(1.0, end='80%'); got "
                f"shape {schedule.shape!r} from {schedule.initial:g} to {schedule.final:g}"
            )
        self.strength, self.components, self.zero = float(strength), components, float(zero)
        self.rate, self.divergence = float(rate), float(divergence)
        self._held = HeldCodes(_OTHERWISE)
        self._mixture: Mixture | None = None
        self._moments: dict[str, Tensor] = {}

    def choose(self, root: nn.Module) -> Selection:
        """Select the layers and find their weights, which have one mixture together."""
        found = self._held.find(root, self.select.resolve(root, SHAREABLE))
        self._held.groups = dict.fromkeys(self._held.groups, _GROUP)
        return found

    def plan(self, layers: Layers) -> list[PlanRow]:
        """Return a row for each tensor.

        Raises:
            ConfigurationError: If several optimizers, or none, train weights of the one mixture.
        """
        self._held.check_movable(layers, cast(LightningModule, self.module).trainer.optimizers)
        rows = []
        for key, weight in self._held.weights(layers).items():
            action = f"draw to {self.components} values and zero, strength {self.strength:g}"
            action += tied_with(self._held.targets, key)
            action = action if weight.requires_grad else f"kept while frozen, then {action}"
            rows.append(PlanRow("select", key, shape_of(weight), action))
        return rows

    def before_step(self, layers: Layers, optimizer: Optimizer, scale: float) -> None:
        """Add the prior's gradient and move the mixture; once values are shared, give clusters their gradient."""
        self._held.let_go(layers if self._run is None else self._run.layers)
        layers = self._held.moved_by(layers, optimizer)
        self._held.share_gradients(layers)
        weights = {key: w for key, w in self._held.unshared(layers).items() if w.grad is not None}
        strength = self.strength * (self._amount or 0.0)
        if not weights or self._mixture is None or self.at_target or strength == 0:
            return
        pulls = pull(_joined(weights), self._mixture)
        parts = pulls.values.split([weight.numel() for weight in weights.values()])
        for weight, part in zip(weights.values(), parts, strict=True):
            if weight.grad is not None:
                weight.grad.add_((part * (strength * scale)).to(weight.grad).reshape(weight.shape))
        sigmas = pulls.log_sigmas + precision_pull(self._mixture)
        self._mixture = adam_step(self._mixture, (pulls.means, sigmas, pulls.logits), self._moments, self.rate)

    def update(self, layers: Layers, amount: float) -> None:
        """At the end of the schedule merge components and put every weight on the one that most likely made it."""
        weights = self._held.unshared(layers)
        if amount < self.schedule.final or not weights or self._mixture is None:
            return
        if not self._held.members:
            self._mixture = merge(self._mixture, self.divergence)
        codes = assign(_joined(weights), self._mixture).split([weight.numel() for weight in weights.values()])
        centroids, present = self._mixture.means.clone(), self._held.present(layers, _GROUP)
        if present is not None:  # weights that were unfrozen later join the others, whose values have moved on
            known = present.isfinite().to(centroids.device)
            centroids = torch.where(known, present.to(centroids), centroids)
        self._held.share(layers, dict(zip(weights, codes, strict=True)), _GROUP, centroids)

    def enforce(self, layers: Layers) -> None:
        """Put every weight back on its shared value, exactly."""
        self._held.tie(layers)

    def pending(self, layers: Layers) -> bool:
        """Return whether a weight that is not shared has been unfrozen."""
        return bool(self._held.unshared(layers))

    def enforce_state(self, state_dict: dict[str, Any]) -> None:
        """Put weights that are about to be saved on their shared values."""
        self._held.tie_state(state_dict)

    def metrics(self, layers: Layers) -> dict[str, float]:
        """Return the share of ``zeros`` that the mixture would make now, and what ``WeightSharing`` returns."""
        weights = self._held.weights(layers)
        zeros = total = 0
        for key, weight in weights.items():
            codes = None if key in self._held.members or self._mixture is None else assign(_flat(weight), self._mixture)
            zeros += int((weight == 0).sum()) if codes is None else int((codes < 0).sum())
            total += weight.numel()
        return {"zeros": zeros / total, **self._held.metrics()}

    def values(self) -> dict[str, Any]:
        """Return the mixture, its optimizer's memory, and the clusters."""
        mixture = {} if self._mixture is None else mixture_state(self._mixture, self._moments)
        return self._held.state() | mixture

    def load_values(self, values: Mapping[str, Any]) -> None:
        """Take the state of a checkpoint; clusters are fitted when the weights are at hand."""
        self._mixture, self._moments = load_mixture(self._held.load(values), self.zero)

    def attach_values(self, layers: Layers) -> None:
        """Fit what was loaded to the weights, or begin with a mixture over their range."""
        self._held.attach(layers)
        weights = self._held.weights(layers)
        device = next(iter(weights.values())).device
        if self._mixture is None:
            for path, layer in layers.items():
                require_finite_weights(path, layer)
            self._mixture = initial_mixture(_joined(weights), self.components, self.zero)
        moved = {name: getattr(self._mixture, name).to(device) for name in ("means", "log_sigmas", "logits")}
        self._mixture = Mixture(**moved, zero=self.zero)
        self._moments = {name: value.to(device) for name, value in self._moments.items()}

    def reset_values(self) -> None:
        """Forget mixture and clusters, and what they belong to."""
        self._held, self._mixture, self._moments = HeldCodes(_OTHERWISE), None, {}


def _flat(weight: Tensor) -> Tensor:
    return weight.detach().reshape(-1).double()


def _joined(weights: Mapping[str, Tensor]) -> Tensor:
    first = next(iter(weights.values()))
    return torch.cat([_flat(weight).to(first.device) for weight in weights.values()])


SoftWeightSharing.conflicts_on_layers = (SoftWeightSharing,)


def _check_number(name: str, value: object, below: float | None = None) -> None:
    number = None if isinstance(value, bool) or not isinstance(value, int | float) else value
    if number is None or not (number >= 0 if below is None else 0 < number < below):
        between = "of at least 0" if below is None else f"between 0 and {below:g}"
        raise ConfigurationError(f"`{name}` must be a number {between}, got {value!r}")
