"""Relational distillation: distances and angles between the samples of a batch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.distillation.adapters import Features
from lightning_compress.distillation.losses.batch import BatchLoss, check_batch, pooled
from lightning_compress.distillation.losses.numeric import (
    check_channel_dim,
    check_range,
    check_word,
    full_precision,
    mean_or_zero,
)


def _differences(points: Tensor) -> tuple[Tensor, Tensor]:
    """Return all differences of points ``(N, N, D)`` and their lengths, with gradient 0 where points coincide."""
    delta = points.unsqueeze(0) - points.unsqueeze(1)
    square = delta.square().sum(2)
    return delta, torch.where(square > 0, torch.where(square > 0, square, 1).sqrt(), 0)


@full_precision
def relational_distance(student: Tensor, teacher: Tensor, channel_dim: int = 1) -> Tensor:
    r"""Distance-wise relational distillation (Park et al. 2019, RKD-D, arXiv 1904.05068).

    .. math:: L = \mathrm{mean}_{ij}\, l_\delta\Big(\frac{\|s_i - s_j\|}{\mu_s} - \frac{\|t_i - t_j\|}{\mu_t}\Big)

    with :math:`\mu` the mean of the distances that are not 0 and :math:`l_\delta` Huber's function at 1. Scaling,
    shifting or rotating either side changes nothing.

    Args:
        student: ``(N, D)`` or ``(N, C, ...)``, the latter averaged over positions.
        teacher: The same with any D; detached.
        channel_dim: 1, or -1 for tokens ``(N, L, C)`` and channels-last maps.

    Returns:
        A scalar, at least 0; 0 for one sample, or none. Memory grows with N x N x D.

    Raises:
        ConfigurationError: For batches that differ.

    >>> points = torch.tensor([[0.0], [1.0], [3.0]])
    >>> relational_distance(points, 7 * points + 2), relational_distance(points, torch.tensor([[0.0], [2.0], [3.0]]))
    (tensor(0.), tensor(0.0556))
    """
    check_batch(student, teacher, "rkd")
    ours, theirs = (_relative(_differences(pooled(side, channel_dim))[1]) for side in (student, teacher.detach()))
    return mean_or_zero(F.smooth_l1_loss(ours, theirs, reduction="none"))


def _relative(distances: Tensor) -> Tensor:
    mean = distances.sum() / (distances > 0).sum().clamp(min=1)
    return distances / torch.where(mean > 0, mean, 1)


@full_precision
def relational_angle(student: Tensor, teacher: Tensor, channel_dim: int = 1) -> Tensor:
    r"""Angle-wise relational distillation (Park et al. 2019, RKD-A, arXiv 1904.05068).

    .. math:: L = \mathrm{mean}_{ijk}\, l_\delta(\cos \angle s_i s_j s_k - \cos \angle t_i t_j t_k)

    with the corner at j and :math:`l_\delta` Huber's function at 1; angles with coinciding points count as cosine 0.
    Scaling, shifting or rotating either side changes nothing.

    Args:
        student: ``(N, D)`` or ``(N, C, ...)``, the latter averaged over positions.
        teacher: The same with any D; detached.
        channel_dim: 1, or -1 for tokens ``(N, L, C)`` and channels-last maps.

    Returns:
        A scalar, at least 0; 0 for fewer than two samples. Memory grows with N x N x (N + D).

    Raises:
        ConfigurationError: For batches that differ.

    >>> right = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    >>> line = torch.tensor([[1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]])
    >>> relational_angle(right, 2 * right), relational_angle(right, line)
    (tensor(0.), tensor(0.0434))
    """
    check_batch(student, teacher, "rkd")
    ours, theirs = (_cosines(pooled(side, channel_dim)) for side in (student, teacher.detach()))
    return mean_or_zero(F.smooth_l1_loss(ours, theirs, reduction="none"))


def _cosines(points: Tensor) -> Tensor:
    delta, length = _differences(points)
    directions = delta / torch.where(length > 0, length, 1).unsqueeze(2)
    return directions @ directions.transpose(1, 2)


class RelationalDistillation(BatchLoss):
    """Distances and angles between samples, see :func:`relational_distance` and :func:`relational_angle`.

    The temperature is not used.

    Args:
        distance: Weight of the distances, at least 0.
        angle: Weight of the angles, at least 0.
        where: ``features``, or ``output`` for the models' outputs.
        channel_dim: 1, or -1 for tokens ``(N, L, C)`` and channels-last maps.

    Raises:
        ConfigurationError: For a negative weight, two weights of 0, or another word.

    >>> right = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    >>> line = torch.tensor([[1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]])
    >>> RelationalDistillation(distance=0.0, angle=1.0)(right, line, None, 1.0)
    tensor(0.0434)
    """

    name = "rkd"

    def __init__(
        self,
        distance: float = 25.0,
        angle: float = 50.0,
        where: Literal["output", "features"] = "features",
        channel_dim: int = 1,
    ) -> None:
        super().__init__()
        check_range("distance", distance, 0)
        check_range("angle", angle, 0)
        check_word("where", where, ("output", "features"))
        if distance == 0 and angle == 0:
            raise ConfigurationError("`distance` and `angle` are both 0, which compares nothing; give one a weight")
        check_channel_dim(channel_dim)
        self.distance, self.angle, self.on, self.channel_dim = distance, angle, where, channel_dim

    def forward(self, student: Features, teacher: Features, target: Tensor | None, temperature: float) -> Tensor:
        """Return the loss, see :class:`DistillationLoss`."""
        parts = [(self.distance, relational_distance), (self.angle, relational_angle)]

        def one(ours: Tensor, theirs: Tensor) -> Tensor:
            used = [weight * part(ours, theirs, self.channel_dim) for weight, part in parts if weight > 0]
            return torch.stack(used).sum()

        return self.over_pairs(one, student, teacher)
