"""Soft targets in two parts, the target's share and the rest, weighted apart."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.distillation.adapters import Features
from lightning_compress.distillation.losses.base import DistillationLoss, Pair, check_classes
from lightning_compress.distillation.losses.numeric import (
    check_integer,
    check_range,
    check_same,
    check_temperature,
    divergence_terms,
    full_precision,
    mean_or_zero,
)


@full_precision
def decoupled_distillation(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
    ignore_index: int | None = None,
) -> Tensor:
    r"""Decoupled knowledge distillation (Zhao et al. 2022, DKD, arXiv 2203.08679).

    .. math:: L = T^2 \frac{1}{N} \sum_n \alpha D_{KL}(b^t \| b^s) + \beta D_{KL}(\hat p^t \| \hat p^s)

    with :math:`b = (p_y, 1 - p_y)` the share of the target class (TCKD) and :math:`\hat p` the distribution over the
    other classes alone (NCKD), both softened. Plain soft targets are
    :math:`\alpha = 1, \beta = 1 - p^t_y`: they forget the other classes exactly where the teacher is sure.
    With two classes NCKD is 0. A large :math:`\beta` wants a warm-up of the weight.

    Args:
        student: Logits ``(N, C)`` or ``(N, C, ...)``.
        teacher: Same shape; detached.
        target: Class indices ``(N)`` or ``(N, ...)``, integers.
        temperature: T, above 0.
        alpha: Weight of the target's part, at least 0.
        beta: Weight of the other classes' part, at least 0; 2 to 8 in the paper.
        ignore_index: Label of positions that do not count.

    Returns:
        A scalar, at least 0; 0 for an empty batch.

    Raises:
        ConfigurationError: For shapes that differ, a target that is not class indices of that shape, fewer than two
            classes, or a temperature that is not above 0.

    >>> logits = torch.tensor([[6.0, 3.0, 1.0]]).log()
    >>> decoupled_distillation(torch.zeros(1, 3), logits, torch.tensor([0]), 1.0, alpha=1.0, beta=0.0)
    tensor(0.1483)
    >>> decoupled_distillation(torch.zeros(1, 3), logits, torch.tensor([0]), 1.0, alpha=0.0, beta=1.0)
    tensor(0.1308)
    """
    check_same(student, teacher, "student")
    check_temperature(temperature)
    _check_labels(student, target)
    counts = None if ignore_index is None else target != ignore_index
    label = (target if counts is None else target.masked_fill(~counts, 0)).long().unsqueeze(1)
    _check_classes(label, student.shape[1])
    mine, others = _parts(student / temperature, label)
    said, rest = _parts(teacher.detach() / temperature, label)
    of_target = divergence_terms(said, mine).sum(1)
    of_others = divergence_terms(rest, others).sum(1)
    return mean_or_zero(alpha * of_target + beta * of_others, counts) * temperature**2


def _parts(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logarithms of (p_y, 1 - p_y), and of the distribution over the other classes."""
    is_target = torch.zeros_like(logits, dtype=torch.bool).scatter(1, label, True)
    rest = logits.masked_fill(is_target, -math.inf)
    alone = (rest == -math.inf).all(1, keepdim=True)  # every other class is masked
    rest = rest.masked_fill(alone, 0)
    odds = (logits.gather(1, label) - rest.logsumexp(1, keepdim=True)).masked_fill(alone, math.inf)
    return torch.cat([F.logsigmoid(odds), F.logsigmoid(-odds)], 1), rest.log_softmax(1)


def _check_labels(logits: Tensor, target: Tensor) -> None:
    expected = (logits.shape[0], *logits.shape[2:])
    integers = not (target.is_floating_point() or target.is_complex() or target.dtype == torch.bool)
    if logits.dim() < 2 or logits.shape[1] < 2:
        raise ConfigurationError(
            f"`dkd` splits the target class from the others, but the logits are {tuple(logits.shape)}; it needs "
            "(N, C) with two classes or more; use MultiLabelDistillation for yes-or-no outputs"
        )
    if tuple(target.shape) != expected or not integers:
        raise ConfigurationError(
            f"`target` must be class indices of shape {expected}, integers; got {tuple(target.shape)}, "
            f"{target.dtype}; with mixed or soft labels use KnowledgeDistillation, which needs none"
        )


def _check_classes(label: Tensor, classes: int) -> None:
    """Refuse labels that are no class; on the CPU only, since looking would make an accelerator wait."""
    if label.device.type != "cpu" or not label.numel():
        return
    low, high = int(label.min()), int(label.max())
    if low < 0 or high >= classes:
        raise ConfigurationError(
            f"`target` must hold class indices from 0 to {classes - 1}; got {low if low < 0 else high}; name a label "
            "that does not count in `ignore_index`"
        )


class DecoupledDistillation(DistillationLoss):
    """Soft targets with the target's share and the rest weighted apart, see :func:`decoupled_distillation`.

    Args:
        alpha: Weight of the target's part, at least 0.
        beta: Weight of the other classes' part, at least 0.
        ignore_index: Label of positions that do not count; ``None`` for none.

    Raises:
        ConfigurationError: For a negative weight; in ``forward`` if there is no target.

    >>> loss = DecoupledDistillation(alpha=0.0, beta=1.0)
    >>> loss(torch.zeros(1, 3), torch.tensor([[6.0, 3.0, 1.0]]).log(), torch.tensor([0]), 1.0)
    tensor(0.1308)
    """

    name = "dkd"

    def __init__(self, alpha: float = 1.0, beta: float = 8.0, ignore_index: int | None = None) -> None:
        super().__init__()
        check_range("alpha", alpha, 0)
        check_range("beta", beta, 0)
        check_integer("ignore_index", ignore_index)
        self.alpha, self.beta, self.ignore_index = alpha, beta, ignore_index

    def pair(self, student: torch.Size, teacher: torch.Size, where: str) -> Pair:
        """Return no module; shapes must be equal past the batch, with two classes or more."""
        check_classes(student, 1, where)
        return super().pair(student, teacher, where)

    def forward(self, student: Features, teacher: Features, target: Tensor | None, temperature: float) -> Tensor:
        """Return the loss, see :class:`DistillationLoss`."""
        if target is None:
            raise ConfigurationError("`dkd` needs the batch's `target`; use KnowledgeDistillation without labels")
        return self.over_pairs(
            lambda ours, theirs: decoupled_distillation(
                ours, theirs, target, temperature, self.alpha, self.beta, self.ignore_index
            ),
            student,
            teacher,
        )
