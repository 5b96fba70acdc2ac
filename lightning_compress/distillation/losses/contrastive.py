"""Contrastive representation distillation: recognise the same sample in the other network among many."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.distillation.adapters import Features, seeded_layers
from lightning_compress.distillation.losses.base import DistillationLoss, Pair
from lightning_compress.distillation.losses.batch import pooled
from lightning_compress.distillation.losses.numeric import (
    check_channel_dim,
    check_integer,
    check_range,
    check_same,
    check_word,
    full_precision,
    mean_or_zero,
    unit,
    widen,
)


@full_precision
def info_nce(
    anchor: Tensor,
    positive: Tensor,
    negatives: Tensor | None = None,
    temperature: float = 0.07,
    allowed: Tensor | None = None,
) -> Tensor:
    r"""Find the positive among the batch and the negatives (van den Oord et al. 2018, arXiv 1807.03748).

    .. math:: L = -\frac{1}{N} \sum_i \log \frac{e^{a_i \cdot p_i / \tau}}
        {\sum_j e^{a_i \cdot p_j / \tau} + \sum_k e^{a_i \cdot n_k / \tau}}

    Args:
        anchor: ``(N, D)``, of unit length.
        positive: ``(N, D)``; row i belongs to anchor i, the others are negatives.
        negatives: ``(K, D)`` more negatives.
        temperature: :math:`\tau`, above 0.
        allowed: Boolean ``(N, N + K)``: which are negatives (a positive always counts); ``None`` for all.

    Returns:
        A scalar, at least 0; 0 for an empty batch.

    >>> info_nce(torch.eye(2), torch.eye(2), temperature=1.0)
    tensor(0.3133)
    """
    check_same(anchor, positive, "anchor")
    others = positive if negatives is None else torch.cat([positive, negatives])
    scores = anchor @ others.T / temperature
    if allowed is not None:
        own = torch.eye(*scores.shape, dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(~(allowed | own), -math.inf)
    return mean_or_zero(scores.logsumexp(1) - scores.diagonal())


@full_precision
def contrastive_nce(
    anchor: Tensor,
    positive: Tensor,
    negatives: Tensor,
    temperature: float = 0.07,
    population: int | None = None,
    allowed: Tensor | None = None,
) -> Tensor:
    r"""The bound of contrastive representation distillation (Tian et al. 2020, CRD, arXiv 1910.10699).

    .. math:: L = -\frac{1}{N} \sum_i \Big( \log h(a_i, p_i) + \sum_k \log (1 - h(a_i, n_k)) \Big), \quad
        h(a, b) = \frac{e^{a \cdot b / \tau}}{e^{a \cdot b / \tau} + K / M}

    Args:
        anchor: ``(N, D)``, of unit length.
        positive: ``(N, D)``; row i belongs to anchor i.
        negatives: ``(K, D)``.
        temperature: :math:`\tau`, above 0.
        population: M, how many samples the data has; K if ``None``.
        allowed: Boolean ``(N, K)``: which negatives count; ``None`` for all.

    Returns:
        A scalar, at least 0; 0 for an empty batch.

    >>> contrastive_nce(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), 1.0)
    tensor(1.0064)
    """
    check_same(anchor, positive, "anchor")
    number = max(negatives.shape[0], 1)
    noise = math.log(number / (number if population is None else population))
    mine = (anchor * positive).sum(1) / temperature
    theirs = F.softplus(anchor @ negatives.T / temperature - noise)
    if allowed is not None:
        theirs = theirs.masked_fill(~allowed, 0)
    return mean_or_zero(F.softplus(noise - mine) + theirs.sum(1))


class Embedding(nn.Module):
    """A linear map of pooled features to a sphere, one a network (Tian et al. 2020).

    Args:
        channels: Of the feature, averaged over positions.
        dimension: Of the sphere's space.
        channel_dim: 1, or -1 for tokens ``(N, L, C)`` and channels-last maps.

    >>> [round(length, 4) for length in Embedding(3, 2)(torch.randn(2, 3, 8, 8)).norm(dim=1).tolist()]
    [1.0, 1.0]
    """

    def __init__(self, channels: int, dimension: int, channel_dim: int = 1) -> None:
        super().__init__()
        self.channel_dim = channel_dim
        self.project = nn.Linear(channels, dimension)

    def forward(self, features: Tensor) -> Tensor:
        """Return ``(N, dimension)``, rows of unit length."""
        return unit(widen(self.project(pooled(features, self.channel_dim))))


class ContrastiveRepresentation(DistillationLoss):
    """Contrastive representation distillation with a queue (Tian et al. 2020, CRD, arXiv 1910.10699).

    Both networks' features are embedded on a sphere by a trained linear map each (the adapter). The student's embedding
    of a sample shall be nearest to the teacher's of the same sample, and the other way round, among the other samples
    of the batch and a queue of the latest embeddings. The paper's memory has a row for each sample of the data and
    needs its index; a queue needs none, and its first rows are random directions, drawn from ``seed``.

    The queues are buffers: they move on in training mode, hold the same on every process (embeddings are gathered),
    and must be saved for an exact resume. Negatives with the anchor's own label are left out when the target is one
    class index a sample.

    Args:
        dimension: Of the embedding, at least 1.
        negatives: Length of the queue, at least 1.
        temperature: Of the contrast, above 0; not the temperature of soft targets.
        objective: ``infonce``, see :func:`info_nce`, or ``nce``, the paper's bound, see :func:`contrastive_nce`.
        population: Samples in the data, for ``nce``; the length of the queue if ``None``.
        channel_dim: 1, or -1 for tokens ``(N, L, C)`` and channels-last maps.
        seed: Of the queue's first rows and of the embeddings.

    Raises:
        ConfigurationError: For a value outside these ranges.

    >>> loss = ContrastiveRepresentation(dimension=4, negatives=8)
    >>> adapter = loss.adapt([(2, 3, 8, 8)], [(2, 5, 4, 4)])
    >>> bool(loss(*adapter(torch.randn(2, 3, 8, 8), torch.randn(2, 5, 4, 4)), None, 1.0) > 0)
    True
    """

    name = "crd"
    on: Literal["output", "features"] = "features"
    most_pairs = 1

    student_queue: Tensor
    teacher_queue: Tensor
    label_queue: Tensor
    cursor: Tensor

    def __init__(
        self,
        dimension: int = 128,
        negatives: int = 4096,
        temperature: float = 0.07,
        objective: Literal["infonce", "nce"] = "infonce",
        population: int | None = None,
        channel_dim: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for key, number in {"dimension": dimension, "negatives": negatives, "population": population}.items():
            check_integer(key, number, 1)
        check_integer("seed", seed)
        check_range("temperature", temperature, 0, open_low=True)
        check_word("objective", objective, ("infonce", "nce"))
        check_channel_dim(channel_dim)
        self.channel_dim = channel_dim
        self.dimension, self.temperature, self.objective = dimension, temperature, objective
        self.population, self.seed = population, seed
        with seeded_layers(seed):
            self.register_buffer("student_queue", unit(torch.randn(negatives, dimension)))
            self.register_buffer("teacher_queue", unit(torch.randn(negatives, dimension)))
        self.register_buffer("label_queue", torch.full((negatives,), -1))
        self.register_buffer("cursor", torch.zeros((), dtype=torch.int64))

    def pair(self, student: torch.Size, teacher: torch.Size, where: str) -> Pair:
        """Return an embedding for either side."""
        if len(student) < 2 or len(teacher) < 2:
            raise ConfigurationError(
                f"{where}: the student gives {tuple(student)} and the teacher {tuple(teacher)}; features need "
                "channels, (N, C) or (N, C, ...)"
            )
        ours, theirs = student[self.channel_dim], teacher[self.channel_dim]
        return (
            Embedding(ours, self.dimension, self.channel_dim),
            Embedding(theirs, self.dimension, self.channel_dim),
        )

    def forward(self, student: Features, teacher: Features, target: Tensor | None, temperature: float) -> Tensor:
        """Return the loss, see :class:`DistillationLoss`; the queues move on in training mode."""
        return self.over_pairs(lambda ours, theirs: self._both_ways(ours, theirs, target), student, teacher)

    def _both_ways(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        if student.shape != teacher.shape or student.shape[1:] != self.student_queue.shape[1:]:
            raise ConfigurationError(
                f"`crd` compares embeddings (N, {self.dimension}); got {tuple(student.shape)} from the student and "
                f"{tuple(teacher.shape)} from the teacher; call the module that `loss.adapt` returns first"
            )
        ours, theirs = unit(widen(student)), unit(widen(teacher))
        labels = self._labels(ours, target)
        found = self._contrast(ours, theirs, self.teacher_queue, labels) + self._contrast(
            theirs, ours, self.student_queue, labels
        )
        if self.training:
            self._enqueue(ours.detach(), theirs.detach(), labels)
        return found

    def _labels(self, embedded: Tensor, target: Tensor | None) -> Tensor:
        """Return one class a sample, -1 where it is not known."""
        unknown = self.label_queue.new_full((embedded.shape[0],), -1)
        if target is None or target.shape != unknown.shape or target.is_floating_point() or target.is_complex():
            return unknown
        return target.to(unknown)

    def _contrast(self, anchor: Tensor, positive: Tensor, queue: Tensor, labels: Tensor) -> Tensor:
        negatives = queue.to(anchor.dtype, copy=True)  # a copy, since the queue changes before backward
        nce = self.objective == "nce"
        theirs = self.label_queue if nce else torch.cat([labels, self.label_queue])
        allowed = (labels.unsqueeze(1) != theirs) | (theirs < 0)
        if nce:
            return contrastive_nce(anchor, positive, negatives, self.temperature, self.population, allowed)
        return info_nce(anchor, positive, negatives, self.temperature, allowed)

    @torch.no_grad()
    def _enqueue(self, student: Tensor, teacher: Tensor, labels: Tensor) -> None:
        length = self.label_queue.shape[0]
        rows = [gather_rows(part)[-length:] for part in (student, teacher, labels)]
        number = rows[0].shape[0]
        places = (self.cursor + torch.arange(number, device=self.cursor.device)) % length
        for queue, new in zip((self.student_queue, self.teacher_queue, self.label_queue), rows, strict=True):
            queue.index_copy_(0, places, new.to(queue.dtype))
        self.cursor.copy_((self.cursor + number) % length)


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows of all processes in order of rank, also when they have unequal numbers of them.

    >>> gather_rows(torch.tensor([[1.0, 2.0]]))
    tensor([[1., 2.]])
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return rows
    sizes = [torch.zeros((), dtype=torch.int64, device=rows.device) for _ in range(distributed.get_world_size())]
    distributed.all_gather(sizes, torch.tensor(rows.shape[0], device=rows.device))
    counts = [int(size) for size in sizes]
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: rows.shape[0]] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    distributed.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
