"""Matching logits themselves, from a teacher as it is or with noise on what it says."""

from __future__ import annotations

import hashlib
import math
from typing import Literal

import torch
from torch import Tensor

from lightning_compress.distillation.adapters import Features
from lightning_compress.distillation.losses.base import DistillationLoss
from lightning_compress.distillation.losses.numeric import (
    check_integer,
    check_range,
    check_same,
    check_word,
    full_precision,
    mean_or_zero,
)
from lightning_compress.distillation.losses.soft_targets import knowledge_distillation


@full_precision
def logits_mse(student: Tensor, teacher: Tensor, center: bool = False, class_dim: int = 1) -> Tensor:
    r"""Squared distance of logits, :math:`\frac{1}{N C} \sum (s - t)^2` (Ba & Caruana 2014, arXiv 1312.6184).

    Args:
        student: Logits, any shape.
        teacher: Logits, same shape; detached.
        center: Subtract each side's mean over classes first, which a softmax does not see.
        class_dim: Dimension of the classes, for ``center``.

    Returns:
        A scalar. Entries that are minus infinity on both sides (masked classes) are left out.

    Raises:
        ConfigurationError: For shapes that differ.

    >>> logits_mse(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 0.0]]))
    tensor(5.)
    >>> logits_mse(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 0.0]]), center=True)
    tensor(1.)
    """
    check_same(student, teacher, "student")
    counts = ~((student == -math.inf) & (teacher == -math.inf))
    ours, theirs = student.masked_fill(~counts, 0), teacher.detach().masked_fill(~counts, 0)
    if center:
        number = counts.sum(class_dim, keepdim=True).clamp(min=1)
        ours, theirs = (side - side.sum(class_dim, keepdim=True) / number for side in (ours, theirs))
    return mean_or_zero((ours - theirs).square(), counts)


def noisy_logits(logits: Tensor, sigma: float, probability: float, generator: torch.Generator) -> Tensor:
    r"""Return a noisy teacher's logits, :math:`(1 + \xi) z` with :math:`\xi \sim N(0, \sigma^2)` for chosen samples.

    Args:
        logits: ``(N, ...)``.
        sigma: Standard deviation of the noise, at least 0.
        probability: How likely a sample is noisy, 0 to 1.
        generator: On the CPU, so that every device draws the same.

    Returns:
        Same shape, dtype and device.

    >>> noisy_logits(torch.ones(2, 2), 0.5, 1.0, torch.Generator().manual_seed(0)).shape
    torch.Size([2, 2])
    """
    chosen = torch.rand(logits.shape[:1], generator=generator) < probability
    noise = torch.randn(logits.shape, generator=generator) * sigma
    noise = noise * chosen.reshape(-1, *[1] * (logits.dim() - 1))
    possible = logits > -math.inf
    return torch.where(possible, logits * (1 + noise.to(logits.device, logits.dtype)), logits)


class LogitsMSE(DistillationLoss):
    """Squared distance of logits, see :func:`logits_mse`; the temperature is not used.

    Args:
        center: Subtract each side's mean over classes first.
        class_dim: Dimension of the classes, for ``center``.

    >>> LogitsMSE()(torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2), None, 1.0)
    tensor(5.)
    """

    name = "logits_mse"

    def __init__(self, center: bool = False, class_dim: int = 1) -> None:
        super().__init__()
        check_integer("class_dim", class_dim)
        self.center, self.class_dim = center, class_dim

    def forward(self, student: Features, teacher: Features, target: Tensor | None, temperature: float) -> Tensor:
        """Return the loss, see :class:`DistillationLoss`."""
        return self.over_pairs(
            lambda ours, theirs: logits_mse(ours, theirs, self.center, self.class_dim), student, teacher
        )


class NoisyTeacher(DistillationLoss):
    r"""A teacher whose logits are disturbed anew each step (Sau & Balasubramanian 2016, arXiv 1610.09650).

    The logits of a sample become :math:`(1 + \xi) z`, :math:`\xi \sim N(0, \sigma^2)`, with some probability, and
    the student matches them: one teacher acts like many, which regularizes the student. The noise depends on
    ``seed``, the step and the batch's shape only, so it is the same on every device and after a resume (the step is
    part of the state). In evaluation mode there is none.

    Args:
        sigma: Standard deviation of the noise, at least 0.
        probability: How likely a sample is noisy, 0 to 1.
        compare: ``mse`` of logits, as in the paper, or ``kd``, soft targets at the temperature.
        seed: Of the noise.

    Raises:
        ConfigurationError: For a value outside these ranges.

    >>> loss = NoisyTeacher(sigma=0.5)
    >>> first, second = (loss(torch.ones(4, 2), torch.ones(4, 2), None, 1.0) for _ in range(2))
    >>> bool(first > 0), bool(first != second), loss.eval()(torch.ones(4, 2), torch.ones(4, 2), None, 1.0)
    (True, True, tensor(0.))
    """

    name = "noisy_teacher"

    def __init__(
        self, sigma: float = 0.1, probability: float = 0.5, compare: Literal["mse", "kd"] = "mse", seed: int = 0
    ) -> None:
        super().__init__()
        check_range("sigma", sigma, 0)
        check_range("probability", probability, 0, 1)
        check_integer("seed", seed)
        check_word("compare", compare, ("mse", "kd"))
        self.sigma, self.probability, self.compare, self.seed = sigma, probability, compare, seed
        self.step = 0

    def forward(self, student: Features, teacher: Features, target: Tensor | None, temperature: float) -> Tensor:
        """Return the loss, see :class:`DistillationLoss`; counts a step in training mode."""
        digest = hashlib.sha256(f"{self.seed},{self.step},noisy_teacher".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        training = self.training
        self.step += training

        def one(ours: Tensor, theirs: Tensor) -> Tensor:
            said = noisy_logits(theirs.detach(), self.sigma, self.probability, generator) if training else theirs
            return logits_mse(ours, said) if self.compare == "mse" else knowledge_distillation(ours, said, temperature)

        return self.over_pairs(one, student, teacher)

    def get_extra_state(self) -> Tensor:
        """Return the number of steps so far, on the CPU."""
        return torch.tensor(self.step)

    def set_extra_state(self, state: Tensor) -> None:
        """Go on after that many steps."""
        self.step = int(state)
