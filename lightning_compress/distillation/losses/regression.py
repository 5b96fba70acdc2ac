"""Losses on outputs that are numbers, not classes."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.distillation.adapters import Features, resize_like
from lightning_compress.distillation.losses.base import DistillationLoss, Pair, check_maps
from lightning_compress.distillation.losses.numeric import (
    check_range,
    check_same,
    check_word,
    full_precision,
    mean_or_zero,
)

KINDS = ("mse", "l1", "huber")


@full_precision
def regression_distillation(
    student: Tensor, teacher: Tensor, kind: Literal["mse", "l1", "huber"] = "mse", delta: float = 1.0
) -> Tensor:
    r"""Distance of predicted numbers: :math:`d = s - t`, the mean of :math:`d^2`, :math:`|d|` or Huber's function.

    Huber (1964): :math:`d^2 / 2` for :math:`|d| \le \delta`, else :math:`\delta (|d| - \delta / 2)`, so that the
    teacher's outliers pull less.

    Args:
        student: Predictions, any shape.
        teacher: Same shape; detached.
        kind: ``mse``, ``l1`` or ``huber``.
        delta: Where Huber's function turns straight, above 0.

    Returns:
        A scalar, at least 0; 0 for an empty batch.

    Raises:
        ConfigurationError: For shapes that differ, or another kind.

    >>> regression_distillation(torch.tensor([1.0, 3.0]), torch.zeros(2), "huber")
    tensor(1.5000)
    """
    check_same(student, teacher, "student")
    check_word("kind", kind, KINDS)
    theirs = teacher.detach()
    if kind == "mse":
        return mean_or_zero((student - theirs).square())
    if kind == "l1":
        return mean_or_zero((student - theirs).abs())
    return mean_or_zero(F.huber_loss(student, theirs, reduction="none", delta=delta))


@full_precision
def bounded_regression(student: Tensor, teacher: Tensor, target: Tensor, margin: float = 0.0) -> Tensor:
    r"""Teacher-bounded regression (Chen et al. 2017, Learning efficient object detection models with distillation).

    .. math:: L = \frac{1}{N} \sum_n \begin{cases} \|s_n - y_n\|^2 & \|s_n - y_n\|^2 + m > \|t_n - y_n\|^2 \\ 0
        \end{cases}

    The teacher is a bound, not an aim: its numbers may point the wrong way, so a student that is better than the
    teacher by the margin is left in peace. Add it to the task's own regression loss.

    Args:
        student: Predictions ``(N, ...)``.
        teacher: Same shape; only its error counts.
        target: The truth, same shape.
        margin: m, at least 0, in squared units of the target.

    Returns:
        A scalar, at least 0; 0 for an empty batch.

    Raises:
        ConfigurationError: For shapes that differ.

    >>> student, teacher = torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0], [2.0]])
    >>> bounded_regression(student, teacher, torch.zeros(2, 1))
    tensor(4.5000)
    """
    check_same(student, teacher, "student")
    if target.shape != student.shape:
        raise ConfigurationError(
            f"`target` is {tuple(target.shape)}, but the predictions are {tuple(student.shape)}; bounded regression "
            "needs the true value of each number"
        )
    ours = (student - target).square().flatten(1).sum(1) if student.dim() > 1 else (student - target).square()
    error = (teacher.detach() - target).square()
    theirs = error.flatten(1).sum(1) if error.dim() > 1 else error
    return mean_or_zero(torch.where(ours + margin > theirs, ours, 0))


class RegressionDistillation(DistillationLoss):
    """Distance of predicted numbers, see :func:`regression_distillation`; the temperature is not used.

    Maps ``(N, C, H, W)`` of another height and width are resized to the teacher's.

    Args:
        kind: ``mse``, ``l1`` or ``huber``.
        delta: Where Huber's function turns straight, above 0.

    Raises:
        ConfigurationError: For another kind, or a ``delta`` that is not above 0.

    >>> RegressionDistillation("l1")(torch.tensor([1.0, 3.0]), torch.zeros(2), None, 1.0)
    tensor(2.)
    """

    name = "regression"

    def __init__(self, kind: Literal["mse", "l1", "huber"] = "mse", delta: float = 1.0) -> None:
        super().__init__()
        check_word("kind", kind, KINDS)
        check_range("delta", delta, 0, open_low=True)
        self.kind, self.delta = kind, delta

    def pair(self, student: torch.Size, teacher: torch.Size, where: str) -> Pair:
        """Return no module; maps of another height and width are resized to the teacher's, see the base class."""
        check_maps(student, teacher, where)
        return None, None

    def forward(self, student: Features, teacher: Features, target: Tensor | None, temperature: float) -> Tensor:
        """Return the loss, see :class:`DistillationLoss`."""

        def one(ours: Tensor, theirs: Tensor) -> Tensor:
            like = resize_like(ours, theirs) if ours.dim() > 3 else ours
            return regression_distillation(like, theirs, self.kind, self.delta)

        return self.over_pairs(one, student, teacher)


class BoundedRegression(DistillationLoss):
    """Teacher-bounded regression, see :func:`bounded_regression`; the temperature is not used.

    Args:
        margin: How much better than the teacher a student must be to be left in peace, at least 0, squared units.

    Raises:
        ConfigurationError: For a negative margin; in ``forward`` if there is no target.

    >>> BoundedRegression(margin=4.0)(torch.tensor([[1.0]]), torch.tensor([[2.0]]), torch.zeros(1, 1), 1.0)
    tensor(1.)
    """

    name = "bounded_regression"

    def __init__(self, margin: float = 0.0) -> None:
        super().__init__()
        check_range("margin", margin, 0)
        self.margin = margin

    def forward(self, student: Features, teacher: Features, target: Tensor | None, temperature: float) -> Tensor:
        """Return the loss, see :class:`DistillationLoss`."""
        if target is None:
            raise ConfigurationError("`bounded_regression` needs the batch's `target`; use RegressionDistillation")
        return self.over_pairs(
            lambda ours, theirs: bounded_regression(ours, theirs, target, self.margin), student, teacher
        )
