"""What losses on the relations of a batch's samples share."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.distillation.losses.base import DistillationLoss, Pair


def pooled(features: Tensor, channel_dim: int = 1) -> Tensor:
    """Return one vector a sample: the mean over positions of ``(N, C, H, W)`` and the like, the rest as it is.

    Args:
        features: ``(N, C, ...)``, ``(N, ..., C)``, ``(N, D)`` or ``(N,)``.
        channel_dim: 1, or -1 for tokens ``(N, L, C)`` and channels-last maps.

    >>> pooled(torch.tensor([[[1.0, 3.0], [2.0, 2.0]]]))
    tensor([[2., 2.]])
    """
    if features.dim() < 2:
        return features.unsqueeze(1)
    return features if features.dim() == 2 else features.movedim(channel_dim, 1).flatten(2).mean(2)


def check_batch(student: Tensor, teacher: Tensor, name: str) -> None:
    """Refuse features that are not of the same samples.

    Raises:
        ConfigurationError: With both shapes.
    """
    if min(student.dim(), teacher.dim()) < 1 or student.shape[0] != teacher.shape[0]:
        raise ConfigurationError(
            f"`{name}` relates samples of one batch; the student's feature is {tuple(student.shape)} and the "
            f"teacher's {tuple(teacher.shape)}; both need the same samples first"
        )


class BatchLoss(DistillationLoss):
    """A loss that compares relations of samples: any shapes behind the batch, no adapter."""

    name = "relational"
    on: Literal["output", "features"] = "features"

    def pair(self, student: torch.Size, teacher: torch.Size, where: str) -> Pair:
        """Return no module: only the batches must agree."""
        if len(student) < 1 or len(teacher) < 1 or student[0] != teacher[0]:
            raise ConfigurationError(
                f"{where}: the student gives {tuple(student)} and the teacher {tuple(teacher)}; the batch comes first "
                "and must agree"
            )
        return None, None
