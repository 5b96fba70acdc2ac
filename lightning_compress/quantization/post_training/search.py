"""Bits for each layer from one goal for the whole model: divided by what each layer loses, measured, drawn tighter."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_compress.core.allocation import Line, Picks, least_error, total
from lightning_compress.core.checkpoint import save_compressed
from lightning_compress.core.copies import full_copy
from lightning_compress.quantization.choice import Choice
from lightning_compress.quantization.convert import convert_in_place
from lightning_compress.quantization.post_training.bias import output_means
from lightning_compress.quantization.post_training.bit_goal import BitGoal
from lightning_compress.quantization.post_training.bit_lines import Candidates, bit_lines
from lightning_compress.quantization.post_training.bit_metric import Accuracy, judge
from lightning_compress.quantization.post_training.procedure import (
    equalize_layers,
    example_of,
    quantize_trained,
    summed_layers,
)
from lightning_compress.quantization.post_training.steps import PostTrainingSteps

_ROOM = 256
"""Bytes of a file that are left for what is said of its origin."""
_TRIES = 8
_CLOSE = 0.95
"""Share of a budget of bytes that a division of it must use, if tries are left."""


@dataclass(frozen=True)
class Division:
    """What a search found.

    Args:
        bits: By path, of the layers whose bits were searched.
        reached: Whether the goal holds.
        measured: Bytes of the file, or by how much the metric falls.
        allowed: What the goal allows of it.
    """

    bits: Mapping[str, int]
    reached: bool
    measured: float
    allowed: float


def divide_bits(
    model: nn.Module, choice: Choice, goal: BitGoal, steps: PostTrainingSteps, batches: Sequence[Any]
) -> Division:
    """Return how many bits each layer gets, so that the quantized model obeys a goal.

    For a size: the model is quantized with the bits that the budget allows, converted and written; what the file takes
    beside the weights is what the next budget leaves out. For a drop: budgets are halved towards the smallest model
    that was measured to fall no more. Nothing is random; the model itself is not changed.

    Args:
        model: In float.
        choice: What is quantized; layers whose bits a rule gave keep them.
        goal: The goal.
        steps: Steps of the quantization, all of which each trial takes.
        batches: Calibration data, read several times.

    Raises:
        ConfigurationError: If the metric is none.
    """
    search = _Search(model, choice, goal, steps, batches)
    return search.for_size() if goal.drop is None else search.for_drop()


def largest_within(lines: Sequence[Line], allowed: float, measure: Callable[[Picks], float]) -> tuple[Picks, float]:
    """Return the division whose file is the largest within a budget, and its size; the smallest one if none fits.

    What a file takes beside the weights is known once it is written, and may jump: names of many tensors are folded
    where that is worth it. So each try corrects the budget by what the last one took, between two that bracket it.

    Args:
        lines: The layers.
        allowed: Bytes that the file may take.
        measure: Returns the bytes of the file for the number of the candidate of each layer.

    >>> import numpy as np
    >>> line = Line(np.array([10.0, 20.0, 40.0]), np.array([0.6, 0.2, 0.0]), np.zeros(3))
    >>> largest_within([line], 31.0, lambda picks: 8 + line.cost[picks[0]])
    ((1,), 28.0)
    """
    fewest: Picks = tuple(int(line.cost.argmin()) for line in lines)
    known: dict[Picks, float] = {}
    beside, low, high = 0.0, 0.0, math.inf  # bytes that are no weights: assumed; too few; enough
    for _ in range(_TRIES):
        picks = least_error(lines, allowed - beside) or fewest
        if picks not in known:
            known[picks] = float(measure(picks))
        if known[picks] > allowed:
            low = max(low, beside)
        else:
            high = min(high, beside)
        if _CLOSE * allowed <= known[picks] <= allowed or (known[picks] > allowed and picks == fewest):
            break
        own = known[picks] - total(lines, picks)
        beside = own if low < own < high else (low + high) / 2 if high < math.inf else beside + 1
    fitting = [picks for picks, measured in known.items() if measured <= allowed]
    best = max(fitting, key=known.__getitem__, default=fewest)
    if best not in known:
        known[best] = float(measure(best))
    return best, known[best]


def with_bits(choice: Choice, bits: Mapping[str, int]) -> Choice:
    """Return a choice in which the weights of some layers have other numbers of bits."""
    assigned = dict(choice.assigned)
    for path, number in bits.items():
        spec = assigned[path].weights
        assigned[path] = replace(assigned[path], weights=None if spec is None else spec.with_bits(number))
    return replace(choice, assigned=assigned)


class _Search:
    def __init__(
        self, model: nn.Module, choice: Choice, goal: BitGoal, steps: PostTrainingSteps, batches: Sequence[Any]
    ) -> None:
        self.model, self.choice, self.goal, self.steps, self.batches = model, choice, goal, steps, batches
        scaled = full_copy(model)
        if steps.equalize:
            equalize_layers(scaled, choice, batches)
        called = list(output_means(scaled, summed_layers(scaled, choice), batches))
        self.layers = bit_lines(scaled, choice.assigned, goal.bits, called, batches)
        self.lines: list[Line] = [layer.line for layer in self.layers]
        self.fewest = tuple(0 for _ in self.layers)

    def for_size(self) -> Division:
        """Return the best division of a budget of bytes."""
        own = {id(t): t for t in self.model.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
        allowed = int((self.goal.size or 0.0) * sum(t.numel() * t.element_size() for t in own.values()))
        return self._division(*largest_within(self.lines, allowed, self._file_bytes), allowed)

    def for_drop(self) -> Division:
        """Return the smallest division found whose metric falls no more than allowed."""
        allowed = float(self.goal.drop or 0.0)
        metric = self.goal.metric or Accuracy(self.model, self.batches)
        before = judge(metric, self.model, finite=True)
        best = tuple(len(layer.bits) - 1 for layer in self.layers)
        fall = before - judge(metric, self._quantized(best))
        low, high = total(self.lines, self.fewest), total(self.lines, best)
        known = {best: fall}
        for _ in range(_TRIES if fall <= allowed else 0):
            middle = (low + high) / 2
            picks = least_error(self.lines, middle) or self.fewest
            if picks not in known:
                known[picks] = before - judge(metric, self._quantized(picks))
            if known[picks] <= allowed:
                best, high = picks, min(middle, total(self.lines, picks))
            else:
                low = middle
        return self._division(best, known[best], allowed)

    def _quantized(self, picks: Sequence[int]) -> nn.Module:
        copy = full_copy(self.model)
        quantize_trained(copy, with_bits(self.choice, _bits(self.layers, picks)), self.steps, self.batches)
        return copy

    def _file_bytes(self, picks: Sequence[int]) -> int:
        copy = self._quantized(picks)
        convert_in_place(copy, example_of(copy, self.batches))
        with tempfile.TemporaryDirectory() as folder:
            return save_compressed(copy, Path(folder) / "trial.safetensors").bytes + _ROOM

    def _division(self, picks: Sequence[int], measured: float, allowed: float) -> Division:
        return Division(_bits(self.layers, picks), measured <= allowed, measured, allowed)


def _bits(layers: Sequence[Candidates], picks: Sequence[int]) -> dict[str, int]:
    return {path: layer.bits[pick] for layer, pick in zip(layers, picks, strict=True) for path in layer.paths}
