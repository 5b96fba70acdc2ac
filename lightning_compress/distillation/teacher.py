"""What a teacher is: something that answers for a batch what the student was asked. A cache is one like any other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Question:
    """What a teacher is asked.

    Args:
        args: Positional inputs of the student's forward, as its own ``training_step`` made them (augmented, mixed).
        kwargs: Keyword inputs of the same call.
        batch: What ``training_step`` got, after :meth:`Teacher.split`.
        batch_idx: Its number in the epoch.
        extra: What :meth:`Teacher.split` took out of the batch.
        layers: Teacher layers whose outputs are wanted, by path.
        training: Whether the batch is one of the training data.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    batch: Any = None
    batch_idx: int = 0
    extra: Any = None
    layers: tuple[str, ...] = ()
    training: bool = True


@dataclass(frozen=True)
class Answer:
    """What a teacher says.

    Args:
        output: Its output, (batch, ...), of the student's shape: logits, values or maps.
        features: What each call of an asked layer returned, by path.
    """

    output: Tensor
    features: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


class Teacher(ABC):
    """Base of every teacher. It holds no parameter of the student and is in no checkpoint, optimizer or DDP bucket.

    A teacher that reads stored outputs implements :meth:`split` and :meth:`answer` and nothing else.
    """

    has_validation: bool = True
    """Whether it can be asked about other data than the training data; metrics of it are logged only then."""

    def split(self, batch: Any) -> tuple[Any, Any]:
        """Return the batch as the student's ``training_step`` wants it, and what :meth:`answer` needs out of it."""
        return batch, None

    @abstractmethod
    def answer(self, question: Question) -> Answer | None:
        """Return what the teacher says, called under ``no_grad`` and the autocast of the student's step.

        ``None`` where it has no answer for data other than the training data.
        """

    def layers(self) -> tuple[str, ...]:
        """Return the paths of the layers whose outputs it can answer with; empty for one that has only its output."""
        return ()

    def to(self, device: torch.device) -> Teacher:
        """Move what it computes with to a device, and return itself; called before training and before validation."""
        return self

    def fingerprint(self) -> str:
        """Return a short text that changes when the teacher does; compared on resume. Empty for one that has none."""
        return ""

    def judge(self) -> nn.Module | None:
        """Return the model whose own validation and test steps tell how good this teacher is; ``None`` if none does."""
        return None

    def __str__(self) -> str:
        return type(self).__name__

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        """Return itself: nothing changes a teacher, so copies of the student share it."""
        return self
