"""What makes a student's features comparable with a teacher's: one small module a pair, built from shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Features = Tensor | tuple[Tensor, ...]
"""One tensor, or one tensor a pair of taps."""


@contextmanager
def seeded_layers(seed: int) -> Iterator[None]:
    """Create layers on the CPU whose values depend on ``seed`` only, and leave every global random state as it was.

    >>> with seeded_layers(0):
    ...     one = nn.Linear(2, 2)
    >>> before = torch.get_rng_state()
    >>> with seeded_layers(0):
    ...     other = nn.Linear(2, 2)
    >>> torch.equal(one.weight, other.weight), torch.equal(before, torch.get_rng_state())
    (True, True)
    """
    with torch.random.fork_rng(devices=()), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        yield


def as_tuple(features: Features) -> tuple[Tensor, ...]:
    """Return ``features`` as a tuple, also when there is one tensor only.

    >>> len(as_tuple(torch.zeros(2))), len(as_tuple((torch.zeros(2), torch.zeros(3))))
    (1, 2)
    """
    return (features,) if isinstance(features, Tensor) else tuple(features)


class Adapters(nn.Module):
    """One adapter a pair on the student's side, and where a loss trains one there (CRD), on the teacher's side too.

    The teacher's features are detached before they reach a module here, so nothing flows back into the teacher.

    Args:
        student: A module or ``None`` (leave as it is) a pair.
        teacher: The same for the teacher's side; ``None`` for no module at all.

    >>> adapters = Adapters([nn.Linear(2, 3)])
    >>> student, teacher = adapters(torch.ones(4, 2), torch.ones(4, 3))
    >>> student.shape, teacher.shape
    (torch.Size([4, 3]), torch.Size([4, 3]))
    """

    def __init__(self, student: Sequence[nn.Module | None], teacher: Sequence[nn.Module | None] | None = None) -> None:
        super().__init__()
        other = [None] * len(student) if teacher is None else teacher
        self.student = nn.ModuleList(nn.Identity() if part is None else part for part in student)
        self.teacher = nn.ModuleList(nn.Identity() if part is None else part for part in other)

    def forward(self, student: Features, teacher: Features) -> tuple[Features, Features]:
        """Return both sides' features after their adapters: tensors for tensors, tuples for tuples."""
        ours = tuple(module(part) for module, part in zip(self.student, as_tuple(student), strict=True))
        theirs = tuple(module(part.detach()) for module, part in zip(self.teacher, as_tuple(teacher), strict=True))
        return (
            ours[0] if isinstance(student, Tensor) else ours,
            theirs[0] if isinstance(teacher, Tensor) else theirs,
        )
