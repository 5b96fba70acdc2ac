"""The decision for one model: made once, alike in all processes, remembered."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.core.copies import full_copy
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.latency import LatencyGoal, agree, batch_of, many_processes, relative, time_models
from lightning_compress.core.paths import named_layers
from lightning_compress.low_rank.choice import divide, smallest
from lightning_compress.low_rank.decompose import Factorization, factorize
from lightning_compress.low_rank.factors import Factors
from lightning_compress.low_rank.goals import Goal
from lightning_compress.low_rank.moments import Moment
from lightning_compress.low_rank.planner import UNCALLED, Layers, choose_each, choose_for_goal, decision_of
from lightning_compress.low_rank.selection import takes_norm
from lightning_compress.low_rank.tables import Decision
from lightning_compress.low_rank.timing import inputs_of, measured, trial

_MOST_RANKS = 4
_TRIES = 4
_FIGURES = ("before_ms", "after_ms", "target_ms")


class RankSearch:
    """Chooses the ranks of a model.

    Args:
        goal: What the whole model should become; without one, ranks are given.
        factors: How layers are factorized.
        batches: Calibration data, or ``None``.

    Attributes:
        decisions: What becomes of each layer, once decided.
        figures: What was measured: milliseconds before and after.
        example: One batch, if any is known.
        moments: Of what each group of a layer sees, where factors are to keep the outputs.
        directions: Of each group of a layer, where factors follow from them.
    """

    def __init__(self, goal: Goal | None, factors: Factors, batches: Any = None) -> None:
        self.goal, self.factors, self.batches = goal, factors, batches
        self.decisions: dict[str, Decision] = {}
        self.figures: dict[str, float] = {}
        self.example: Any = None
        self.moments: dict[str, list[Moment]] = {}
        self.directions: dict[str, tuple[Tensor, ...]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what may be large and is found anew."""
        return {**self.__dict__, "example": None, "moments": {}, "directions": {}}

    def check(self, model: nn.Module, modules: Mapping[str, nn.Module], methods: Mapping[str, str]) -> None:
        """Raise a ConfigurationError if a goal is out of reach whatever the weights will be."""
        if self.goal is None or self.goal.latency is not None or (self.goal.kind == "macs" and self.example is None):
            return
        layers = self._layers(model, modules, methods)
        layers.look(self.example, None, 1)
        layers.fill(smallest_only=True)
        self._choose(layers)

    def decide(self, model: nn.Module, modules: Mapping[str, nn.Module], methods: Mapping[str, str]) -> None:
        """Choose the ranks of the layers.

        Raises:
            ConfigurationError: If a rank does not fit, or the goal cannot be reached.
        """
        layers = self._layers(model, modules, methods)
        layers.look(self.example, self.batches, self.factors.samples)
        layers.fill()
        self.decisions = _agreed(self._choose(layers))
        self.moments = {path: seen.moments for path, seen in layers.seen.items() if seen.moments}
        self.directions = {path: table.directions for path, table in layers.tables.items()}
        if self.goal is not None and self.goal.latency is not None:
            self.figures = dict(zip(_FIGURES, agree([self.figures.get(name, 0.0) for name in _FIGURES]), strict=True))

    def factorize(self, path: str, layer: nn.Module, batch_norm: bool) -> Factorization:
        """Return the factors that were decided for."""
        decision, moments = self.decisions[path], self.moments.get(path)
        known = self.directions.get(path, ())
        found = factorize(layer, decision.method, decision.ranks, batch_norm, moments, directions=known)
        return of_the_first(found) if self.moments else found

    def forget(self) -> None:
        """Let go of what was only needed to find the factors."""
        self.moments, self.directions = {}, {}

    def made(self, model: nn.Module) -> bool:
        """Return whether a model has the factors that were decided for, at the same places."""
        layers = named_layers(model)
        wanted = {path: decision.ranks for path, decision in self.decisions.items() if decision.ranks}
        there = {path: getattr(layers[path], "ranks", ()) for path in wanted if path in layers}
        return bool(wanted) and there == wanted and all(path in layers for path in self.decisions)

    def measure(self, models: Sequence[nn.Module], inputs: Any, seconds: float) -> list[list[float]]:
        """Return milliseconds of each model in every round."""
        goal = self.goal.latency if self.goal is not None else None
        return time_models(models, inputs, 1 if goal is None else goal.threads, seconds)

    def values(self) -> dict[str, Tensor]:
        """Return what was measured as tensors, for a checkpoint."""
        return {f"figure:{name}": torch.tensor(value, dtype=torch.float64) for name, value in self.figures.items()}

    def load_values(self, values: Mapping[str, Tensor]) -> None:
        """Take what was measured from a checkpoint."""
        self.figures = {key.removeprefix("figure:"): float(value) for key, value in values.items()}

    def _layers(self, model: nn.Module, modules: Mapping[str, nn.Module], methods: Mapping[str, str]) -> Layers:
        return Layers(model, modules, methods, self.factors.of(model, list(modules)))

    def _choose(self, layers: Layers) -> dict[str, Decision]:
        given = [path for path, how in layers.settings.items() if how.rank is not None]
        named = [path for path in given if layers.settings[path].rank != self.factors.rank]
        found = choose_each(layers, given, named)
        free = [path for path in layers.modules if path not in found]
        if self.goal is None:
            return found | {path: Decision(layers.methods[path], (), "no rule gives it a rank") for path in free}
        if self.goal.latency is not None:
            return found | self._for_latency(layers, free, found, self.goal.latency)
        return found | choose_for_goal(layers, free, found, self.goal, self.factors.favor)

    def _for_latency(
        self, layers: Layers, free: Sequence[str], given: Mapping[str, Decision], goal: LatencyGoal
    ) -> dict[str, Decision]:
        """Choose the ranks that lose least while the model is fast enough, and measure the whole of it again."""
        if layers.example is None:
            raise ConfigurationError(
                "`latency` is measured: pass `example_inputs`, `batches`, or set `example_input_array`"
            )
        if many_processes() and torch.distributed.get_rank():
            return {path: Decision(layers.methods[path]) for path in free}  # the first process measures for all
        inputs = batch_of(layers.example, goal.batch)
        norms = {p: layers.settings[p].batch_norm and takes_norm(m) for p, m in layers.modules.items()}
        tables = {path: layers.tables[path] for path in free if not layers.uncalled(path)}
        seen = inputs_of(layers.model, list(tables), inputs)
        timed = measured(tables, layers.modules, seen, norms, self.measure, goal.seconds / 2)
        whole, start = self._times(layers.model, dict(given), norms, inputs, goal)
        rest = start - sum(float(table.time[-1]) for table in timed.values())
        target = whole * goal.share if goal.share is not None else float(goal.ms or 0.0)
        least = max(0.0, rest) + smallest(list(timed.values()), "time")
        budget, chosen = target - rest, {}
        for _ in range(_TRIES):
            picks = divide(list(timed.values()), "time", budget)
            if picks is None:
                break
            chosen = {t.path: decision_of(t, pick, "latency") for t, pick in zip(timed.values(), picks, strict=True)}
            whole, after = self._times(layers.model, {**given, **chosen}, norms, inputs, goal)
            self.figures = dict(zip(_FIGURES, (whole, after, target), strict=True))
            if after <= target:
                break
            budget -= 1.1 * (after - target)
        if not chosen:
            raise ConfigurationError(
                f"`latency` asks for {goal}; {type(layers.model).__name__} takes {whole:.3g} ms now and about "
                f"{least:.3g} ms at the smallest ranks; ask for less, or look for what else takes the time"
            )
        return chosen | {path: Decision(layers.methods[path], (), UNCALLED) for path in free if path not in chosen}

    def _times(
        self,
        model: nn.Module,
        decisions: dict[str, Decision],
        norms: Mapping[str, bool],
        inputs: Any,
        goal: LatencyGoal,
    ) -> tuple[float, float]:
        rounds = self.measure([full_copy(model), trial(model, decisions, norms)], inputs, goal.seconds / (2 * _TRIES))
        before = statistics.median(rounds[0])
        return before, before * relative(rounds[1], rounds[0])


@torch.no_grad()
def of_the_first(found: Factorization) -> Factorization:
    """Return the first process's factors, which may have been fitted to other data."""
    if not many_processes():
        return found
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    for parameter in found.module.parameters():
        sent = parameter.detach().to(device)
        torch.distributed.broadcast(sent, 0)
        parameter.copy_(sent)
    known = found.output_error is not None
    error, lost = agree([found.error, found.output_error or 0.0])
    return replace(found, error=error, output_error=lost if known else None)


def _agreed(decisions: dict[str, Decision]) -> dict[str, Decision]:
    """Return the first process's ranks, which may have seen other data."""
    if not many_processes():
        return decisions
    flat = [float(rank) for d in decisions.values() for rank in (*d.ranks, *(0,) * (_MOST_RANKS - len(d.ranks)))]
    flat = agree(flat)
    ranks = [tuple(int(r) for r in flat[i : i + _MOST_RANKS] if r) for i in range(0, len(flat), _MOST_RANKS)]
    return {
        path: replace(one, ranks=mine, why="" if mine else one.why or "the first process leaves it")
        for (path, one), mine in zip(decisions.items(), ranks, strict=True)
    }
