"""Before the first epoch: which layers are meant, do they exist, do their shapes fit, which adapters are needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.isolation import call, device_of, evaluating, map_tensors
from lightning_compress.core.plan import PlanRow, render_plan
from lightning_compress.distillation.adapters import Adapters
from lightning_compress.distillation.answers import check_answer
from lightning_compress.distillation.pairs import LayerPair, match_pairs
from lightning_compress.distillation.seen import Seen, element_of
from lightning_compress.distillation.taps import defines_forward, tap_point
from lightning_compress.distillation.teacher import Answer, Teacher
from lightning_compress.distillation.teachers import layer_names
from lightning_compress.distillation.terms import Term

if TYPE_CHECKING:
    from lightning_compress.distillation.engine import Distiller


def check_output(student: nn.Module, output: str) -> None:
    """Refuse a student without anything to tap.

    Raises:
        ConfigurationError: If ``output`` is no layer, or it is the module itself, which has no ``forward``.
    """
    if output:
        tap_point(student, output)
    elif not defines_forward(student):
        near = ", ".join(repr(name) for name, _ in student.named_children()) or "none"
        raise ConfigurationError(
            f"`student_output`: {type(student).__name__} has no forward whose output could be compared; name the "
            f'submodule that gives it, such as student_output="net"; it has {near}'
        )


def match_terms(
    terms: Mapping[str, Term], student: nn.Module, teacher: Teacher | None
) -> dict[str, tuple[LayerPair, ...]]:
    """Return the layer pairs of every loss on features, by name.

    Raises:
        ConfigurationError: If a name or pattern matches nothing.
    """
    names = layer_names(student)
    found: dict[str, tuple[LayerPair, ...]] = {}
    for name, term in terms.items():
        if term.pairs is None:
            continue
        theirs = teacher.layers() if teacher is not None and term.loss.uses_teacher else None
        try:
            found[name] = match_pairs(term.pairs, names, theirs)
        except ConfigurationError as error:
            raise ConfigurationError(f"losses.{name}: {error}") from error
    return found


def run_part(distiller: Distiller, student: nn.Module) -> nn.Module:
    """Return what is run on examples: the student, or its part that gives the output, if it has no forward itself."""
    return student if defines_forward(student) else tap_point(student, distiller.student_output)


def run_example(distiller: Distiller, student: nn.Module, inputs: Any) -> tuple[Seen, Answer | None]:
    """Run both models on example inputs, in evaluation mode and without moving any random state.

    Raises:
        ConfigurationError: If the student cannot be run with them, or its output was not seen.
    """
    device = device_of(student)
    inputs = map_tensors(lambda tensor: tensor.to(device), inputs)
    root = run_part(distiller, student)
    with evaluating(student), torch.no_grad(), distiller.watch(student, with_graph=False) as record:
        call(root, inputs)
        runs = distiller.collect(record)
        if not runs:
            raise ConfigurationError(
                f"`student_output`: {distiller.student_output!r} did not run in the forward of {type(student).__name__}"
            )
        answer = None
        if distiller.teacher is not None:
            distiller.teacher.to(device)
            answer = distiller.ask(runs[0], None, 0, None, every=True)
    return runs[0], answer


def examine_answer(distiller: Distiller, student: nn.Module, inputs: Any) -> None:
    """Run both models on example inputs, as far as the student takes them, and look at the answer.

    Raises:
        ConfigurationError: If the teacher fails, or its answer cannot be used; names ``teacher``.
    """
    asks = distiller.teacher is not None and distiller.teacher.has_validation  # others want a batch
    inputs = map_tensors(lambda tensor: tensor.to(device_of(student)), inputs)
    root = run_part(distiller, student)
    with evaluating(student), torch.no_grad(), distiller.watch(student, with_graph=False) as record:
        try:
            call(root, inputs)
            runs = distiller.collect(record)
        except Exception:  # a guess: its training_step may call it otherwise, and the first batch will tell
            return
        if runs and not distiller.output_key:
            distiller.element = element_of(record[distiller.student_output][0].output, runs[0].output)
        answer = distiller.ask(runs[0], None, 0, None) if len(runs) == 1 and asks else None
    if answer is not None:
        check_answer(distiller.terms, runs[0].output, answer, str(distiller.teacher))


def build_adapters(
    terms: Mapping[str, Term], pairs: Mapping[str, tuple[LayerPair, ...]], seen: Seen, answer: Answer | None
) -> dict[str, Adapters]:
    """Return the adapters that losses on features need, by name.

    Raises:
        ConfigurationError: If two features cannot be compared; names loss and layers.
    """
    found: dict[str, Adapters] = {}
    for name, matched in pairs.items():
        loss = terms[name].loss
        ours = [tensor.shape for tensor in seen.features_of([pair.student for pair in matched])]
        theirs = [tensor.shape for tensor in seen.partners(matched, answer)] if loss.uses_teacher else ours
        try:
            adapter = loss.adapt(ours, theirs)
        except ConfigurationError as error:
            layers = ", ".join(f"student {pair.student!r} with teacher {pair.teacher!r}" for pair in matched)
            raise ConfigurationError(f"losses.{name} compares {layers}: {error}") from error
        if adapter is not None:
            found[name] = adapter
    return found


def plan_of(distiller: Distiller, title: str) -> str:
    """Return what will be compared, as text: a row for each output and pair of layers."""
    rows = []
    for name, term in distiller.terms.items():
        weight = term.weight if isinstance(term.weight, float) else f"{term.weight.begin:g} to {term.weight.end:g}"
        action = f"{type(term.loss).__name__} x {weight}"
        learnt = sum(p.numel() for p in distiller.adapters[name].parameters()) if name in distiller.adapters else 0
        action += f", adapters of {learnt} weights" if learnt else ""
        output = (distiller.output_spec or "output") + distiller.element
        pairs = [str(pair) for pair in distiller.pairs.get(name, ())] or [output]
        rows += [PlanRow(name, pair, "", action) for pair in pairs]
    return render_plan(f"{title}: teacher {distiller.teacher or 'none'}", rows)
