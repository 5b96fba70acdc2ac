"""Training in fixed point, as a callback."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.core.callback import CompressionCallback
from lightning_compress.core.errors import ConfigurationError, SelectionError, did_you_mean
from lightning_compress.core.finite import require_finite_weights
from lightning_compress.core.journal import Edit
from lightning_compress.core.paths import clean_path
from lightning_compress.core.plan import PlanRow
from lightning_compress.core.run import Layers
from lightning_compress.core.schedule import Schedule
from lightning_compress.core.select import Select, Selection
from lightning_compress.core.targets import why_no_numbers
from lightning_compress.quantization.binary.callbacks import FewLevelsCallback
from lightning_compress.quantization.fixed_point.functions import ROUNDINGS, FixedPoint, round_to
from lightning_compress.quantization.fixed_point.layers import has_fixed_point
from lightning_compress.quantization.sharing.callbacks import WeightSharing
from lightning_compress.quantization.soft_sharing.callbacks import SoftWeightSharing


class FixedPointTraining(CompressionCallback):
    r"""Train with numbers of limited precision throughout, as fixed-point hardware would (arXiv:1502.02551).

    Weights and biases are fixed-point numbers after every optimizer step, activations are rounded on their way forward,
    errors and gradients on their way back. With ``stochastic`` rounding, updates that are smaller than
    :math:`\epsilon = 2^{-FL}` count on average; with ``nearest`` they are lost, and training stalls.

    The optimizer's own state stays in floating point, and so do norms and losses. Rounding costs time here: this tells
    what such hardware would reach, and leaves weights that need :math:`IL + FL` bits each. ``compress(model, ...)``
    rounds a trained model, to the nearest.

    Runs on: any device, ``ddp`` (weights and gradients are rounded alike in every process). Put it after
    ``WeightAveraging`` or ``StochasticWeightAveraging`` in the Trainer's list.

    Args:
        weights: :math:`[IL, FL]` of weights and biases, both together at most 24 bits.
        activations: :math:`[IL, FL]` of what layers return; ``None`` leaves it real.
        gradients: :math:`[IL, FL]` of errors and of gradients by weights; ``None`` leaves them real. Gradients are much
            smaller than weights: give them more fraction bits where they would vanish.
        rounding: ``"stochastic"`` or ``"nearest"``, in training.
        seed: Of the rounding of weights and gradients, which depends on it, the step and the tensor's path alone.
        select: Which layers; default all Linear and (transposed) convolutions.
        name: Tells two of these callbacks apart.

    Raises:
        ConfigurationError: For formats or a rounding outside these ranges.
        SelectionError: If no layer is selected.

    >>> from lightning_compress import compress
    >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    >>> fixed = compress(net, FixedPointTraining([2, 2], activations=None, gradients=None))
    >>> (fixed[0].weight * 4).frac().abs().max().item()
    0.0
    """

    supported: ClassVar[tuple[type[nn.Module], ...]] = (
        nn.Linear,
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.ConvTranspose1d,
        nn.ConvTranspose2d,
        nn.ConvTranspose3d,
    )
    runs_after: ClassVar[tuple[type[Callback], ...]] = (WeightAveraging, StochasticWeightAveraging)
    conflicts_on_layers: ClassVar[tuple[type[Callback], ...]] = (WeightSharing, SoftWeightSharing, FewLevelsCallback)

    def __init__(
        self,
        weights: Sequence[int] = (2, 14),
        activations: Sequence[int] | None = (2, 14),
        gradients: Sequence[int] | None = (2, 14),
        rounding: str = "stochastic",
        seed: int = 0,
        select: Select | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(Schedule(1.0, initial=1.0, shape="once"), Select() if select is None else select, name)
        self.weights = _format(weights, "weights")
        self.activations = None if activations is None else _format(activations, "activations")
        self.gradients = None if gradients is None else _format(gradients, "gradients")
        if rounding not in ROUNDINGS:
            raise ConfigurationError(f"`rounding` is {rounding!r}: {did_you_mean(str(rounding), ROUNDINGS)}")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ConfigurationError(f"`seed` must be an int, got {seed!r}")
        self.rounding, self.seed = rounding, seed

    def choose(self, root: nn.Module) -> Selection:
        """Select as ``select`` says, but for layers without parameters of their own (parametrized ones)."""
        selection = super().choose(root)
        left = {path: why for path, layer in selection.layers.items() if (why := _why_kept(layer))}
        if len(left) == len(selection.layers):
            raise SelectionError(
                f"no layer is left to round: {'; '.join(f'{p}: {why}' for p, why in left.items())}. Choose others with "
                "`select`, or leave this method out"
            )
        kept = {path: layer for path, layer in selection.layers.items() if path not in left}
        return Selection(kept, {**selection.left, **left})

    def prepare(self, layers: Layers) -> Iterable[Edit]:
        """Round what layers return, and the errors that come back, where formats are given for them."""
        for path, layer in layers.items():
            require_finite_weights(path, layer)
        if self.activations is None and self.gradients is None:
            return
        bits = {"activations": _bits(self.activations), "errors": _bits(self.gradients), "rounding": self.rounding}
        for path, layer in layers.items():
            if not has_fixed_point(layer):
                yield Edit("replace", path, "fixed_point_output", bits)

    def plan(self, layers: Layers) -> list[PlanRow]:
        """Return a row for each tensor."""
        rest = [
            f"{what} {form}" for what, form in (("outputs", self.activations), ("gradients", self.gradients)) if form
        ]
        action = f"round to {self.weights}, {self.rounding}" + (f"; {', '.join(rest)}" if rest else "")
        return [PlanRow("select", key, "x".join(map(str, p.shape)), action) for key, p in _tensors(layers)]

    def before_step(self, layers: Layers, optimizer: Optimizer, scale: float) -> None:
        """Round the gradients."""
        if self.gradients is None:
            return
        for key, parameter in _tensors(layers):
            if parameter.grad is not None:
                rounded = self._rounded(parameter.grad / scale, self.gradients, f"gradient:{key}")
                parameter.grad.copy_(rounded * scale)

    def update(self, layers: Layers, amount: float) -> None:
        """Round the weights; of a model that does not train, to the nearest."""
        for key, parameter in _tensors(layers):
            if self.in_fit:
                parameter.copy_(self._rounded(parameter, self.weights, key))
            else:
                parameter.copy_(round_to(parameter, self.weights))

    def enforce(self, layers: Layers) -> None:
        """Round what a step has changed; what is rounded stays."""
        self.update(layers, 1.0)

    def enforce_state(self, state_dict: dict[str, Any]) -> None:
        """Round weights that are about to be saved, which may be averages."""
        run = self._run
        if run is not None:
            tensors = {clean_path(key): value for key, value in state_dict.items()}
            for key, _ in _tensors(run.layers):
                if isinstance(tensors.get(key), Tensor):
                    tensors[key].copy_(self._rounded(tensors[key], self.weights, key))

    def metrics(self, layers: Layers) -> dict[str, float]:
        """Return the share of weights that are ``saturated``."""
        tensors = [parameter for _, parameter in _tensors(layers)]
        ends = sum(int(((t <= self.weights.least) | (t >= self.weights.most)).sum()) for t in tensors)
        return {"saturated": ends / sum(t.numel() for t in tensors)}

    def _rounded(self, x: Tensor, form: FixedPoint, key: str) -> Tensor:
        generator = torch.Generator(x.device)
        generator.manual_seed(zlib.crc32(f"{self.seed}:{self.updates}:{key}".encode()))
        return round_to(x, form, self.rounding, generator)


def _tensors(layers: Layers) -> Iterator[tuple[str, nn.Parameter]]:
    for path, layer in layers.items():
        for name, parameter in layer.named_parameters(recurse=False):
            yield f"{path}.{name}", parameter


FixedPointTraining.conflicts_on_layers += (FixedPointTraining,)


def _why_kept(layer: nn.Module) -> str:
    """Return why a layer's weight cannot be rounded; empty if it can."""
    weight = dict(layer.named_parameters(recurse=False)).get("weight")
    if weight is None:
        return "kept: its weight is parametrized, so rounded values could not be held"
    return why_no_numbers(weight)


def _format(bits: Sequence[int], name: str) -> FixedPoint:
    if isinstance(bits, str) or not isinstance(bits, Sequence) or len(bits) != 2:
        raise ConfigurationError(f"`{name}` must be [integer bits, fraction bits], such as [2, 14], got {bits!r}")
    try:
        return FixedPoint(*bits)
    except ConfigurationError as error:
        raise ConfigurationError(f"`{name}`: {error}") from error


def _bits(form: FixedPoint | None) -> list[int] | None:
    return None if form is None else [form.integer_bits, form.fraction_bits]
