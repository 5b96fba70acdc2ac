"""Post-training quantization as a callback."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_compress.core.calibration import calibration_batches, check_batches, require_batches
from lightning_compress.core.callback import CompressionCallback
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.examples import own_example
from lightning_compress.core.finite import require_finite
from lightning_compress.core.first_look import check_first_batch, look_ahead
from lightning_compress.core.journal import Edit
from lightning_compress.core.plan import PlanRow, render_plan
from lightning_compress.core.rules import build_rules
from lightning_compress.core.run import Layers
from lightning_compress.core.schedule import Schedule
from lightning_compress.core.select import Select, Selection
from lightning_compress.quantization.assignment import QuantizationRule, SpecLike, make_settings
from lightning_compress.quantization.choice import Choice, choose_quantized
from lightning_compress.quantization.layers import CLASSES, QuantizedLayer
from lightning_compress.quantization.post_training.bit_goal import BitGoal, split_goal
from lightning_compress.quantization.post_training.bit_lines import searched_layers
from lightning_compress.quantization.post_training.bit_metric import check_metric
from lightning_compress.quantization.post_training.procedure import quantize_trained
from lightning_compress.quantization.post_training.search import divide_bits, with_bits
from lightning_compress.quantization.post_training.steps import PostTrainingSteps, as_steps
from lightning_compress.quantization.preparation import plan_rows
from lightning_compress.quantization.spec import ACTIVATION, LEARNED, WEIGHT
from lightning_compress.quantization.states import mean_bits

ROOT = ""
"""Path of the model itself, which is run; selected beside the layers."""


class PostTrainingQuantization(CompressionCallback):
    r"""Quantize a trained model from calibration batches, without training (Nagel et al. 2021, arXiv:2106.08295).

    The ranges of activations are observed on the batches; weights become integers so that the outputs of each layer
    change least. In ``compress(model, ...)`` that is all there is to it. In a Trainer nothing happens while it fits;
    after fit a copy is quantized and offered as ``callback.compressed``. Layers, bits and the places where activations
    are quantized are those of :class:`~lightning_compress.QuantizationAwareTraining`; ``convert`` turns the result into
    integers. Zeros stay zeros. Labels are not needed.

    With 8 bits it does as well as training. With 4 bits for weights it loses little where the network is large for its
    task; with 4 bits for activations, or 2 for weights, train. Layers that share their weight, transposed convolutions,
    embeddings, recurrent and attention layers are rounded to the nearest value.

    Runs on: CPU and CUDA, ``ddp``. A batch is ``inputs`` or ``(inputs, targets)``; inputs are a tensor, a tuple of
    several positional ones, or a mapping of keywords (of which those that ``forward`` does not take are left out).

    With a goal in place of bits (:class:`BitGoal`) the bits of the weights are divided over the layers by what
    each layer loses, so that the file is as small, or the accuracy as high, as asked; ``bits_by_layer`` and the plan
    then say what each of them got.

    Args:
        batches: Calibration data: a tensor, a list of batches, a loader, or a data module (its training data). With
            DDP those of the first process count.
        weights: Bits from 2 to 8, a mapping of what differs from 8 bits, symmetric, per channel, in the range with the
            least squared error, a goal that divides bits over the layers, such as ``BitGoal(size=0.15)`` or
            ``{size: 0.15}``, or ``None`` for float.
        activations: The same; by default 8 bits, affine, one scale, in the range with the least squared error.
        select: Which layers; by default all that quantization-aware training quantizes.
        rules: Named exceptions for single layers (mixed precision); the last that matches wins.
        ends: Least bits of the first and the last layer; ``None`` treats them as all others.
        steps: What differs from :class:`PostTrainingSteps`: ``equalize``, ``rounding``, ``correct_bias``, ``samples``.
        name: Tells two of these callbacks apart.

    Raises:
        ConfigurationError: For a value outside its range, a learned range, a model that is quantized already, batches
            that the model cannot run on or that hold NaN or infinity, a metric that fails, or a goal that a trained
            model cannot reach. What cannot be known before training is an error after it, which loses nothing of it:
            shuffled batches with NaN beyond the first samples, for example.
        SelectionError: If no layer is selected, or a rule matches none.

    >>> from lightning_compress import compress
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> quantized = compress(net, PostTrainingQuantization(torch.randn(64, 4), weights=4, ends=None))
    >>> len(quantized[0].weight[0].unique()) <= 15, quantized[0].weight_quantizer.spec.bits
    (True, 4)
    """

    supported: ClassVar[tuple[type[nn.Module], ...]] = tuple(CLASSES)
    needs_example: ClassVar[bool] = False
    replaces_after_fit: bool = True

    def __init__(
        self,
        batches: Any = None,
        weights: SpecLike | BitGoal = 8,
        activations: SpecLike = 8,
        select: Select | None = None,
        rules: Mapping[str, QuantizationRule] | None = None,
        ends: int | None = 8,
        steps: PostTrainingSteps | Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(Schedule(final=1.0, shape="once"), Select() if select is None else select, name)
        self.batches, self.steps = batches, as_steps(steps)
        check_batches(batches, self.steps.samples)
        defaults = replace(WEIGHT, range="mse"), replace(ACTIVATION, range="mse")
        general, self.goal = split_goal(weights, defaults[0])
        self.settings = make_settings(general, activations, build_rules(rules, QuantizationRule), ends, defaults)
        self._choice = Choice()

    def choose(self, root: nn.Module) -> Selection:
        """Select the layers, find out what each gets, and the model itself."""
        require_batches(self.batches)
        selection = super().choose(root)
        for path, layer in selection.layers.items():
            if isinstance(layer, QuantizedLayer):
                raise ConfigurationError(
                    f"{path!r} is quantized already; quantize the float model, or leave it out with "
                    "select=Select(exclude=[...])"
                )
        self._choice = choose_quantized(root, selection, self.settings, own_example(root))
        if self.goal is not None and not searched_layers(self._choice.assigned):
            raise ConfigurationError("`weights` has a goal, but rules decide on the bits of every layer; loosen one")
        for path, given in self._choice.assigned.items():
            for role, spec in (("weights", given.weights), ("activations", given.activations)):
                if spec is not None and spec.range in LEARNED:
                    raise ConfigurationError(
                        f"`{role}` of {path!r} ask for the range {spec.range!r}, which is learned by training; write "
                        "'mse', 'minmax' or 'percentile', or use QuantizationAwareTraining"
                    )
        return Selection(
            {ROOT: root, **{path: root.get_submodule(path) for path in self._choice.paths}}, self._choice.left
        )

    def examine(self, root: nn.Module, example_inputs: Any) -> Selection:
        """Refuse calibration data that the model cannot run on, and a metric that fails, before it is trained."""
        batch = check_first_batch(root, self.batches)
        if not self.at_once:
            layers = {path: layer for path, layer in self.layers(root).items() if path in self._choice.assigned}
            look_ahead(root, layers, self.batches, self.steps.samples)
            if self.goal is not None:
                check_metric(root, self.goal, batch)
        return Selection(self.layers(root), dict(self._left))

    def plan(self, layers: Layers) -> list[PlanRow]:
        """Return a row for each layer, and one for each other module whose result is quantized."""
        rows = plan_rows(layers, self._choice.assigned, self._choice.sites)
        searched = searched_layers(self._choice.assigned) if self.goal else ()
        bits = dict.fromkeys(searched, f", or fewer bits: {self.goal}")
        return [replace(row, action=f"{row.action}{bits.get(row.layer, '')}; after fit, on a copy") for row in rows]

    def update(self, layers: Layers, amount: float) -> None:
        """Quantize, unless a Trainer is training the model now."""
        if not self.in_fit:
            self._quantize(layers)

    def finalize(self, layers: Layers) -> Iterable[Edit]:
        """Quantize the copy of a model that a Trainer has trained."""
        if self.in_fit:
            self._quantize(layers)
        return ()

    def metrics(self, layers: Layers) -> dict[str, float]:
        """Return ``weight_bits``: the mean number of bits of a weight; of the model in training, 32."""
        return {"weight_bits": mean_bits({path: layers[path] for path in self._choice.assigned})}

    @property
    def left(self) -> Mapping[str, str]:
        """What stays float, is rounded to nearest or keeps its bias, by path, and why; complete after quantization."""
        return dict(self._left)

    @property
    def bits_by_layer(self) -> Mapping[str, int]:
        """Bits of the weights of each quantized layer, by path; with a goal, known after quantization."""
        found = {path: given.weights for path, given in self._choice.assigned.items()}
        return {path: spec.bits for path, spec in found.items() if spec is not None}

    def reset_values(self) -> None:
        """Forget the layers of another model."""
        self._choice = Choice()

    def _quantize(self, layers: Layers) -> None:
        root = layers[ROOT]
        batches = list(calibration_batches(self.batches, self.steps.samples))
        require_finite(root, {path: layers[path] for path in self._choice.assigned}, batches)
        many = self.in_fit and torch.distributed.is_available() and torch.distributed.is_initialized()
        if self.goal is not None:
            self._divide(root, self.goal, batches, many)
        self._left |= quantize_trained(root, self._choice, self.steps, batches)
        if self.goal is not None:
            rows = plan_rows(layers, self._choice.assigned, self._choice.sites)
            self.plan_text = render_plan(f"{self.state_key}: {self.goal}", rows)
            rank_zero_info(self.plan_text)
        if many:
            for tensor in (*root.parameters(), *root.buffers()):  # processes may have read different batches
                torch.distributed.broadcast(tensor.data, 0)

    def _divide(self, root: nn.Module, goal: BitGoal, batches: Sequence[Any], many: bool) -> None:
        """Give each layer its bits; the first process decides."""
        division = divide_bits(root, self._choice, goal, self.steps, batches)
        if not division.reached:
            said = (
                f"`weights` has the goal of {goal}, and the trained model comes to {division.measured:.6g} where "
                f"{division.allowed:.6g} is allowed; loosen it, allow other `bits`, or lower `ends`"
            )
            if not self.in_fit:
                raise ConfigurationError(said)
            rank_zero_warn(f"{said}. The model is quantized with the bits that come nearest")
        bits = torch.tensor(list(division.bits.values()), device=next(root.parameters()).device)
        if many:
            torch.distributed.broadcast(bits, 0)
        self._choice = with_bits(self._choice, dict(zip(division.bits, bits.tolist(), strict=True)))
