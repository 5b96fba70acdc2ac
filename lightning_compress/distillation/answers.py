"""What is looked at before a teacher teaches: does it answer at all, with numbers, in a shape that losses can use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_compress.core.copies import tensors_in
from lightning_compress.core.errors import CompressionError, ConfigurationError
from lightning_compress.distillation.losses import DistillationLoss
from lightning_compress.distillation.teacher import Answer, Question, Teacher
from lightning_compress.distillation.terms import Term


def broken_rows(scores: Tensor) -> Tensor:
    """Return for each row whether its scores hold NaN or plus infinity; minus infinity is a masked class.

    Args:
        scores: (batch, classes, ...).

    Returns:
        (batch, ...), bool.

    >>> broken_rows(torch.tensor([[1.0, -torch.inf], [1.0, torch.nan], [torch.inf, 0.0]]))
    tensor([False,  True,  True])
    """
    return (scores.isnan() | scores.isposinf()).any(1) if scores.is_floating_point() else scores.ne(scores).any(1)


def check_finite(values: Any, what: str) -> None:
    """Refuse NaN and plus infinity in what a teacher returned; minus infinity is a masked class.

    Args:
        values: Tensors in any nesting.
        what: Whose and which, for the error.

    Raises:
        ConfigurationError: If there is any; names ``teacher``.
    """
    for tensor in tensors_in(values):
        if tensor.is_floating_point() and bool((tensor.isnan() | tensor.isposinf()).any()):
            raise ConfigurationError(
                f"`teacher`: {what} holds NaN or infinity, which would destroy the student; check its weights (was the "
                "right checkpoint loaded?), the inputs, and whether its numbers fit the precision of this run"
            )


def check_answer(terms: Mapping[str, Term], output: Tensor, answer: Answer, name: str, shapes: bool = True) -> None:
    """Refuse an answer that the losses cannot use, before anything was learnt from it.

    Args:
        terms: The losses, by name.
        output: The student's output, (batch, ...).
        answer: The teacher's.
        name: The teacher's, for errors.
        shapes: Whether to compare shapes too.

    Raises:
        ConfigurationError: If it is not finite, or its shape and the student's cannot be compared; names ``teacher``.
    """
    theirs = answer.output
    compared = [(key, term.loss) for key, term in terms.items() if term.loss.on == "output" and term.loss.uses_teacher]
    for key, loss in compared if shapes else ():
        reason = _misfit(loss, output.shape, theirs.shape)
        if reason:
            raise ConfigurationError(
                f"`teacher`: {name} returned {tuple(theirs.shape)} and the student {tuple(output.shape)}, which "
                f"losses.{key} ({type(loss).__name__}) cannot compare: {reason}. Or name the parts to compare with "
                "`student_output` and ModuleTeacher(module, output=...), or compare layers with a loss on features"
            )
    if compared:
        check_finite(theirs, f"the output of {name}")
    check_finite(answer.features, f"a layer of {name}")


def _misfit(loss: DistillationLoss, ours: torch.Size, theirs: torch.Size) -> str:
    try:
        loss.adapt([ours], [theirs])
    except ConfigurationError as error:
        return str(error)
    return "" if ours[:1] == theirs[:1] else "they are of different batches"


def first_answer(teacher: Teacher, question: Question) -> Answer | None:
    """Ask a teacher that nothing is known of yet.

    Raises:
        ConfigurationError: If it cannot be run with what the student's forward gets; names ``teacher`` and the inputs.
    """
    try:
        return teacher.answer(question)
    except (CompressionError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of any type: it is somebody else's forward
        inputs = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_in((question.args, question.kwargs)))
        raise ConfigurationError(
            f"`teacher`: {teacher} failed with what the student's forward got, tensors of {inputs or 'none'}: {error}; "
            "give a teacher that takes the same inputs, or a function of (batch, batch_idx) that prepares them"
        ) from error
