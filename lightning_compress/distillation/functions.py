"""A teacher that is a function of the batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.distillation.taps import pick
from lightning_compress.distillation.teacher import Answer, Question, Teacher


class FunctionTeacher(Teacher):
    """A function of the batch: a remote service, stored outputs, an oracle.

    Args:
        function: Called as ``function(batch, batch_idx)`` with the batch that ``training_step`` gets; returns the
            output, (batch, ...), for exactly these samples.

    >>> FunctionTeacher(lambda batch, batch_idx: batch[0] * 2).answer(Question((), {}, (torch.ones(2), 0))).output
    tensor([2., 2.])
    """

    has_validation = False

    def __init__(self, function: Callable[[Any, int], Tensor]) -> None:
        if not callable(function):
            raise ConfigurationError(f"`teacher` must be something to call, got {type(function).__name__}")
        try:
            inspect.signature(function).bind(None, 0)
        except TypeError as error:
            raise ConfigurationError(
                f"`teacher` must take (batch, batch_idx): {error}; write lambda batch, batch_idx: ..."
            ) from error
        except ValueError:  # it does not say what it takes
            pass
        self.function = function

    def answer(self, question: Question) -> Answer | None:
        """Call the function, for training data only."""
        if not question.training:
            return None
        with torch.no_grad():
            output = self.function(question.batch, question.batch_idx)
        if output is None:
            raise ConfigurationError(
                "`teacher`: the function returned None; return its outputs for the batch, a tensor"
            )
        return Answer(pick(output, where="the teacher").detach())
