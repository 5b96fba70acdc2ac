"""What wrapper and callback share: taps, the teacher's answer, the objective, and what is learnt beside the student."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.schedule import Horizon
from lightning_compress.distillation.adapters import Adapters
from lightning_compress.distillation.answers import check_answer, first_answer
from lightning_compress.distillation.cached_batch import NESTED, refuse_cached, take_cached
from lightning_compress.distillation.examination import (
    build_adapters,
    check_output,
    match_terms,
    plan_of,
    run_example,
)
from lightning_compress.distillation.fit import comparison, load_learnt
from lightning_compress.distillation.own_metrics import OwnMetrics
from lightning_compress.distillation.pairs import LayerPair
from lightning_compress.distillation.schedule import Course, Ramp, Value, check_value
from lightning_compress.distillation.seen import Seen, collect
from lightning_compress.distillation.taps import Keep, Record, Taps, split_spec
from lightning_compress.distillation.teacher import Answer, Question, Teacher
from lightning_compress.distillation.teachers import as_teacher
from lightning_compress.distillation.terms import Losses, Objective, Term, as_terms, find_target


class Distiller:
    """The teacher, the terms and everything that is learnt beside the student.

    Args:
        teacher: What :func:`~lightning_compress.distillation.as_teacher` takes, or ``None`` if no loss looks at one.
        losses: What is compared.
        temperature: Of the losses that soften; above 0.
        task_weight: Of the student's own loss; at least 0.
        student_output: The submodule that gives the student's output; ``""`` for the module itself, ``"net:1"`` or
            ``":1"`` for one of several outputs.
        target: Where the labels lie in a batch, for losses that look at them.

    Raises:
        ConfigurationError: For values out of range, or losses that need a teacher where there is none.
    """

    def __init__(
        self,
        teacher: Any,
        losses: Losses,
        temperature: Value = 4.0,
        task_weight: Value = 1.0,
        student_output: str = "",
        target: int | str | None = None,
    ) -> None:
        self.terms = as_terms(losses)
        self.temperature = check_value(temperature, "temperature", above=0)
        self.task_weight = check_value(task_weight, "task_weight")
        self.student_output, self.output_key = split_spec(student_output)
        self.target, self.element = target, ""  # the latter tells which part of several outputs is compared
        if teacher is None and any(term.loss.uses_teacher for term in self.terms.values()):
            raise ConfigurationError("`teacher` is None, but the losses compare with one; give a module, path or list")
        self._given = teacher
        self.teacher: Teacher | None = None
        self.pairs: dict[str, tuple[LayerPair, ...]] = {}
        self.adapters: dict[str, Adapters] = {}
        self.courses: dict[int, Course] = {}
        self.updates = 0
        self.ready = False
        self.heard = False  # whether a backward pass came by, in this fit
        self._looked = False  # at an answer of the teacher, in this fit
        self._print: str | None = None  # of the teacher, which never changes
        self._taps, self._output_tap = Taps(()), Taps([self.student_output], inputs_of=[self.student_output])
        self.own_metrics = OwnMetrics()
        self._student: weakref.ref[nn.Module] | None = None

    @property
    def output_spec(self) -> str:
        """The student's output as the user named it: ``"path"`` or ``"path:key"``."""
        return f"{self.student_output}:{self.output_key}" if self.output_key else self.student_output

    # ------------------------------------------------------------------ before training

    def take_teacher(self, student: nn.Module, given: Any = None) -> None:
        """Settle who the teacher is, once; ``given`` comes in place of what the constructor was told.

        Raises:
            ConfigurationError: If it shares parameters with the student.
        """
        wanted = self._given if given is None else given
        if self.teacher is not None or wanted is None:
            return
        self.teacher = as_teacher(wanted, student, self.output_spec)

    def prepare(self, student: nn.Module, example_inputs: Callable[[], Any]) -> None:
        """Match layers, run both models on one batch, check every shape and build the adapters.

        Args:
            student: In any mode, which it keeps, on the teacher's device.
            example_inputs: Gives the inputs of the student's forward; called if they are needed.

        Raises:
            ConfigurationError: If a layer does not exist or two shapes cannot be matched; names both layers.
        """
        check_output(student, self.student_output)
        self.pairs = match_terms(self.terms, student, self.teacher)
        wanted = [split_spec(pair.student)[0] for pairs in self.pairs.values() for pair in pairs]
        self._taps = Taps([self.student_output, *wanted], inputs_of=[self.student_output])
        self.ready, self._looked = True, False
        if not self.pairs or self.adapters:
            return
        seen, answer = run_example(self, student, example_inputs())
        self.adapters = build_adapters(self.terms, self.pairs, seen, answer)

    def plan(self, title: str) -> str:
        """Return what will be compared, as text."""
        return plan_of(self, title)

    def resolve(self, horizon: Horizon, clamp: bool = False) -> None:
        """Turn ramps into courses of a run of a given length."""
        values = [self.temperature, self.task_weight]
        for term in self.terms.values():
            values += [term.weight, self.temperature if term.temperature is None else term.temperature]
        self.courses = {id(value): value.resolve(horizon, clamp) for value in values if isinstance(value, Ramp)}

    def begin(self, student: nn.Module, position: int) -> None:
        """Begin a fit: from scratch where the trainer does, and with nothing of another student's.

        Args:
            student: Who is trained.
            position: The trainer's own count of steps.
        """
        known = self._student() if self._student is not None else None
        if known is not None and known is not student:
            self.teacher, self.adapters, self._print = None, {}, None
        if position == 0:
            self.updates = 0
        self.heard = False
        self._student = weakref.ref(student)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what cannot be copied."""
        return {**self.__dict__, "_student": None}

    def rest(self) -> None:
        """Forget the run; what is learnt stays."""
        self.ready, self.courses = False, {}
        self._output_tap.forget()
        self.own_metrics.forget()

    # ------------------------------------------------------------------ while training

    def now(self, value: Value) -> float:
        """Return what a constant or ramp is at present."""
        if not isinstance(value, Ramp):
            return value
        course = self.courses.get(id(value))
        return value.begin if course is None else course(self.updates)

    def watch(
        self, student: nn.Module, with_graph: bool = True, keep: Keep | None = None
    ) -> AbstractContextManager[Record]:
        """Record what the student's tapped layers return inside the block; arguments as in :meth:`Taps.watch`."""
        return self._taps.watch(student, with_graph, keep)

    def watch_output(self, student: nn.Module) -> AbstractContextManager[Record]:
        """Record what the student returns on data that it does not learn from."""
        return self._output_tap.watch(student)

    def collect(self, record: Record) -> tuple[Seen, ...]:
        """Return one entry for each run of the student, with the tensors that the losses look at."""
        return collect(record, self.student_output, self.pairs, self.output_key)

    def split(self, batch: Any) -> tuple[Any, Any]:
        """Return the batch as the student's ``training_step`` wants it, and what the teacher needs out of it."""
        batch, stored = take_cached(batch)
        if stored is None:
            refuse_cached(batch, NESTED)
        own, extra = (batch, None) if self.teacher is None else self.teacher.split(batch)
        return own, extra if stored is None else Answer(stored)

    def ask(
        self, seen: Seen, batch: Any, batch_idx: int, extra: Any, training: bool = True, every: bool = False
    ) -> Answer | None:
        """Ask the teacher about one run of the student, if a loss wants to know; ``every``: also one of weight 0."""
        layers: tuple[str, ...] = ()
        if training:
            taught = [name for name, term in self.terms.items() if term.loss.uses_teacher]
            active = [name for name in taught if every or self.now(self.terms[name].weight) > 0]
            if not active:
                return None
            layers = tuple(
                dict.fromkeys(split_spec(pair.teacher)[0] for name in active for pair in self.pairs.get(name, ()))
            )
        if isinstance(extra, Answer) and not layers:
            return extra
        if self.teacher is None:
            return None
        with torch.no_grad():
            question = Question(seen.args, seen.kwargs, batch, batch_idx, extra, layers, training)
            return self.teacher.answer(question) if self._looked else first_answer(self.teacher, question)

    def objective_of(self, record: Record, batch: Any, batch_idx: int, extra: Any) -> Objective | None:
        """Return the objective over all runs of the student in one step, their mean; ``None`` if no run has a gradient.

        Raises:
            ConfigurationError: If the student's output was not seen.
        """
        if not record[self.student_output]:
            raise ConfigurationError(
                f"`student_output` is {self.student_output!r}, which did not run in the student's training_step: it "
                'calls something else than this; name the submodule it calls, such as student_output="net"'
            )
        runs = [seen for seen in self.collect(record) if seen.output.requires_grad]
        if not runs:
            return None
        answers = [self.ask(seen, batch, batch_idx, extra) for seen in runs]
        if not self._looked and answers[0] is not None:
            check_answer(self.terms, runs[0].output, answers[0], str(self.teacher))
            self._looked = True
        found = [self.objective(seen, answer, batch) for seen, answer in zip(runs, answers, strict=True)]
        if len(found) == 1:
            return found[0]
        parts = {name: torch.stack([one.parts[name] for one in found]).mean() for name in found[0].parts}
        return Objective(torch.stack([one.total for one in found]).mean(), parts)

    def compare(self, record: Record, batch: Any, batch_idx: int) -> tuple[dict[str, Tensor], int]:
        """Return how student and teacher compare on a batch of validation or test data, and the batch's size.

        Args:
            record: Of :meth:`watch_output`.
            batch: What the step got.
            batch_idx: Its number.

        Raises:
            ConfigurationError: If the teacher's output is not finite.
        """
        runs = collect(record, self.student_output, {}, self.output_key)
        if runs and self.teacher is not None and not self.ready:
            self.teacher = self.teacher.to(runs[0].output.device)
        answer = self.ask(runs[0], batch, batch_idx, None, training=False) if len(runs) == 1 else None
        if answer is None:
            return {}, 0
        output = runs[0].output
        check_answer(self.terms, output, answer, str(self.teacher), shapes=not self._looked)
        dims = [term.loss.class_dim for term in self.terms.values() if term.loss.on == "output"]
        target = find_target(batch, self.target)
        return comparison(output, answer.output.to(output.device), target, *dims[:1]), output.shape[0]

    def objective(self, seen: Seen, answer: Answer | None, batch: Any) -> Objective:
        """Return the weighted sum of all losses for one run of the student."""
        target = find_target(batch, self.target)
        parts: dict[str, Tensor] = {}
        shares: list[Tensor] = []
        for name, term in self.terms.items():
            weight = self.now(term.weight)
            if weight > 0:
                value = self._value(name, term, seen, answer, target)
                parts[name] = value.detach()
                shares.append(value if weight == 1 else weight * value)
        total = sum(shares[1:], shares[0]) if shares else torch.zeros((), device=seen.output.device)
        return Objective(total, parts)

    def _value(self, name: str, term: Term, seen: Seen, answer: Answer | None, target: Tensor | None) -> Tensor:
        temperature = self.now(self.temperature if term.temperature is None else term.temperature)
        if term.loss.on == "output":
            if answer is None or not term.loss.uses_teacher:
                return term.loss(seen.heads, (), target, temperature)
            return term.loss(seen.output, answer.output.to(seen.output.device), target, temperature)
        pairs = self.pairs[name]
        ours = seen.features_of([pair.student for pair in pairs])
        theirs = ours if not term.loss.uses_teacher else seen.partners(pairs, answer)
        if name in self.adapters:
            ours, theirs = self.adapters[name](ours, theirs)
        return term.loss(ours, theirs, target, temperature)

    # ------------------------------------------------------------------ what is learnt beside the student

    def modules(self) -> dict[str, nn.Module]:
        """Return losses and adapters by name, as far as they hold anything."""
        found: dict[str, nn.Module] = {f"loss.{name}": term.loss for name, term in self.terms.items()}
        found |= {f"adapter.{name}": adapter for name, adapter in self.adapters.items()}
        return {name: module for name, module in found.items() if module.state_dict()}

    def parameters(self) -> list[nn.Parameter]:
        """Return what an optimizer must train beside the student."""
        return [p for module in self.modules().values() for p in module.parameters() if p.requires_grad]

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """Move teacher, losses and adapters to a device, the last to the student's precision; look up layers anew."""
        self._taps.forget()
        self._output_tap.forget()
        if self.teacher is not None:
            self.teacher = self.teacher.to(device)
        for term in self.terms.values():
            term.loss.to(device)
        for adapter in self.adapters.values():
            adapter.to(device=device, dtype=dtype)

    def state_dict(self) -> dict[str, Any]:
        """Return position, adapters, buffers of losses and the teacher's fingerprint: tensors and builtins."""
        learnt = {name: dict(module.state_dict()) for name, module in self.modules().items()}
        return {"version": 1, "updates": self.updates, "learnt": learnt, "teacher": self._fingerprint()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned.

        Raises:
            ConfigurationError: If the losses or layers are others than those of the checkpoint, or the teacher is.
        """
        load_learnt(self.modules(), state)
        if state["teacher"] != self._fingerprint():
            raise ConfigurationError(
                "`teacher` is not the one the checkpoint was written with; resume with that one (a 'baseline' is the "
                "student at construction: load its weights before), or start a new fit from the checkpoint's weights"
            )
        self.updates = int(state["updates"])

    def _fingerprint(self) -> str:
        if self._print is None:
            self._print = "" if self.teacher is None else self.teacher.fingerprint()
        return self._print
