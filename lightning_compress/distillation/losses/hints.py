"""Losses on features of single samples: hints, attention maps, the flow between layers."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.distillation.adapters import (
    Features,
    Regressor,
    as_tuple,
    check_dimensions,
    resize,
    resize_like,
)
from lightning_compress.distillation.losses.base import DistillationLoss, Pair
from lightning_compress.distillation.losses.numeric import (
    check_channel_dim,
    check_integer,
    check_range,
    check_same,
    check_word,
    full_precision,
    mean_or_zero,
    unit,
)


@full_precision
def hint(student: Tensor, teacher: Tensor, channel_dim: int = 1) -> Tensor:
    r"""Hints (Romero et al. 2015, FitNets, arXiv 1412.6550), :math:`L = \frac{1}{|t|} \|r(s) - t\|^2`.

    The mean over all values instead of half their sum, so that one weight suits layers of any size. The regressor r
    is :class:`~lightning_compress.distillation.adapters.Regressor`, or nothing for equal channels.

    Args:
        student: Feature after the regressor, ``(N, C, ...)``, or ``(N, ..., C)``; resized if maps differ in size.
        teacher: The hint, same channels; detached.
        channel_dim: 1, or -1.

    Returns:
        A scalar, at least 0; 0 for an empty batch.

    Raises:
        ConfigurationError: For channels or dimensions that differ.

    >>> hint(torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2))
    tensor(5.)
    """
    ours = resize_like(student, teacher, channel_dim) if student.dim() == teacher.dim() > 2 else student
    check_same(ours, teacher, "hint")
    return mean_or_zero((ours - teacher.detach()).square())


@full_precision
def attention_map(features: Tensor, power: float = 2.0, channel_dim: int = 1) -> Tensor:
    r"""Return where a layer is active: :math:`\frac{1}{C} \sum_c |A_c|^p` for each position.

    Args:
        features: ``(N, C, ...)``, or ``(N, ..., C)``, with positions.
        power: p, at least 1.
        channel_dim: 1, or -1.

    Returns:
        The shape without the channels.

    >>> attention_map(torch.tensor([[[1.0, 2.0], [3.0, 0.0]]]))
    tensor([[5., 2.]])
    """
    return features.abs().pow(power).mean(channel_dim)


@full_precision
def attention_transfer(student: Tensor, teacher: Tensor, power: float = 2.0, channel_dim: int = 1) -> Tensor:
    r"""Attention transfer (Zagoruyko & Komodakis 2017, AT, arXiv 1612.03928).

    .. math:: L = \mathrm{mean} \left( \frac{Q_s}{\|Q_s\|_2} - \frac{Q_t}{\|Q_t\|_2} \right)^2, \quad
        Q = \mathrm{vec}\Big(\frac{1}{C} \sum_c |A_c|^p\Big)

    The mean over samples and positions, as in the authors' code, with a weight of 1000 there. Channels need not agree
    and their order does not matter, so no regressor is needed; the larger of two maps is averaged down.

    Args:
        student: ``(N, C, ...)``, or ``(N, ..., C)``, with one to three dimensions of positions.
        teacher: The same with any number of channels; detached.
        power: p, at least 1.
        channel_dim: 1, or -1.

    Returns:
        A scalar, at least 0; 0 for an empty batch.

    Raises:
        ConfigurationError: For features without positions, or of another number of dimensions.

    >>> attention_transfer(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 2.0]]]))
    tensor(1.)
    """
    if student.dim() != teacher.dim() or not 3 <= student.dim() <= 5:
        raise ConfigurationError(
            f"`at` compares maps over positions; got {tuple(student.shape)} from the student and "
            f"{tuple(teacher.shape)} from the teacher; tap convolutions (N, C, H, W) or tokens (N, L, C)"
        )
    ours, theirs = (attention_map(side, power, channel_dim).unsqueeze(1) for side in (student, teacher.detach()))
    ours, theirs = same_size(ours, theirs)
    return mean_or_zero((unit(ours.flatten(1)) - unit(theirs.flatten(1))).square())


def same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return both maps ``(N, C, ...)`` in the smaller of the two sizes, dimension by dimension.

    >>> [tuple(side.shape) for side in same_size(torch.zeros(2, 3, 8, 4), torch.zeros(2, 5, 4, 4))]
    [(2, 3, 4, 4), (2, 5, 4, 4)]
    """
    size = [min(pair) for pair in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    return resize(student, size), resize(teacher, size)


@full_precision
def flow_matrix(first: Tensor, second: Tensor) -> Tensor:
    r"""Return the flow of the solution procedure between two layers (Yim et al. 2017, FSP).

    .. math:: G_{ij} = \frac{1}{h w} \sum_{x} F^1_{i x} F^2_{j x}

    Args:
        first: ``(N, C1, ...)``, with positions.
        second: ``(N, C2, ...)``; the larger map of the two is averaged down.

    Returns:
        ``(N, C1, C2)``.

    >>> flow_matrix(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, 1.0], [0.0, 4.0]]]))
    tensor([[[2.5000, 4.0000]]])
    """
    one, other = (side.flatten(2) for side in same_size(first, second))
    return one @ other.transpose(1, 2) / max(one.shape[2], 1)


def flow_distillation(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> Tensor:
    r"""Flow of the solution procedure (Yim et al. 2017, A gift from knowledge distillation).

    .. math:: L = \sum_k \mathrm{mean} (G^s_k - G^t_k)^2

    over consecutive layers k, k + 1, with :math:`G` of :func:`flow_matrix`. The mean over samples and entries.

    Args:
        student: Two features or more, in the order of the layers, ``(N, C, ...)`` with positions.
        teacher: As many, with the same channels; detached.

    Returns:
        A scalar, at least 0; 0 for an empty batch.

    Raises:
        ConfigurationError: For fewer than two layers, or channels that differ.

    >>> ones, twos = torch.ones(1, 2, 3), torch.full((1, 2, 3), 2.0)
    >>> flow_distillation((ones, ones), (twos, ones))
    tensor(1.)
    """
    if len(student) != len(teacher) or len(student) < 2:
        raise ConfigurationError(
            f"`fsp` compares what happens between layers; the student gave {len(student)} and the teacher "
            f"{len(teacher)}; tap two or more, as many on each side"
        )
    found = []
    for index in range(len(student) - 1):
        ours = flow_matrix(student[index], student[index + 1])
        theirs = flow_matrix(teacher[index].detach(), teacher[index + 1].detach())
        check_same(ours, theirs, "fsp")
        found.append(mean_or_zero((ours - theirs).square()))
    return torch.stack(found).sum()


class FitNetsHints(DistillationLoss):
    """Hints through a trained regressor, see :func:`hint`; the temperature is not used.

    Usually a first stage of its own, before soft targets. The regressors are dropped afterwards.

    Args:
        channel_dim: 1, or -1 for tokens ``(N, L, C)`` and channels-last maps.
        regressor: ``pointwise`` (channels by a layer of size 1, the size by averaging or interpolation), ``valid``
            (the paper's: a kernel that gives the teacher's size), or ``none`` (channels must agree).
        batch_norm: Normalize what the regressor gives.
        seed: Of the regressors.

    Raises:
        ConfigurationError: For another word or place of the channels.

    >>> loss = FitNetsHints()
    >>> adapter = loss.adapt([(2, 3, 8, 8)], [(2, 5, 4, 4)])
    >>> bool(loss(*adapter(torch.zeros(2, 3, 8, 8), torch.zeros(2, 5, 4, 4)), None, 1.0) > 0)
    True
    """

    name = "hint"
    on: Literal["output", "features"] = "features"

    def __init__(
        self,
        channel_dim: int = 1,
        regressor: Literal["pointwise", "valid", "none"] = "pointwise",
        batch_norm: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_channel_dim(channel_dim)
        check_word("regressor", regressor, ("pointwise", "valid", "none"))
        check_integer("seed", seed)
        self.channel_dim, self.regressor, self.batch_norm, self.seed = channel_dim, regressor, batch_norm, seed

    def pair(self, student: torch.Size, teacher: torch.Size, where: str) -> Pair:
        """Return the regressor of one pair."""
        check_dimensions(student, teacher, where)
        if self.regressor != "none":
            return Regressor(student, teacher, self.channel_dim, self.regressor, self.batch_norm), None
        if student[self.channel_dim] != teacher[self.channel_dim]:
            raise ConfigurationError(
                f"{where}: the student gives {student[self.channel_dim]} channels and the teacher "
                f"{teacher[self.channel_dim]}; use regressor='pointwise'"
            )
        return None, None

    def forward(self, student: Features, teacher: Features, target: Tensor | None, temperature: float) -> Tensor:
        """Return the loss, see :class:`DistillationLoss`."""
        return self.over_pairs(lambda ours, theirs: hint(ours, theirs, self.channel_dim), student, teacher)


class AttentionTransfer(DistillationLoss):
    """Where layers are active, see :func:`attention_transfer`; the temperature is not used.

    Args:
        power: p, at least 1.
        channel_dim: 1, or -1 for tokens ``(N, L, C)`` and channels-last maps.

    Raises:
        ConfigurationError: For a value outside these ranges.

    >>> AttentionTransfer()(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 2.0]]]), None, 1.0)
    tensor(1.)
    """

    name = "at"
    on: Literal["output", "features"] = "features"

    def __init__(self, power: float = 2.0, channel_dim: int = 1) -> None:
        super().__init__()
        check_range("power", power, 1)
        check_channel_dim(channel_dim)
        self.power, self.channel_dim = power, channel_dim

    def pair(self, student: torch.Size, teacher: torch.Size, where: str) -> Pair:
        """Return no module: channels and sizes may differ, the number of dimensions may not."""
        check_dimensions(student, teacher, where, least=3)
        return None, None

    def forward(self, student: Features, teacher: Features, target: Tensor | None, temperature: float) -> Tensor:
        """Return the loss, see :class:`DistillationLoss`."""
        return self.over_pairs(
            lambda ours, theirs: attention_transfer(ours, theirs, self.power, self.channel_dim), student, teacher
        )


class FlowDistillation(DistillationLoss):
    """Flow between consecutive taps, see :func:`flow_distillation`; the temperature is not used.

    >>> ones, twos = torch.ones(1, 2, 3), torch.full((1, 2, 3), 2.0)
    >>> FlowDistillation()((ones, ones), (twos, ones), None, 1.0)
    tensor(1.)
    """

    name = "fsp"
    least_pairs = 2
    on: Literal["output", "features"] = "features"

    def pair(self, student: torch.Size, teacher: torch.Size, where: str) -> Pair:
        """Return no module: channels must agree, sizes need not."""
        check_dimensions(student, teacher, where, least=3)
        if student[1] != teacher[1]:
            raise ConfigurationError(
                f"{where}: the student gives {student[1]} channels and the teacher {teacher[1]}; `fsp` has no "
                "regressor, tap layers with as many channels, or use RelationalDistillation"
            )
        return None, None

    def forward(self, student: Features, teacher: Features, target: Tensor | None, temperature: float) -> Tensor:
        """Return the loss, see :class:`DistillationLoss`."""
        return flow_distillation(as_tuple(student), as_tuple(teacher))
