"""Which samples of a batch are alike: similarity-preserving and probabilistic transfer."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_compress.distillation.adapters import Features
from lightning_compress.distillation.losses.batch import BatchLoss, check_batch, pooled
from lightning_compress.distillation.losses.numeric import (
    check_channel_dim,
    check_range,
    check_word,
    full_precision,
    mean_or_zero,
    unit,
)


@full_precision
def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Similarity-preserving distillation (Tung & Mori 2019, SP, arXiv 1907.09682).

    .. math:: L = \frac{1}{N^2} \|\tilde G_s - \tilde G_t\|_F^2, \quad \tilde G = \text{rows of } A A^T
        \text{ at unit length}

    with :math:`A` one flattened feature a row.

    Args:
        student: ``(N, ...)``.
        teacher: ``(N, ...)``, any shape behind the batch; detached.

    Returns:
        A scalar, at least 0; 0 for one sample, or none.

    Raises:
        ConfigurationError: For batches that differ.

    >>> similarity_preserving(torch.eye(2), torch.tensor([[3.0, 0.0], [4.0, 0.0]]))
    tensor(0.3000)
    """
    check_batch(student, teacher, "sp")
    ours, theirs = (unit(_gram(side)) for side in (student, teacher.detach()))
    return mean_or_zero((ours - theirs).square())


def _gram(features: Tensor) -> Tensor:
    """Return inner products of samples up to one factor, which keeps squares of large features in range."""
    rows = features.flatten(1) if features.dim() > 1 else features.unsqueeze(1)
    largest = rows.detach().abs().amax() if rows.numel() else rows.new_ones(())
    rows = rows / torch.where(largest > 0, largest, 1)
    return rows @ rows.T


@full_precision
def probabilistic_transfer(student: Tensor, teacher: Tensor, eps: float = 1e-7, channel_dim: int = 1) -> Tensor:
    r"""Probabilistic knowledge transfer (Passalis & Tefas 2018, PKT, arXiv 1803.10837).

    .. math:: L = \frac{1}{N^2} \sum_{ij} p_{ij} \log \frac{p_{ij} + \epsilon}{q_{ij} + \epsilon}, \quad
        p_{ij} = \frac{K(t_i, t_j)}{\sum_k K(t_i, t_k)}, \quad K(a, b) = \tfrac12 (\cos(a, b) + 1)

    and :math:`q` the same of the student: how likely each sample is the neighbour of another. The mean over pairs is
    the authors' code, where the weight is 30,000.

    Args:
        student: ``(N, D)`` or ``(N, C, ...)``, the latter averaged over positions.
        teacher: The same with any D; detached.
        eps: Keeps the logarithm finite, above 0.
        channel_dim: 1, or -1 for tokens ``(N, L, C)`` and channels-last maps.

    Returns:
        A scalar, 0 for equal neighbourhoods, for one sample, or none; at most :math:`\log(1 / \epsilon) / N`.

    Raises:
        ConfigurationError: For batches that differ.

    >>> probabilistic_transfer(torch.eye(2), torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    tensor(0.2027)
    """
    check_batch(student, teacher, "pkt")
    ours, theirs = (_neighbours(pooled(side, channel_dim)) for side in (student, teacher.detach()))
    return mean_or_zero(theirs * ((theirs + eps) / (ours + eps)).log())


def _neighbours(points: Tensor) -> Tensor:
    directions = unit(points)
    kernel = ((directions @ directions.T + 1) / 2).clamp(min=0)
    total = kernel.sum(1, keepdim=True)
    return kernel / torch.where(total > 0, total, 1)


class SimilarityPreserving(BatchLoss):
    """Which samples activate alike, see :func:`similarity_preserving`; the temperature is not used.

    Args:
        where: ``features``, or ``output`` for the models' outputs.

    Raises:
        ConfigurationError: For another word.

    >>> SimilarityPreserving()(torch.eye(2), torch.tensor([[3.0, 0.0], [4.0, 0.0]]), None, 1.0)
    tensor(0.3000)
    """

    name = "sp"

    def __init__(self, where: Literal["output", "features"] = "features") -> None:
        super().__init__()
        check_word("where", where, ("output", "features"))
        self.on = where

    def forward(self, student: Features, teacher: Features, target: Tensor | None, temperature: float) -> Tensor:
        """Return the loss, see :class:`DistillationLoss`."""
        return self.over_pairs(similarity_preserving, student, teacher)


class ProbabilisticTransfer(BatchLoss):
    """Which samples are neighbours, see :func:`probabilistic_transfer`; the temperature is not used.

    Args:
        eps: Keeps the logarithm finite, above 0.
        where: ``features``, or ``output`` for the models' outputs.
        channel_dim: 1, or -1 for tokens ``(N, L, C)`` and channels-last maps.

    Raises:
        ConfigurationError: For a value outside these ranges.

    >>> ProbabilisticTransfer()(torch.eye(2), torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), None, 1.0)
    tensor(0.2027)
    """

    name = "pkt"

    def __init__(
        self, eps: float = 1e-7, where: Literal["output", "features"] = "features", channel_dim: int = 1
    ) -> None:
        super().__init__()
        check_range("eps", eps, 0, open_low=True)
        check_word("where", where, ("output", "features"))
        check_channel_dim(channel_dim)
        self.eps, self.on, self.channel_dim = eps, where, channel_dim

    def forward(self, student: Features, teacher: Features, target: Tensor | None, temperature: float) -> Tensor:
        """Return the loss, see :class:`DistillationLoss`."""
        return self.over_pairs(
            lambda ours, theirs: probabilistic_transfer(ours, theirs, self.eps, self.channel_dim), student, teacher
        )
