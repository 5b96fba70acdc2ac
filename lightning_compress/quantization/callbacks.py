"""Quantization-aware training as a callback."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, cast

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import nn
from torch.optim import Optimizer

from lightning_compress.core.callback import CompressionCallback
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.examples import own_example
from lightning_compress.core.journal import Edit
from lightning_compress.core.paths import named_layers
from lightning_compress.core.plan import PlanRow
from lightning_compress.core.rules import build_rules
from lightning_compress.core.run import Layers
from lightning_compress.core.schedule import Time
from lightning_compress.core.select import Select, Selection
from lightning_compress.quantization.assignment import QuantizationRule, SpecLike, make_settings
from lightning_compress.quantization.choice import Choice, choose_quantized
from lightning_compress.quantization.layers import CLASSES, own_quantizers
from lightning_compress.quantization.phases import make_phases
from lightning_compress.quantization.preparation import plan_rows, prepare_edits
from lightning_compress.quantization.quantizer import Quantizer, update_ranges
from lightning_compress.quantization.spec import FIXED
from lightning_compress.quantization.states import begin, enforce_state, estimate, follow, mean_bits

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_FREEZE: Mapping[str, Time] = {"ranges": "80%", "batch_norm": "80%"}
_COSTLY_EVERY = 20
"""Steps between moves of a range that takes long to find."""


class QuantizationAwareTraining(CompressionCallback):
    r"""Train with the rounding of integer arithmetic in the forward pass (Jacob et al. 2018, arXiv:1712.05877).

    Weights and activations are quantized and dequantized, :math:`\hat x = (\mathrm{clamp}(\mathrm{round}(x/s) + z,
    q_{min}, q_{max}) - z)\,s`, and gradients pass straight through the rounding, so the float weights behind them learn
    to live with it. Layers become quantized ones in place, before optimizers exist: the same Parameters under the same
    keys, so pruning masks, ties, frozen layers, weight averaging and checkpoints of the float model stay what they
    were. Zero stays exactly zero.

    The course: ranges of activations are observed from the first step on; at ``start`` quantization begins; at
    ``freeze`` ranges stop moving and batch norms use their running statistics. Ranges of weights follow the weights.
    Learned ranges (LSQ, LSQ+, PACT) are parameters of the model's own optimizer and learn to the end, by a tenth a step
    at most: Adam would move small ones by more. Weight decay acts on them too, as PACT wants it; for LSQ give them a
    group without it. Ranges are the same on all processes.

    It makes nothing smaller or faster by itself: the result is the float model that loses least when it becomes
    integers. With 8 bits post-training quantization often does as well, without training; below, train.

    Runs on: any device, ``ddp``, ``torch.compile`` (a few recompilations, where a phase begins). Put it after
    ``WeightAveraging`` or ``StochasticWeightAveraging`` in the Trainer's list.

    Args:
        weights: Bits from 2 to 8, a mapping of what differs from 8 bits, symmetric, per channel, such as
            ``{bits: 4, range: lsq}`` (:class:`QuantizerSpec`), or ``None`` for float.
        activations: The same; by default 8 bits, affine, one scale, a moving average of the extremes.
        select: Which layers; by default all Linear, (transposed) convolution, embedding, recurrent and attention
            layers that have no forward of their own.
        start: When quantization begins: an epoch, a share of the run, or ``{step: N}``. Until then ranges are observed.
        freeze: When ``ranges`` and ``batch_norm`` are frozen; by default both at ``"80%"``. ``{}`` for never.
        rules: Named exceptions for single layers (mixed precision); the last that matches wins.
        ends: Least bits of the first and the last layer; ``None`` treats them as all others.
        name: Tells two of these callbacks apart.

    Raises:
        ConfigurationError: For a value outside its range, or a model that was quantized in another way.
        SelectionError: If no layer is selected, or a rule matches none.

    >>> callback = QuantizationAwareTraining(weights=4, activations={"bits": 4, "range": "pact"}, start="20%")
    >>> str(callback.schedule.milestones)
    "(('20%', 0.5), ('80%', 1.0))"
    """

    supported: ClassVar[tuple[type[nn.Module], ...]] = tuple(CLASSES)
    runs_after: ClassVar[tuple[type[Callback], ...]] = (WeightAveraging, StochasticWeightAveraging)
    needs_training: ClassVar[str] = "its ranges are observed, and its weights adapted, over the steps of a training"

    def __init__(
        self,
        weights: SpecLike = 8,
        activations: SpecLike = 8,
        select: Select | None = None,
        start: Time = "10%",
        freeze: Mapping[str, Time | None] | None = None,
        rules: Mapping[str, QuantizationRule] | None = None,
        ends: int | None = 8,
        name: str | None = None,
    ) -> None:
        self.phases = make_phases(start, _FREEZE if freeze is None else freeze)
        super().__init__(self.phases.schedule, Select() if select is None else select, name)
        built = build_rules(rules, QuantizationRule)
        self.settings = make_settings(weights, activations, built, ends)
        self._choice = Choice()
        self._norms: tuple[str, ...] = ()
        self._fresh = self._learned = False

    def choose(self, root: nn.Module) -> Selection:
        """Select the layers, find out what each gets, and which batch norms there are."""
        choice = self._choice = choose_quantized(root, super().choose(root), self.settings, own_example(root))
        everything = named_layers(root)
        self._norms = tuple(path for path, layer in everything.items() if isinstance(layer, NORMS))
        chosen = {*choice.paths, *self._norms}
        return Selection({path: layer for path, layer in everything.items() if path in chosen}, choice.left)

    def prepare(self, layers: Layers) -> Iterable[Edit]:
        """Give each layer its quantizers, once."""
        return prepare_edits(layers, self._choice.assigned, self._choice.sites, self._choice.encoders)

    def plan(self, layers: Layers) -> list[PlanRow]:
        """Return a row for each layer; refuse learned ranges that no optimizer trains."""
        module = cast(LightningModule, self.module)
        held = {
            id(p)
            for optimizer in module.trainer.optimizers
            for group in optimizer.param_groups
            for p in group["params"]
        }
        for path in self._choice.paths:
            for quantizer in own_quantizers(layers[path]):
                if any(p.requires_grad and id(p) not in held for p in quantizer.parameters()):
                    raise ConfigurationError(
                        f"the learned range of {path!r} is in no optimizer: `configure_optimizers` must take all of "
                        "`self.parameters()`, or those of this layer; or choose an observed `range`"
                    )
        return plan_rows(layers, self._choice.assigned, self._choice.sites)

    def attach_values(self, layers: Layers) -> None:
        """Let quantizers observe, or be as far as a checkpoint says."""
        begun = self.phases.begun(self._amount)
        for quantizer in self._quantizers(layers):
            if not begun:
                quantizer.observing = quantizer.spec.range != FIXED
        for path in self._choice.assigned:
            estimate(layers[path])
        self._fresh = False
        self._learned = any(quantizer.spec.learned for quantizer in self._quantizers(layers))
        self._freeze_norms(layers)

    def before_step(self, layers: Layers, optimizer: Optimizer, scale: float) -> None:
        """Note learned ranges, so that none moves too far."""
        for quantizer in self._quantizers(layers) if self._learned else ():
            quantizer.remember()

    def after_step(self, layers: Layers, optimizer: Optimizer) -> None:
        """Move ranges by what the step has seen, on all processes alike."""
        mine = layers if self._run is None else {**layers, **self._run.trained_by_none(optimizer)}
        costly = self.updates % _COSTLY_EVERY == 0
        update_ranges(self._quantizers(mine), costly)
        for path in self._choice.assigned:
            if path in mine:
                follow(mine[path], costly)
        self._fresh = True

    def enforce(self, layers: Layers) -> None:
        """Keep learned ranges above zero and batch norms frozen; make ranges consistent after weights were averaged."""
        for quantizer in self._quantizers(layers):
            quantizer.keep_positive()
            if not self._fresh:
                quantizer.refresh()
        self._fresh = False
        self._freeze_norms(layers)

    def enforce_state(self, state_dict: dict[str, Any]) -> None:
        """Put the flags, and consistent ranges, into a ``state_dict`` that may hold averages."""
        if self._run is not None:
            enforce_state(state_dict, {path: self._run.layers[path] for path in self._choice.paths})

    def update(self, layers: Layers, amount: float) -> None:
        """Begin what the schedule says: quantization, frozen ranges, frozen batch norms."""
        begun = self.phases.begun(amount)
        for path in self._choice.paths:
            begin(layers[path], frozen="ranges" in begun)
        self._freeze_norms(layers, begun)

    def metrics(self, layers: Layers) -> dict[str, float]:
        """Return the share of quantizers that are ``quantizing``, and the mean ``weight_bits``."""
        quantizers = self._quantizers(layers)
        share = sum(q.active for q in quantizers) / max(1, len(quantizers))
        return {"quantizing": share, "weight_bits": mean_bits({path: layers[path] for path in self._choice.assigned})}

    def reset_values(self) -> None:
        """Forget what belongs to another model."""
        self._choice, self._norms = Choice(), ()
        self._fresh = self._learned = False

    def _quantizers(self, layers: Layers) -> list[Quantizer]:
        return [q for path in self._choice.paths if path in layers for q in own_quantizers(layers[path])]

    def _freeze_norms(self, layers: Layers, begun: set[str] | None = None) -> None:
        if "batch_norm" in (self.phases.begun(self._amount) if begun is None else begun):
            for path in self._norms:
                if path in layers and layers[path].training:
                    layers[path].eval()
