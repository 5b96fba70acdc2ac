"""The protocol of a distillation loss, which is all that a wrapper needs to know about one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.distillation.adapters import Adapters, Features, as_tuple, seeded_layers

Pair = tuple[nn.Module | None, nn.Module | None]
"""What one pair of features needs: a module for the student's side, one for the teacher's; ``None`` for neither."""


class DistillationLoss(nn.Module, ABC):
    """A number that is small when the student does what the teacher does.

    What a wrapper does with one::

        adapter = loss.adapt(student_shapes, teacher_shapes)  # once, before optimizers exist; shapes with the batch
        if adapter is not None:  # its parameters belong to the optimizer
            student, teacher = adapter(student, teacher)
        value = loss(student, teacher, target, temperature)  # a scalar in at least float32

    - ``name``: the loss's word in logs and configs.
    - ``on``: ``"output"`` compares what the two models return, ``"features"`` what taps inside them see.
    - ``uses_teacher``: ``False`` if the students teach themselves or each other; ``teacher`` is then not looked at.
    - ``least_pairs``, ``most_pairs``: how many pairs it takes; no bound if ``most_pairs`` is ``None``.
    - ``class_dim``: where the classes lie in an output.
    - ``seed``: adapters depend on it and on the shapes only; global random states are not touched.

    Weights and their schedules are the wrapper's. Several pairs are summed, as the papers do. Nothing flows back into
    ``teacher``: it is detached inside. Losses with buffers (``state_dict`` not empty) need them saved for an exact
    resume; they move on in training mode only.

    A loss of your own needs a name and ``forward``:

    >>> class LargestError(DistillationLoss):
    ...     name = "largest"
    ...
    ...     def forward(self, student, teacher, target, temperature):
    ...         return self.over_pairs(lambda ours, theirs: (ours - theirs.detach()).abs().max(), student, teacher)
    >>> LargestError()(torch.tensor([1.0, 3.0]), torch.tensor([1.5, 1.0]), None, 1.0)
    tensor(2.)
    """

    name: ClassVar[str]
    on: Literal["output", "features"] = "output"
    uses_teacher: ClassVar[bool] = True
    least_pairs: ClassVar[int] = 1
    most_pairs: ClassVar[int | None] = None
    class_dim: int = 1
    seed: int = 0

    @abstractmethod
    def forward(self, student: Features, teacher: Features, target: Tensor | None, temperature: float) -> Tensor:
        """Return the loss, a scalar.

        Args:
            student: What the student gave: one tensor, or one a pair.
            teacher: The same from the teacher.
            target: The task's labels, for losses that look at them.
            temperature: Above 0, for losses that soften.
        """

    def adapt(self, student_shape: Sequence[torch.Size], teacher_shape: Sequence[torch.Size]) -> Adapters | None:
        """Return what maps the features of each pair to comparable shapes, or ``None`` if nothing is needed.

        Args:
            student_shape: One shape a pair, with the batch dimension.
            teacher_shape: The same for the teacher.

        Returns:
            A module to call as ``adapter(student, teacher)``, which returns both sides; or ``None``.

        Raises:
            ConfigurationError: If the numbers of pairs differ or do not suit the loss, or shapes cannot be matched;
                names pair and shapes.
        """
        number = len(student_shape)
        if number < self.least_pairs or (self.most_pairs is not None and number > self.most_pairs):
            bound = f"{self.least_pairs} or more" if self.most_pairs is None else f"at most {self.most_pairs}"
            raise ConfigurationError(
                f"`{self.name}` takes {bound} tensors of the student, but `pairs` name {number}; name other layers, or "
                "use one loss a pair"
            )
        if len(student_shape) != len(teacher_shape) and self.uses_teacher:
            raise ConfigurationError(
                f"`{self.name}` compares features in pairs, but the student gives {len(student_shape)} and the teacher "
                f"{len(teacher_shape)}; name as many layers on each side"
            )
        if not self.uses_teacher:
            return None
        with seeded_layers(self.seed):
            pairs = [
                self.pair(torch.Size(ours), torch.Size(theirs), f"`{self.name}` pair {index}")
                for index, (ours, theirs) in enumerate(zip(student_shape, teacher_shape, strict=True))
            ]
        if all(ours is None and theirs is None for ours, theirs in pairs):
            return None
        return Adapters([ours for ours, _ in pairs], [theirs for _, theirs in pairs])

    def pair(self, student: torch.Size, teacher: torch.Size, where: str) -> Pair:
        """Return the modules that one pair of shapes needs; here none, and the shapes must be equal past the batch.

        Args:
            student: Shape of the student's feature, batch first.
            teacher: Shape of the teacher's.
            where: Start of an error's sentence: which loss and pair.

        Raises:
            ConfigurationError: If they cannot be compared.
        """
        if student[1:] != teacher[1:]:
            raise ConfigurationError(
                f"{where}: the student gives {tuple(student)} and the teacher {tuple(teacher)}; they must agree after "
                "the batch dimension"
            )
        return None, None

    def over_pairs(self, function: Callable[[Tensor, Tensor], Tensor], student: Features, teacher: Features) -> Tensor:
        """Return the sum of ``function(student, teacher)`` over the pairs.

        Raises:
            ConfigurationError: If there are none, or not as many on both sides.
        """
        ours, theirs = as_tuple(student), as_tuple(teacher)
        if not ours or len(ours) != len(theirs):
            raise ConfigurationError(
                f"`{self.name}` compares pairs; the student gave {len(ours)} tensors and the teacher {len(theirs)}; "
                "give one or more, as many on each side"
            )
        first, *others = (function(one, other) for one, other in zip(ours, theirs, strict=True))
        return sum(others, first)


def check_classes(shape: torch.Size, class_dim: int, where: str) -> None:
    """Refuse scores whose softmax says nothing: without a dimension of classes, or of one class only.

    Raises:
        ConfigurationError: With the shape.
    """
    if not -len(shape) <= class_dim < len(shape) or shape[class_dim] < 2:
        raise ConfigurationError(
            f"{where}: soft targets need scores of two classes or more in dimension {class_dim}, got {tuple(shape)}; "
            "use MultiLabelDistillation for yes-or-no outputs and RegressionDistillation for numbers"
        )


def check_maps(student: torch.Size, teacher: torch.Size, where: str, resize: bool = True) -> None:
    """Refuse shapes ``(N, C, ...)`` with other channels, or of another size if that cannot be resized.

    Raises:
        ConfigurationError: With the shapes.
    """
    resizable = resize and len(student) == len(teacher) > 3 and student[1] == teacher[1]
    if student[1:] != teacher[1:] and not resizable:
        raise ConfigurationError(
            f"{where}: the student gives {tuple(student)} and the teacher {tuple(teacher)}; they must agree after the "
            f"batch dimension{', but for the height and width of maps' if resize else ''}"
        )
