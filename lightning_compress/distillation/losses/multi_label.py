"""Soft targets for outputs that are many yes-or-no questions, not one class out of many."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from lightning_compress.distillation.adapters import Features
from lightning_compress.distillation.losses.base import DistillationLoss
from lightning_compress.distillation.losses.numeric import (
    check_same,
    check_temperature,
    divergence_terms,
    full_precision,
    mean_or_zero,
)


@full_precision
def multi_label_distillation(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Soft targets a label (Yang et al. 2023, Multi-Label Knowledge Distillation, arXiv 2308.06453).

    .. math:: L = T^2 \frac{1}{N} \sum_n \sum_c D_{KL}\big(\sigma(t_{nc} / T) \,\|\, \sigma(s_{nc} / T)\big)

    Each label is a distribution over yes and no. Dimensions behind the labels count as samples.

    Args:
        student: Logits before the sigmoid, ``(N, C, ...)``, or ``(N,)`` for one question.
        teacher: Same shape; detached.
        temperature: T, above 0.

    Returns:
        A scalar, at least 0; 0 for an empty batch.

    Raises:
        ConfigurationError: For shapes that differ, or a temperature that is not above 0.

    >>> import torch
    >>> multi_label_distillation(torch.zeros(1, 1), torch.tensor([[3.0]]).log())
    tensor(0.1308)
    """
    check_same(student, teacher, "student")
    check_temperature(temperature)
    ours, theirs = student / temperature, teacher.detach() / temperature
    yes = divergence_terms(F.logsigmoid(theirs), F.logsigmoid(ours))
    no = divergence_terms(F.logsigmoid(-theirs), F.logsigmoid(-ours))
    terms = yes + no
    return mean_or_zero(terms.sum(1) if terms.dim() > 1 else terms) * temperature**2


class MultiLabelDistillation(DistillationLoss):
    """Soft targets a label, see :func:`multi_label_distillation`.

    >>> import torch
    >>> MultiLabelDistillation()(torch.zeros(1, 1), torch.tensor([[3.0]]).log(), None, 1.0)
    tensor(0.1308)
    """

    name = "multi_label"

    def forward(self, student: Features, teacher: Features, target: Tensor | None, temperature: float) -> Tensor:
        """Return the loss, see :class:`DistillationLoss`."""
        return self.over_pairs(
            lambda ours, theirs: multi_label_distillation(ours, theirs, temperature), student, teacher
        )
