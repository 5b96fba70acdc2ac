"""Bits for each layer from one goal for the whole model: divided by what each layer loses, measured, drawn tighter."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_compress.core.allocation import Line, least_error, total
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
        beside, smallest = 0.0, self.fewest
        for _ in range(_TRIES):
            picks = least_error(self.lines, allowed - beside) or smallest
            measured = self._file_bytes(picks)
            if measured <= allowed or picks == smallest:
                return self._division(picks, measured, allowed)
            beside = max(beside + 1, measured - total(self.lines, picks))
        return self._division(smallest, self._file_bytes(smallest), allowed)

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
