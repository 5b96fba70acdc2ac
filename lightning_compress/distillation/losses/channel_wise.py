"""Where each channel looks: distributions over positions, for dense prediction."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.distillation.adapters import Features, Regressor, check_dimensions, resize_like
from lightning_compress.distillation.losses.base import DistillationLoss, Pair
from lightning_compress.distillation.losses.numeric import (
    check_integer,
    check_same,
    check_temperature,
    check_word,
    divergence_terms,
    full_precision,
    mean_or_zero,
)


@full_precision
def channel_wise_distillation(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    r"""Channel-wise distillation (Shu et al. 2021, CWD, arXiv 2011.13256).

    .. math:: L = \frac{T^2}{N C} \sum_{n, c} D_{KL}\big(\mathrm{softmax}_i(t_{nci} / T) \,\|\,
        \mathrm{softmax}_i(s_{nci} / T)\big)

    Each channel is a distribution over positions i, so that the teacher's salient regions count most.

    Args:
        student: Logits or features ``(N, C, H, W)``, or with one to three spatial dimensions.
        teacher: Same shape; detached.
        temperature: T, above 0; 4 in the paper.

    Returns:
        A scalar, at least 0; 0 for an empty batch.

    Raises:
        ConfigurationError: For shapes that differ or have no positions, or a temperature that is not above 0.

    >>> teacher = torch.tensor([[[3.0, 1.0]]]).log()
    >>> channel_wise_distillation(torch.zeros(1, 1, 2), teacher, temperature=1.0)
    tensor(0.1308)
    """
    check_same(student, teacher, "student")
    check_temperature(temperature)
    if student.dim() < 3:
        raise ConfigurationError(
            f"`cwd` compares where channels look, but the tensors are {tuple(student.shape)}; it needs maps "
            "(N, C, H, W); use KnowledgeDistillation for class scores"
        )
    ours, theirs = ((side.flatten(2) / temperature).log_softmax(2) for side in (student, teacher.detach()))
    return mean_or_zero(divergence_terms(theirs, ours).sum(2)) * temperature**2


class ChannelWiseDistillation(DistillationLoss):
    """Where each channel looks, see :func:`channel_wise_distillation`.

    Maps of another height and width are resized to the teacher's. Other channels get a convolution of size 1.

    Args:
        where: ``output`` for score maps, ``features`` for taps.
        seed: Of the adapters.

    Raises:
        ConfigurationError: For another word.

    >>> ChannelWiseDistillation()(torch.zeros(1, 1, 2), torch.tensor([[[3.0, 1.0]]]).log(), None, 1.0)
    tensor(0.1308)
    """

    name = "cwd"

    def __init__(self, where: Literal["output", "features"] = "output", seed: int = 0) -> None:
        super().__init__()
        check_word("where", where, ("output", "features"))
        check_integer("seed", seed)
        self.on, self.seed = where, seed

    def pair(self, student: torch.Size, teacher: torch.Size, where: str) -> Pair:
        """Return a convolution of size 1 for other channels; on outputs channels are classes and must agree."""
        check_dimensions(student, teacher, where, least=3)
        if student[1] == teacher[1]:
            return None, None
        if self.on == "output":
            raise ConfigurationError(
                f"{where}: the student has {student[1]} classes and the teacher {teacher[1]}; they must agree"
            )
        return Regressor(student, teacher), None

    def forward(self, student: Features, teacher: Features, target: Tensor | None, temperature: float) -> Tensor:
        """Return the loss, see :class:`DistillationLoss`."""
        return self.over_pairs(
            lambda ours, theirs: channel_wise_distillation(resize_like(ours, theirs), theirs, temperature),
            student,
            teacher,
        )
