"""What a goal for the accuracy of a quantized model is measured by."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.core.calibration import run_on
from lightning_compress.core.copies import full_copy
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.isolation import eval_mode, same_randomness
from lightning_compress.quantization.post_training.bit_goal import BitGoal


def check_metric(model: nn.Module, goal: BitGoal, batch: Any) -> None:
    """Try the metric of a goal, before a model is trained for it, on a copy; whether the number is useful shows later.

    Args:
        model: Not trained yet, in float; nothing of it changes.
        goal: With a drop, else nothing is tried.
        batch: Calibration data for the metric that counts answers; another metric brings its own.

    Raises:
        ConfigurationError: If it fails, or returns no number.

    >>> check_metric(nn.Linear(1, 1), BitGoal(drop=1.0, metric=lambda model: 97.5), None)
    """
    if goal.drop is None:
        return
    with same_randomness():
        copy = full_copy(model)
        if goal.metric is None:
            Accuracy(copy, [batch])
        else:
            _number_of(goal.metric, copy)


def judge(metric: Callable[[nn.Module], float], model: nn.Module, finite: bool = False) -> float:
    """Return what ``metric`` says of a model, which must be a number that can be compared."""
    value = _number_of(metric, model)
    if math.isnan(value) or (finite and math.isinf(value)):
        raise _no_number(value)
    return value


def _number_of(metric: Callable[[nn.Module], float], model: nn.Module) -> float:
    try:
        given = metric(model)
    except ConfigurationError:
        raise
    except Exception as error:  # the user's own code
        raise ConfigurationError(
            f"`metric` failed on {type(model).__name__} ({type(error).__name__}: {error}); it is called with a model "
            "alone, and returns a number that is larger for better models"
        ) from error
    try:
        return float(given)
    except (TypeError, ValueError, RuntimeError) as error:  # a tensor of several values is a RuntimeError
        raise _no_number(given) from error


def _no_number(given: object) -> ConfigurationError:
    return ConfigurationError(
        f"`metric` must return a number that is larger for better models, got {_kind(given)}: {given!r}; of a "
        "quantized model that computes nothing useful it may be -inf"
    )


class Accuracy:
    """The share of right answers on labelled batches, in per cent; without labels right is what a model answers now."""

    def __init__(self, model: nn.Module, batches: Sequence[Any]) -> None:
        self.batches = batches
        self.right = [
            labels if (labels := _labels(batch, answer)) is not None else answer
            for batch, answer in zip(batches, self._answers(model), strict=True)
        ]

    def __call__(self, model: nn.Module) -> float:
        """Return the share."""
        pairs = list(zip(self._answers(model), self.right, strict=True))
        return 100 * sum(int((a == b).sum()) for a, b in pairs) / max(1, sum(b.numel() for _, b in pairs))

    def _answers(self, model: nn.Module) -> list[Tensor]:
        with eval_mode(model), torch.no_grad():
            outputs = [run_on(model, batch) for batch in self.batches]
        for output in outputs:
            if not isinstance(output, Tensor) or output.dim() < 2:
                raise ConfigurationError(
                    "`drop` counts the largest of the outputs (batch, classes, ...) as the answer, and the model "
                    f"returns {_kind(output)}; give `metric`, a function of a model"
                )
        return [output.argmax(1).cpu() for output in outputs]


def _labels(batch: Any, answers: Tensor) -> Tensor | None:
    """Return the second item of a batch, if it may be the classes that belong to these answers."""
    second = batch[1] if isinstance(batch, list | tuple) and len(batch) > 1 else None
    fits = isinstance(second, Tensor) and second.shape == answers.shape and not second.is_floating_point()
    return second.cpu() if fits and second is not None else None


def _kind(output: Any) -> str:
    return f"a tensor of shape {list(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
