"""Integers at the end of a recipe: conversion as a callback."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from lightning.pytorch import Callback
from torch import nn

from lightning_compress.core.callback import CompressionCallback
from lightning_compress.core.errors import SelectionError
from lightning_compress.core.journal import Edit
from lightning_compress.core.plan import PlanRow
from lightning_compress.core.run import Layers
from lightning_compress.core.schedule import Schedule
from lightning_compress.core.select import Select, Selection
from lightning_compress.quantization.callbacks import QuantizationAwareTraining
from lightning_compress.quantization.convert import Conversion, convert_in_place, is_quantized
from lightning_compress.quantization.integer_tensor import IntegerTensor

ROOT = ""
"""Path of the model itself, which is converted as a whole."""


class IntegerConversion(CompressionCallback):
    """Turn a fake-quantized model into integers after fit, on a copy; batch norms fold exactly.

    Put it behind ``QuantizationAwareTraining`` in the Trainer's list, or into a stage of its own behind it; after fit
    ``callback.compressed`` computes with integer weights, which ``save_compressed`` and ``CompressionReport`` store as
    they are, and ``export`` writes for runtimes. In torch itself the integers are turned back into floats whenever a
    layer runs, so it makes the file smaller, and no pass faster: that takes a runtime.

    Runs on: CPU and CUDA, any strategy that does not spawn processes.

    Args:
        name: Tells two of these callbacks apart.

    Raises:
        SelectionError: Before training, if nothing in the model is quantized.

    Attributes:
        done: After the conversion: layers with integers, batch norms folded, and why others stay.

    >>> IntegerConversion().done.integers
    {}
    """

    runs_after: ClassVar[tuple[type[Callback], ...]] = (QuantizationAwareTraining,)
    comes_last: ClassVar[bool] = True

    def __init__(self, name: str | None = None) -> None:
        super().__init__(Schedule(final=1.0, shape="once"), Select(), name)
        self.done = Conversion()
        self._example_inputs: Any = None

    def choose(self, root: nn.Module) -> Selection:
        """Select the model itself.

        Raises:
            SelectionError: If nothing in it is quantized.
        """
        if not is_quantized(root):
            raise SelectionError(
                f"{type(root).__name__} has no layer that is quantized; put QuantizationAwareTraining before "
                "IntegerConversion, or convert in a stage behind it"
            )
        return Selection({ROOT: root}, {})

    def examine(self, root: nn.Module, example_inputs: Any) -> Selection:
        """Keep the example inputs, for networks that only ``torch.export`` can trace."""
        self._example_inputs = example_inputs
        return self.choose(root)

    def plan(self, layers: Layers) -> list[PlanRow]:
        """Return one row."""
        return [PlanRow("select", ROOT, type(layers[ROOT]).__name__, "to integers after fit, on a copy")]

    def update(self, layers: Layers, amount: float) -> None:
        """Convert, unless a Trainer is training the model now."""
        if not self.in_fit:
            self.done = convert_in_place(layers[ROOT], self._example_inputs)

    def finalize(self, layers: Layers) -> Iterable[Edit]:
        """Convert the copy of a model that a Trainer has trained."""
        if self.in_fit:
            self.done = convert_in_place(layers[ROOT], self._example_inputs)
        return ()

    def metrics(self, layers: Layers) -> Mapping[str, float]:
        """Return ``integer_layers``: the number of integer weights there are already."""
        return {"integer_layers": float(sum(isinstance(part, IntegerTensor) for part in layers[ROOT].modules()))}

    def reset_values(self) -> None:
        """Forget the example inputs and the result of another model."""
        self.done, self._example_inputs = Conversion(), None
