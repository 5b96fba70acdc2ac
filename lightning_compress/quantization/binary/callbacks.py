"""Training with weights of two or three values, as callbacks."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, cast

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.core.callback import CompressionCallback
from lightning_compress.core.errors import ConfigurationError, SelectionError, did_you_mean
from lightning_compress.core.finite import require_finite_weights
from lightning_compress.core.journal import Edit
from lightning_compress.core.plan import PlanRow
from lightning_compress.core.run import Layers
from lightning_compress.core.schedule import Schedule
from lightning_compress.core.select import Select, Selection
from lightning_compress.quantization.binary.functions import glorot_bound, loss_aware_scale
from lightning_compress.quantization.binary.layers import (
    CONVOLUTIONS,
    TRANSPOSED,
    LossAwareWeight,
    SignWeight,
    no_signs,
    takes_signs,
)
from lightning_compress.quantization.binary.weights import few_levels_of, owners_of, real_weight, why_held
from lightning_compress.quantization.optimizers import check_second_moments, second_moment
from lightning_compress.quantization.sharing.callbacks import WeightSharing
from lightning_compress.quantization.soft_sharing.callbacks import SoftWeightSharing

METHODS = ("binary_connect", "bwn", "xnor", "binary_net", "loss_aware")
_KIND = {
    "binary_connect": "sign_weight",
    "binary_net": "sign_weight",
    "bwn": "scaled_sign_weight",
    "xnor": "scaled_sign_weight",
    "loss_aware": "loss_aware_weight",
}


class FewLevelsCallback(CompressionCallback):
    """What the callbacks have in common that train weights of few values."""

    supported: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)
    conflicts_with: ClassVar[tuple[type[Callback], ...]] = (ModelPruning,)
    prunes_after_fit: ClassVar[bool] = True

    def __init__(self, schedule: Schedule | None, select: Select | None, name: str | None) -> None:
        schedule = Schedule(final=1.0, initial=1.0, shape="once") if schedule is None else schedule
        super().__init__(schedule, Select(not_first=True, not_last=True) if select is None else select, name)
        if schedule.final != 1:
            raise ConfigurationError(f"`final` of the schedule must be 1, few values alone; got {schedule.final:g}")

    @abstractmethod
    def weight_edit(self, layer: nn.Module) -> tuple[str, Mapping[str, Any]]:
        """Return kind and configuration of the parametrization of a layer's weight."""

    def unfit(self, layer: nn.Module) -> str:
        """Return why a selected layer cannot be taken; empty if it can."""
        return ""

    def choose(self, root: nn.Module) -> Selection:
        """Select as ``select`` says, but for weights that are shared or parametrized by others."""
        selection = super().choose(root)
        owners = owners_of(root)
        reasons = {path: self.unfit(layer) or why_held(layer, owners) for path, layer in selection.layers.items()}
        left = {path: why for path, why in reasons.items() if why}
        if len(left) == len(reasons):
            raise SelectionError(
                f"no layer is left to binarize: {'; '.join(f'{p}: {w}' for p, w in left.items())}. Choose others with "
                "`select`, or leave this method out"
            )
        kept = {path: layer for path, layer in selection.layers.items() if path not in left}
        return Selection(kept, {**selection.left, **left})

    def prepare(self, layers: Layers) -> Iterable[Edit]:
        """Parametrize each weight, once."""
        for path, layer in layers.items():
            if few_levels_of(layer) is None:
                require_finite_weights(path, layer)
                kind, config = self.weight_edit(layer)
                yield Edit("parametrize", path, kind, {"tensor": "weight", "amount": self.schedule.initial, **config})

    def plan(self, layers: Layers) -> list[PlanRow]:
        """Return a row for each weight."""
        rows = []
        for path, layer in layers.items():
            weight = real_weight(layer)
            action = self.action() if weight.requires_grad else f"{self.action()} (frozen: not trained to it)"
            rows.append(PlanRow("select", f"{path}.weight", "x".join(map(str, weight.shape)), action))
        return rows

    @abstractmethod
    def action(self) -> str:
        """Return what the plan says of each weight."""

    def update(self, layers: Layers, amount: float) -> None:
        """Move every weight on towards its few values."""
        for layer in layers.values():
            for part in (few_levels_of(layer), layer if takes_signs(layer) else None):
                if part is not None:
                    cast(Tensor, part.amount).fill_(amount)

    def finalize(self, layers: Layers) -> Iterable[Edit]:
        """Leave the few values alone in each weight."""
        self.update(layers, 1.0)
        for path, layer in layers.items():
            few = few_levels_of(layer)
            if few is not None:
                few.eval()  # what is drawn at random in training is decided by sign now
                yield Edit("bake", path, "", {"tensor": "weight"})

    def metrics(self, layers: Layers) -> dict[str, float]:
        """Return the ``strength`` of the few values, and the root mean square ``distance`` of real weights to them."""
        strength = max(float(few.amount) for layer in layers.values() if (few := few_levels_of(layer)) is not None)
        squares = [(real_weight(layer) - cast(Tensor, layer.weight)).float().square() for layer in layers.values()]
        mean = sum(float(square.sum()) for square in squares) / sum(square.numel() for square in squares)
        return {"strength": strength, "distance": mean**0.5}


FewLevelsCallback.conflicts_on_layers = (FewLevelsCallback, WeightSharing, SoftWeightSharing)


class Binarization(FewLevelsCallback):
    r"""Train with weights of two values, which take one bit each.

    Forward and backward passes use binary weights; the optimizer updates the real ones behind them.

    - ``binary_connect`` (Courbariaux et al., arXiv:1511.00363): :math:`w_b = \mathrm{sign}(w)`, or +1 with probability
      :math:`\mathrm{clip}((w/b+1)/2, 0, 1)` if ``stochastic``; real weights are clipped to [-b, b] after each step.
    - ``bwn`` (Rastegari et al., arXiv:1603.05279): :math:`\alpha\,\mathrm{sign}(w)` with :math:`\alpha` the mean
      magnitude of the filter.
    - ``xnor`` (same): ``bwn``, and signs of the inputs, scaled by their mean magnitude under the kernel.
    - ``binary_net`` (Courbariaux et al., arXiv:1602.02830): ``binary_connect``, and signs of the inputs, whose
      gradients pass within [-1, 1].
    - ``loss_aware`` (Hou et al., arXiv:1611.01600): :math:`\alpha\,\mathrm{sign}(w)` with
      :math:`\alpha = \lVert d \odot w \rVert_1 / \lVert d \rVert_1`, d the root of the optimizer's second moment: a
      proximal Newton step. Needs Adam, RMSprop or another optimizer that keeps one.

    ``binary_connect`` and ``binary_net`` expect a batch norm behind each layer, which makes up for the missing scale;
    without one use ``bwn``. Binary inputs cost much accuracy: let a batch norm stand right before them, and no ReLU
    (whose outputs are all of one sign). Nothing gets faster: torch has no binary arithmetic. After fit
    ``callback.compressed`` holds the binary weights; ``save_compressed`` stores a bit for each.

    Runs on: any device, ``ddp``, where each process draws signs of its own if ``stochastic``.

    Args:
        method: One of the above.
        stochastic: Draw signs at random while training; for ``binary_connect`` and ``binary_net``. Evaluation goes by
            sign, which means little before most real weights have reached their bound.
        bound: b, above 0, of real weights of ``binary_connect`` and ``binary_net``; default what a weight is after
            Glorot's initialization, :math:`\sqrt{1.5/(\text{in} + \text{out})}`. A bound of 1, as the paper writes,
            needs learning rates that are larger by as much, as its authors use.
        schedule: Share of the binary in the weights that are used; default binary from the first step on. A schedule
            that rises from 0 trains towards it.
        select: Which layers; default all Linear and (transposed) convolutions but the first and the last.
        name: Tells two of these callbacks apart.

    Raises:
        ConfigurationError: For an unknown method, or an optimizer without second moments.
        SelectionError: If no layer is left.

    >>> from lightning_compress import compress
    >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    >>> binary = compress(net, Binarization("bwn"))
    >>> len(binary[1].weight[0].abs().unique())
    1
    """

    def __init__(
        self,
        method: str = "binary_connect",
        stochastic: bool = False,
        bound: float | None = None,
        schedule: Schedule | None = None,
        select: Select | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(schedule, select, name)
        if method not in METHODS:
            raise ConfigurationError(f"`method` is {method!r}: {did_you_mean(str(method), METHODS)}")
        if not isinstance(stochastic, bool):
            raise ConfigurationError(f"`stochastic` must be True or False, got {stochastic!r}")
        if stochastic and _KIND[method] != "sign_weight":
            raise ConfigurationError(f"`stochastic` goes with 'binary_connect' and 'binary_net' only, got {method!r}")
        if bound is not None:
            _check_positive("bound", bound)
        if bound is not None and _KIND[method] != "sign_weight":
            raise ConfigurationError(f"`bound` goes with 'binary_connect' and 'binary_net' only, got {method!r}")
        self.method, self.stochastic, self.bound = method, stochastic, None if bound is None else float(bound)

    @property
    def _clips(self) -> bool:
        return _KIND[self.method] == "sign_weight"

    @property
    def _signs_inputs(self) -> bool:
        return self.method in ("xnor", "binary_net")

    def weight_edit(self, layer: nn.Module) -> tuple[str, Mapping[str, Any]]:
        """Return kind and configuration of the parametrization of a layer's weight."""
        if not self._clips:
            return _KIND[self.method], {}
        bound = glorot_bound(real_weight(layer)) if self.bound is None else self.bound
        return _KIND[self.method], {"stochastic": self.stochastic, "bound": bound}

    def unfit(self, layer: nn.Module) -> str:
        """Refuse layers whose inputs cannot be binarized, where they should be."""
        return no_signs(layer) if self._signs_inputs and few_levels_of(layer) is None else ""

    def action(self) -> str:
        """Return what the plan says of each weight."""
        return f"binarize by {self.method}" + (", inputs too" if self._signs_inputs else "")

    def prepare(self, layers: Layers) -> Iterable[Edit]:
        """Let layers take signs, where the method says so, and parametrize each weight."""
        if self._signs_inputs:
            for path, layer in layers.items():
                if not takes_signs(layer):
                    config = {"scaled": self.method == "xnor", "amount": self.schedule.initial}
                    yield Edit("replace", path, "binary_inputs", config)
        yield from super().prepare(layers)

    def plan(self, layers: Layers) -> list[PlanRow]:
        """Return a row for each weight; refuse optimizers that know no curvature, where it is needed."""
        if self.method == "loss_aware":
            weights = {f"{path}.weight": real_weight(layer) for path, layer in layers.items()}
            optimizers = cast(LightningModule, self.module).trainer.optimizers
            check_second_moments(weights, optimizers, "`method` 'loss_aware'", "use method='bwn'")
        return super().plan(layers)

    def after_step(self, layers: Layers, optimizer: Optimizer) -> None:
        """Clip real weights to their bound, or follow the curvature, as the method says."""
        for layer in layers.values():
            weight, few = real_weight(layer), few_levels_of(layer)
            if isinstance(few, SignWeight) and weight.requires_grad:
                weight.clamp_(-few.bound, few.bound)
            if isinstance(few, LossAwareWeight):
                moment = second_moment(optimizer, weight)
                if moment is not None:
                    few.scale.copy_(loss_aware_scale(weight, moment.to(weight.dtype).sqrt()))


class Ternarization(FewLevelsCallback):
    r"""Train with weights of three values: minus a scale, zero, and the scale (Li et al., arXiv:1605.04711).

    :math:`w_t = \alpha\,\mathrm{sign}(w)\,1_{|w| > \Delta}` with :math:`\Delta = t\,\mathrm{mean}|w|` and
    :math:`\alpha` the mean magnitude beyond it, for each tensor; gradients pass to the real weights as they are. Two
    bits a weight at most, and zeros besides. Nothing gets faster by itself.

    Runs on: any device, ``ddp``.

    Args:
        threshold: t, above 0.
        schedule: As in :class:`Binarization`.
        select: As in :class:`Binarization`.
        name: Tells two of these callbacks apart.

    Raises:
        ConfigurationError: For a threshold outside its range.
        SelectionError: If no layer is left.

    >>> from lightning_compress import compress
    >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    >>> len(compress(net, Ternarization())[1].weight.unique()) <= 3
    True
    """

    def __init__(
        self,
        threshold: float = 0.7,
        schedule: Schedule | None = None,
        select: Select | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(schedule, select, name)
        _check_positive("threshold", threshold)
        self.threshold = float(threshold)

    def weight_edit(self, layer: nn.Module) -> tuple[str, Mapping[str, Any]]:
        """Return kind and configuration of the parametrization of a layer's weight."""
        return "ternary_weight", {"threshold": self.threshold}

    def action(self) -> str:
        """Return what the plan says of each weight."""
        return f"ternarize at {self.threshold:g} of the mean magnitude"


def _check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigurationError(f"`{name}` must be a finite number above 0, got {value!r}")
