"""Students that teach each other, and deep heads that teach shallow ones: no teacher of their own."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.distillation.adapters import Features, as_tuple
from lightning_compress.distillation.losses.base import DistillationLoss
from lightning_compress.distillation.losses.numeric import check_range, check_word, full_precision
from lightning_compress.distillation.losses.soft_targets import knowledge_distillation


def mutual_learning(students: tuple[Tensor, ...], temperature: float = 1.0) -> tuple[Tensor, ...]:
    r"""Deep mutual learning (Zhang et al. 2018, DML, arXiv 1706.00384).

    .. math:: L_k = \frac{T^2}{K - 1} \sum_{l \ne k} D_{KL}(p_l \,\|\, p_k)

    for K students trained together, each on its task too. The others are constants in a student's own loss, so the
    gradient of :math:`L_k` reaches student k only.

    Args:
        students: Logits ``(N, C, ...)`` of two students or more, of one shape.
        temperature: T, above 0; 1 in the paper.

    Returns:
        One scalar a student.

    Raises:
        ConfigurationError: For fewer than two students, or shapes that differ.

    >>> one, other = mutual_learning((torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log()))
    >>> one, other
    (tensor(0.1308), tensor(0.1438))
    """
    _check_several(students, "dml", "students")
    losses = []
    for index, student in enumerate(students):
        others = [other for place, other in enumerate(students) if place != index]
        found = [knowledge_distillation(student, other, temperature) for other in others]
        losses.append(torch.stack(found).mean())
    return tuple(losses)


@full_precision
def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target) if target.numel() else logits.sum()


def self_distillation(
    heads: tuple[Tensor, ...], target: Tensor | None = None, temperature: float = 3.0, hard: float = 0.0
) -> Tensor:
    r"""Self-distillation, the deepest head to the shallower (Zhang et al. 2019, Be your own teacher, 1905.08094).

    .. math:: L = \sum_{k < K} T^2 D_{KL}(p_K \,\|\, p_k) + \lambda \, CE(p_k, y)

    The deepest head is a constant here; it learns from the task's own loss. The paper's third part, hints from deep
    to shallow features, is ``hint`` of the two, the shallow one through a ``Regressor``.

    Args:
        heads: Logits ``(N, C, ...)`` from shallow to deep, two or more, of one shape.
        target: Labels for the shallow heads' own task loss; needed if ``hard`` is not 0.
        temperature: T, above 0.
        hard: :math:`\lambda`, at least 0.

    Returns:
        A scalar.

    Raises:
        ConfigurationError: For fewer than two heads, shapes that differ, or no target where one is needed.

    >>> shallow, deep = torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log()
    >>> self_distillation((shallow, deep), temperature=1.0)
    tensor(0.1308)
    >>> self_distillation((shallow, deep), torch.tensor([0]), temperature=1.0, hard=1.0)
    tensor(0.8240)
    """
    _check_several(heads, "byot", "heads")
    if hard and target is None:
        raise ConfigurationError("`byot` with `hard` above 0 needs the batch's `target`; use hard=0 without labels")
    *shallow, deep = heads
    found = [knowledge_distillation(head, deep, temperature) for head in shallow]
    if hard and target is not None:
        found += [hard * _cross_entropy(head, target) for head in shallow]
    return torch.stack(found).sum()


def _check_several(outputs: tuple[Tensor, ...], name: str, what: str) -> None:
    if len(outputs) < 2:
        raise ConfigurationError(
            f"`{name}` needs two {what} or more, but got {len(outputs)} output; let the model return a tuple of them"
        )


class MutualLearning(DistillationLoss):
    """Students that teach each other, see :func:`mutual_learning`; the sum of their losses.

    The student is one module that returns a tuple, one output a peer; no teacher is looked at.

    >>> MutualLearning()((torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log()), (), None, 1.0)
    tensor(0.2747)
    """

    name = "dml"
    uses_teacher = False
    least_pairs = 2

    def forward(self, student: Features, teacher: Features, target: Tensor | None, temperature: float) -> Tensor:
        """Return the loss, see :class:`DistillationLoss`; ``teacher`` is not looked at."""
        return torch.stack(mutual_learning(as_tuple(student), temperature)).sum()


class SelfDistillation(DistillationLoss):
    """The deepest head teaches the shallower, see :func:`self_distillation`; no teacher is looked at.

    Args:
        hard: Weight of the shallow heads' own cross entropy with the target, at least 0.
        where: ``output`` for a model that returns a tuple of heads from shallow to deep, ``features`` for taps on them.

    Raises:
        ConfigurationError: For a value outside these ranges.

    >>> SelfDistillation()((torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log()), (), None, 1.0)
    tensor(0.1308)
    """

    name = "byot"
    uses_teacher = False
    least_pairs = 2

    def __init__(self, hard: float = 0.0, where: Literal["output", "features"] = "output") -> None:
        super().__init__()
        check_range("hard", hard, 0)
        check_word("where", where, ("output", "features"))
        self.hard, self.on = hard, where

    def forward(self, student: Features, teacher: Features, target: Tensor | None, temperature: float) -> Tensor:
        """Return the loss, see :class:`DistillationLoss`; ``teacher`` is not looked at."""
        return self_distillation(as_tuple(student), target, temperature, self.hard)
