"""Soft targets (Hinton et al. 2015): divergences of softened distributions over classes."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.distillation.adapters import Features, resize_like
from lightning_compress.distillation.losses.base import DistillationLoss, Pair, check_classes, check_maps
from lightning_compress.distillation.losses.numeric import (
    check_integer,
    check_range,
    check_same,
    check_temperature,
    check_word,
    divergence_terms,
    full_precision,
    mean_or_zero,
)

DIRECTIONS = ("forward", "reverse", "js")


def smooth_log_probabilities(log_p: Tensor, smoothing: float, class_dim: int) -> Tensor:
    r"""Return :math:`\log((1 - \epsilon) p + \epsilon / C)`, the C classes being those with p > 0.

    Args:
        log_p: Log-probabilities.
        smoothing: :math:`\epsilon`, 0 to 1.
        class_dim: Dimension of the classes.

    >>> log_p = torch.tensor([[1.0, 0.0]]).clamp(min=1e-20).log()
    >>> smooth_log_probabilities(log_p, 0.1, 1).exp()
    tensor([[0.9500, 0.0500]])
    """
    if smoothing == 0:
        return log_p
    possible = log_p > -math.inf
    share = smoothing / possible.sum(class_dim, keepdim=True).clamp(min=1)
    return torch.where(possible, (1 - smoothing) * log_p.exp() + share, 0).log()


@full_precision
def class_divergence(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    *,
    direction: Literal["forward", "reverse", "js"] = "forward",
    class_dim: int = 1,
    smoothing: float = 0.0,
) -> Tensor:
    r"""Return the divergence of two softened distributions over classes, one number a sample (and position).

    With :math:`p = \mathrm{softmax}(t / T)` of the teacher and :math:`q = \mathrm{softmax}(s / T)` of the student:
    forward :math:`\sum_c p_c \log(p_c / q_c)`; reverse :math:`\sum_c q_c \log(q_c / p_c)`, which seeks one mode of
    the teacher; js the mean of both against :math:`(p + q) / 2`, at most :math:`\log 2`.

    A class with a logit of minus infinity on both sides is masked and adds nothing; one that only the student
    excludes makes the forward divergence infinite, as it should be.

    Args:
        student: Logits ``(N, C, ...)``, or with the classes in ``class_dim``.
        teacher: Logits, same shape; detached.
        temperature: T, above 0.
        direction: ``forward``, ``reverse`` or ``js``.
        class_dim: Dimension of the classes.
        smoothing: Label noise mixed into the teacher's distribution, 0 to 1.

    Returns:
        The shape of the logits without ``class_dim``.

    Raises:
        ConfigurationError: For shapes that differ, no dimension for classes, a temperature that is not above 0.

    >>> class_divergence(torch.zeros(1, 2), torch.tensor([[0.0, 0.0]])), class_divergence(
    ...     torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log()
    ... )
    (tensor([0.]), tensor([0.1308]))
    """
    check_same(student, teacher, "student")
    check_temperature(temperature)
    check_word("direction", direction, DIRECTIONS)
    if not -student.dim() <= class_dim < student.dim():
        raise ConfigurationError(
            f"`class_dim` is {class_dim}, but the logits are {tuple(student.shape)}; scores without a dimension of "
            "classes are compared by RegressionDistillation or MultiLabelDistillation"
        )
    log_q = (student / temperature).log_softmax(class_dim)
    log_p = smooth_log_probabilities((teacher.detach() / temperature).log_softmax(class_dim), smoothing, class_dim)
    if direction == "forward":
        terms = divergence_terms(log_p, log_q)
    elif direction == "reverse":
        terms = divergence_terms(log_q, log_p)
    else:
        nowhere = (log_p == -math.inf) & (log_q == -math.inf)
        log_m = torch.logaddexp(log_p.masked_fill(nowhere, 0), log_q.masked_fill(nowhere, 0)) - math.log(2)
        terms = (divergence_terms(log_p, log_m) + divergence_terms(log_q, log_m)) / 2
    return terms.sum(class_dim)


def knowledge_distillation(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 4.0,
    *,
    direction: Literal["forward", "reverse", "js"] = "forward",
    class_dim: int = 1,
    smoothing: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Soft targets (Hinton et al. 2015, arXiv 1503.02531).

    .. math:: L = T^2 \, \frac{1}{N} \sum_n D_{KL}\big(\mathrm{softmax}(t_n / T) \,\|\, \mathrm{softmax}(s_n / T)\big)

    The factor :math:`T^2` keeps gradients of one size when T changes. The paper's :math:`\alpha` is the wrapper's
    weight: :math:`(1 - \alpha)` on the task's loss, :math:`\alpha` on this. For :math:`T \to \infty` the loss is half
    of ``logits_mse`` with ``center=True``. With dimensions behind the classes every position counts as a sample:
    that is distillation a pixel, or a token with ``class_dim=-1``.

    Does not help when T flattens what little a weak teacher knows, nor for outputs that are not one class out of
    many: see ``MultiLabelDistillation`` for those.

    Args:
        student: Logits ``(N, C, ...)``, or with the classes in ``class_dim``.
        teacher: Logits, same shape; detached.
        temperature: T, above 0; 1 to 20 is usual.
        direction: ``forward``, ``reverse`` or ``js``, see :func:`class_divergence`.
        class_dim: Dimension of the classes.
        smoothing: Label noise mixed into the teacher's distribution, 0 to 1.
        mask: Boolean, the shape of the logits without ``class_dim``: which positions count; ``None`` for all.

    Returns:
        A scalar, at least 0; 0 for an empty batch.

    Raises:
        ConfigurationError: As :func:`class_divergence`; for a mask of another shape.

    >>> knowledge_distillation(torch.zeros(1, 2), 2 * torch.tensor([[3.0, 1.0]]).log(), temperature=2.0)
    tensor(0.5232)
    """
    found = class_divergence(
        student, teacher, temperature, direction=direction, class_dim=class_dim, smoothing=smoothing
    )
    if mask is not None and mask.shape != found.shape:
        raise ConfigurationError(
            f"`mask` (or the target) is {tuple(mask.shape)}, but there is one prediction for each of "
            f"{tuple(found.shape)}; give one label a prediction"
        )
    return mean_or_zero(found, mask) * temperature**2


class KnowledgeDistillation(DistillationLoss):
    """Soft targets at a temperature, see :func:`knowledge_distillation`.

    Args:
        direction: ``forward``, ``reverse`` or ``js``.
        class_dim: Dimension of the classes: 1, or -1 for tokens ``(N, L, C)``.
        smoothing: Label noise mixed into the teacher's distribution, 0 to 1.
        ignore_index: Label of positions that do not count (dense prediction); ``None`` looks at no label.

    Raises:
        ConfigurationError: For a value outside these ranges.

    >>> KnowledgeDistillation()(torch.zeros(1, 2), 2 * torch.tensor([[3.0, 1.0]]).log(), None, 2.0)
    tensor(0.5232)
    """

    name = "kd"

    def __init__(
        self,
        direction: Literal["forward", "reverse", "js"] = "forward",
        class_dim: int = 1,
        smoothing: float = 0.0,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        check_word("direction", direction, DIRECTIONS)
        check_range("smoothing", smoothing, 0, 1)
        check_integer("class_dim", class_dim)
        check_integer("ignore_index", ignore_index)
        self.direction, self.class_dim, self.smoothing = direction, class_dim, smoothing
        self.ignore_index = ignore_index

    def pair(self, student: torch.Size, teacher: torch.Size, where: str) -> Pair:
        """Return no module; maps of another height and width are resized to the teacher's; one class is refused."""
        check_classes(student, self.class_dim, where)
        check_maps(student, teacher, where, resize=self.class_dim == 1)
        return None, None

    def forward(self, student: Features, teacher: Features, target: Tensor | None, temperature: float) -> Tensor:
        """Return the loss, see :class:`DistillationLoss`."""
        mask = None if target is None or self.ignore_index is None else target != self.ignore_index

        def one(ours: Tensor, theirs: Tensor) -> Tensor:
            return knowledge_distillation(
                resize_like(ours, theirs) if self.class_dim == 1 and ours.dim() > 3 else ours,
                theirs,
                temperature,
                direction=self.direction,
                class_dim=self.class_dim,
                smoothing=self.smoothing,
                mask=mask,
            )

        return self.over_pairs(one, student, teacher)
