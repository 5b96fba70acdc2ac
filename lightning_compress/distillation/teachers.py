"""Teachers: a module, a function, several of them, and what a user may write for one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.core.copies import full_copy
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.isolation import map_tensors
from lightning_compress.core.lightning_checkpoint import load_from_checkpoint
from lightning_compress.core.paths import clean_path, get_layer, named_layers, original
from lightning_compress.distillation.functions import FunctionTeacher
from lightning_compress.distillation.loading import load_weights
from lightning_compress.distillation.taps import Taps, defines_forward, pick, split_spec
from lightning_compress.distillation.teacher import Answer, Question, Teacher

BASELINE = "baseline"
"""What a user writes for the student as it is before training: dense teacher, compressed student."""

TeacherLike = nn.Module | Teacher | str | Path | Sequence[Any] | Callable[[Any, int], Tensor] | None
"""What :func:`as_teacher` takes; ``None`` where no loss looks at a teacher."""


class ModuleTeacher(Teacher):
    """A frozen module, called with the inputs of the student's forward.

    It is put into evaluation mode (and back into it, should somebody call ``train`` on it), needs no gradient from now
    on, and runs under ``no_grad``; neither its weights nor its batch-norm statistics ever change.

    Args:
        module: Any module; a LightningModule is called by its ``forward``.
        output: The submodule to call instead, by path, for a LightningModule without a ``forward``; with a colon one of
            several outputs, as in ``":1"`` or ``"net:logits"``.
        metrics: Whether the ``validation_step`` and ``test_step`` of a LightningModule are run over the student's data,
            once a fit, for what they log.

    Raises:
        ConfigurationError: If it is no module, or has nothing to call.

    >>> teacher = ModuleTeacher(nn.Linear(2, 3))
    >>> teacher.answer(Question((torch.zeros(4, 2),), {})).output.shape
    torch.Size([4, 3])
    """

    def __init__(self, module: nn.Module, output: str = "", metrics: bool = True) -> None:
        if not isinstance(module, nn.Module):
            raise ConfigurationError(f"`teacher` must be a torch.nn.Module, got {type(module).__name__}")
        if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
            raise ConfigurationError("`teacher` lies on the meta device, without values; load its weights first")
        self.module = module.eval().requires_grad_(False)
        self.output, self.key = split_spec(output)
        self.metrics = metrics
        called = get_layer(module, self.output) if self.output else module
        if not defines_forward(original(called)):
            near = ", ".join(repr(name) for name, _ in module.named_children()) or "none"
            raise ConfigurationError(
                f"`teacher`: {type(module).__name__} has no forward to call; name the submodule that gives its output: "
                f"ModuleTeacher(module, output=...), one of {near}"
            )

    def __str__(self) -> str:
        return type(original(self.module)).__name__

    def answer(self, question: Question) -> Answer:
        """Run the module."""
        if any(part.training for part in self.module.modules()):
            self.module.eval()
        root = original(self.module) if question.layers else self.module  # a compiled one might not run its hooks
        called = get_layer(root, self.output) if self.output else root
        args, kwargs = self._as_own_type((question.args, dict(question.kwargs)))
        taps = Taps(question.layers)
        with torch.no_grad(), taps.watch(root) as seen:
            output = pick(called(*args, **kwargs), self.key, "the teacher")
        features = {path: tuple(call.output for call in calls) for path, calls in seen.items()}
        return Answer(output, features)

    def layers(self) -> tuple[str, ...]:
        """Return the paths of all its layers."""
        return layer_names(self.module)

    def to(self, device: torch.device) -> Teacher:
        """Move the module."""
        self.module.to(device)
        return self

    def judge(self) -> nn.Module | None:
        """Return the module."""
        return original(self.module) if self.metrics else None

    def fingerprint(self) -> str:
        """Return a hash of its weights and statistics."""
        digest = hashlib.sha256()
        for key, value in original(self.module).state_dict().items():
            if isinstance(value, Tensor):
                digest.update(key.encode())
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def _as_own_type(self, inputs: Any) -> Any:
        """Give a teacher in another precision inputs of its own; under autocast the operations see to it."""
        own = next((p.dtype for p in self.module.parameters() if p.is_floating_point()), None)

        def cast(tensor: Tensor) -> Tensor:
            autocast = torch.amp.is_autocast_available(tensor.device.type)
            if own is None or not tensor.is_floating_point() or tensor.dtype == own:
                return tensor
            return tensor if autocast and torch.is_autocast_enabled(tensor.device.type) else tensor.to(own)

        return map_tensors(cast, inputs)


class Ensemble(Teacher):
    r"""The mean of several teachers, of their outputs or of their probabilities.

    ``"logits"``: :math:`\sum_k w_k z_k`. ``"probabilities"``: :math:`\log \sum_k w_k \mathrm{softmax}(z_k)`, logits
    whose softmax is the mean of the teachers'; classes in dimension 1. Its features are those of the first teacher.

    Args:
        teachers: Two or more of what :func:`as_teacher` takes.
        weights: One number above 0 each; they are scaled to sum to 1. Equal by default.
        mean: ``"logits"`` or ``"probabilities"``.

    Raises:
        ConfigurationError: For weights that do not fit, an unknown mean, or no teachers.

    >>> both = Ensemble([lambda b, i: torch.zeros(1, 2), lambda b, i: torch.full((1, 2), 4.0)], weights=[3, 1])
    >>> both.answer(Question((), {})).output
    tensor([[1., 1.]])
    """

    def __init__(self, teachers: Sequence[Any], weights: Sequence[float] | None = None, mean: str = "logits") -> None:
        if not isinstance(teachers, Sequence) or isinstance(teachers, str) or not teachers:
            raise ConfigurationError(f"`teachers` must be a list of teachers, got {teachers!r}")
        self.teachers = [as_teacher(teacher) for teacher in teachers]
        given = [1.0] * len(teachers) if weights is None else list(weights)
        if len(given) != len(self.teachers) or not all(isinstance(w, int | float) and w > 0 for w in given):
            raise ConfigurationError(
                f"`weights` must be {len(self.teachers)} numbers above 0, one a teacher, got {weights!r}"
            )
        if mean not in ("logits", "probabilities"):
            raise ConfigurationError(f"`mean` must be 'logits' or 'probabilities', got {mean!r}")
        self.weights = [weight / sum(given) for weight in given]
        self.mean = mean
        self.has_validation = all(teacher.has_validation for teacher in self.teachers)

    def split(self, batch: Any) -> tuple[Any, Any]:
        """Let each teacher take its part out of the batch."""
        extras = []
        for teacher in self.teachers:
            batch, extra = teacher.split(batch)
            extras.append(extra)
        return batch, extras

    def answer(self, question: Question) -> Answer | None:
        """Ask all and take the mean."""
        extras = question.extra if question.extra is not None else [None] * len(self.teachers)
        answers = []
        for index, (teacher, extra) in enumerate(zip(self.teachers, extras, strict=True)):
            layers = question.layers if index == 0 else ()
            answers.append(teacher.answer(_with(question, extra=extra, layers=layers)))
        found = [answer for answer in answers if answer is not None]
        if len(found) < len(answers):
            return None
        outputs = [answer.output for answer in found]
        if len({output.shape for output in outputs}) > 1:
            shapes = ", ".join(f"{teacher} {tuple(o.shape)}" for teacher, o in zip(self.teachers, outputs, strict=True))
            raise ConfigurationError(
                f"`teacher`: a mean needs outputs of one shape, got {shapes}; give teachers for the same classes"
            )
        if self.mean == "probabilities":
            outputs = [output.float().softmax(1) for output in outputs]
        total = torch.stack([weight * output for weight, output in zip(self.weights, outputs, strict=True)]).sum(0)
        return Answer(total.log() if self.mean == "probabilities" else total, found[0].features)

    def layers(self) -> tuple[str, ...]:
        """Return the paths of the first teacher's layers."""
        return self.teachers[0].layers()

    def to(self, device: torch.device) -> Teacher:
        """Move them all."""
        self.teachers = [teacher.to(device) for teacher in self.teachers]
        return self

    def fingerprint(self) -> str:
        """Return theirs, one after the other."""
        return "-".join(teacher.fingerprint() for teacher in self.teachers)


def as_teacher(teacher: Any, student: nn.Module | None = None, output: str = "") -> Teacher:
    """Return the teacher that a user means.

    Args:
        teacher: A :class:`Teacher`; a module; ``"baseline"``, a frozen copy of the student as it is now; the path of a
            checkpoint or artifact of the student's architecture; a function of (batch, batch_idx); or a list of these,
            of which the mean counts.
        student: The student, where the teacher is made from it.
        output: Path of the submodule that gives the student's output; the same is called in a teacher that has it and
            no ``forward``. Its ``":key"`` counts for copies of the student.

    Raises:
        ConfigurationError: If it is none of these, or needs a student.

    >>> type(as_teacher(nn.Linear(2, 2))).__name__, type(as_teacher(lambda batch, batch_idx: batch)).__name__
    ('ModuleTeacher', 'FunctionTeacher')
    """
    if isinstance(teacher, Teacher):
        return teacher
    if isinstance(teacher, nn.Module):
        _refuse_shared(teacher, student)
        return _module_teacher(teacher, output)
    if isinstance(teacher, str | Path):
        if student is None:
            raise ConfigurationError(f"`teacher` is {str(teacher)!r}, which needs the student; give a module here")
        copied = full_copy(student)
        if teacher != BASELINE:
            load_weights(copied, teacher)
        return ModuleTeacher(copied, output) if ":" in output else _module_teacher(copied, output)
    if isinstance(teacher, Sequence):
        return Ensemble([as_teacher(one, student, output) for one in teacher])
    if callable(teacher) and not isinstance(teacher, type):
        return FunctionTeacher(teacher)
    raise ConfigurationError(
        f"`teacher` must be a module, the path of a checkpoint, 'baseline', a function of (batch, batch_idx), a "
        f"Teacher or a list of these, got {teacher!r}"
    )


def reads_batches(teacher: Any) -> bool:
    """Tell whether a teacher, or one of a list, takes what it needs out of the batches, as a cache does."""
    several = teacher.teachers if isinstance(teacher, Ensemble) else teacher
    if isinstance(several, Sequence) and not isinstance(several, str):
        return any(map(reads_batches, several))
    return isinstance(teacher, Teacher) and type(teacher).split is not Teacher.split


def load_teacher(path: str | Path, model: Any, output: str = "") -> ModuleTeacher:
    """Return the teacher whose weights lie in a file, for any architecture.

    Args:
        path: A Lightning checkpoint, ``state_dict``, ``.safetensors`` or compressed artifact.
        model: The architecture, with any weights; or a LightningModule class, built from the checkpoint's own
            hyper-parameters.
        output: The submodule to call, for a LightningModule without a ``forward``.

    Raises:
        ConfigurationError: If the file does not exist or fit.
    """
    if isinstance(model, type):
        return ModuleTeacher(load_from_checkpoint(model, path, map_location="cpu"), output)
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"`model` must be a module or a LightningModule class, got {type(model).__name__}")
    return ModuleTeacher(load_weights(model, path), output)


def layer_names(root: nn.Module) -> tuple[str, ...]:
    """Return every clean path in ``root``, shared modules under each of their names.

    >>> layer_names(nn.Sequential(nn.ReLU(), nn.ReLU()))
    ('0', '1')
    """
    paths = (clean_path(path) for path, _ in root.named_modules(remove_duplicate=False))
    return tuple(dict.fromkeys(path for path in paths if path))


def _module_teacher(module: nn.Module, output: str) -> ModuleTeacher:
    output = split_spec(output)[0]  # which of several outputs is the student's own matter
    borrowed = output if not defines_forward(original(module)) and output in named_layers(module) else ""
    return ModuleTeacher(module, borrowed)


def _refuse_shared(teacher: nn.Module, student: nn.Module | None) -> None:
    held = {id(parameter) for parameter in student.parameters()} if student is not None else set()
    if any(id(parameter) in held for parameter in teacher.parameters()):
        raise ConfigurationError(
            "`teacher` shares parameters with the student and would learn with it; pass a copy "
            "(copy.deepcopy(student)), or 'baseline', which makes one"
        )


def _with(question: Question, **changes: Any) -> Question:
    fields: Mapping[str, Any] = vars(question)
    return Question(**{**fields, **changes})
