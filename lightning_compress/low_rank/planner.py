"""The ranks of a whole model: what layers see, their candidates, and a goal or rules to choose by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import nn

from lightning_compress.core.calibration import calibration_batches, run_on
from lightning_compress.core.cost import count_macs, count_parameters
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.finite import not_finite, require_finite_weights
from lightning_compress.core.first_look import check_first_batch
from lightning_compress.core.inputs import inputs_of
from lightning_compress.core.isolation import batch_size_of, call, same_randomness
from lightning_compress.core.progress import slow
from lightning_compress.low_rank.choice import divide, grows, own_ranks, smallest
from lightning_compress.low_rank.decompose import weighs_outputs
from lightning_compress.low_rank.factors import Factors
from lightning_compress.low_rank.goals import Goal
from lightning_compress.low_rank.layers import shape_now
from lightning_compress.low_rank.looking import Seen, look
from lightning_compress.low_rank.selection import takes_norm
from lightning_compress.low_rank.tables import Decision, Table, in_steps, table_of


@dataclass
class Layers:
    """The layers of a model that can be factorized, and everything that is known about them.

    Attributes:
        model: The whole model.
        modules: The layers by path.
        methods: The method for each.
        settings: What holds for each.
        seen: What each saw; empty if the model could not be run.
        tables: The candidates of each.
        asked: Whether the model was run, so that a layer that saw nothing is one that is never called.
        example: One batch, if there is any.
    """

    model: nn.Module
    modules: Mapping[str, nn.Module]
    methods: Mapping[str, str]
    settings: Mapping[str, Factors]
    seen: dict[str, Seen] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)
    asked: bool = False
    example: Any = None

    def look(self, example: Any, batches: Any, samples: int) -> None:
        """Run the model on calibration batches, or else on an example, if there are any."""
        self.example = example
        if batches is not None:
            check_first_batch(self.model, batches)
            with same_randomness():
                data = list(calibration_batches(batches, samples))
            self.example = inputs_of(self.model, data[0]) if example is None else example
            gather = [path for path in self.modules if self._keeps_outputs(path)]
            self.seen = look(self.model, self.modules, data, run_on, -(-samples // len(data)), gather)
        elif example is not None:
            self.seen = look(self.model, self.modules, [example], call)
        self.asked = batches is not None or example is not None

    def fill(self, smallest_only: bool = False) -> None:
        """Find the candidates of every layer, or only the smallest of each, which takes no time."""
        for path, layer in slow(self.modules.items(), "Weighing ranks"):
            seen, how = self.seen.get(path, Seen()), self.settings[path]
            require_finite_weights(path, layer)
            if not seen.finite:
                raise not_finite(path)
            norm = how.batch_norm and takes_norm(layer)
            table = table_of(path, layer, self.methods[path], seen.sizes, seen.rows, norm, smallest_only, seen.moments)
            self.tables[path] = in_steps(table, shape_now(layer).groups, how.round_to)
            seen.rows = None

    def _keeps_outputs(self, path: str) -> bool:
        how, layer = self.settings[path], self.modules[path]
        return how.keep == "outputs" and weighs_outputs(shape_now(layer), self.methods[path])

    def uncalled(self, path: str) -> bool:
        """Return whether the model was run and did not call a layer."""
        return self.asked and path not in self.seen


def choose_each(layers: Layers, paths: Sequence[str], named: Sequence[str]) -> dict[str, Decision]:
    """Return what rules for single layers make of some of them.

    Args:
        layers: The layers of a model.
        paths: Which of them.
        named: Those whose rank was given for them alone.
    """
    found: dict[str, Decision] = {}
    for path in paths:
        layer, method, how = layers.modules[path], layers.methods[path], layers.settings[path]
        decision = own_ranks(path, layer, method, how, layers.tables[path], path in named)
        if decision.ranks:
            sizes = layers.seen[path].sizes if path in layers.seen else ()
            why = grows(layer, method, decision.ranks, sizes, how.batch_norm and takes_norm(layer))
            decision = Decision(method, (), why) if why else _with_error(decision, layers.tables[path])
        if layers.uncalled(path):
            decision = Decision(method, (), UNCALLED)
        found[path] = decision
    return found


def _with_error(decision: Decision, table: Table) -> Decision:
    known = [error for ranks, error in zip(table.ranks, table.error, strict=True) if ranks == decision.ranks]
    return replace(decision, error=float(known[0]) ** 0.5) if known else decision


def choose_for_goal(
    layers: Layers,
    paths: Sequence[str],
    decided: Mapping[str, Decision],
    goal: Goal,
    favor: str,
) -> dict[str, Decision]:
    """Divide a goal over layers.

    Args:
        layers: The layers of a model.
        paths: Those that take part.
        decided: What becomes of others.
        goal: Of parameters or operations.
        favor: See :class:`~lightning_compress.low_rank.factors.Factors`.

    Raises:
        ConfigurationError: If the goal cannot be reached; says what can.
    """
    column = goal.column
    tables = [layers.tables[path] for path in paths if not layers.uncalled(path)]
    whole = count_whole(layers.model, goal.kind, layers.example)
    own = sum(float(getattr(table, column)[-1]) for table in tables)
    saved = sum(_saved(layers, path, decision, column) for path, decision in decided.items())
    rest = whole - own - saved
    wanted = whole / goal.value if goal.kind == "compression_rate" else whole * goal.value
    picks = divide(tables, column, wanted - rest, favor if all(layers.seen) and layers.seen else "accuracy")
    if picks is None:
        least = rest + smallest(tables, column)
        raise ConfigurationError(_unreachable(goal, whole, least, tables))
    found = {table.path: decision_of(table, pick, goal.kind) for table, pick in zip(tables, picks, strict=True)}
    return found | {path: Decision(layers.methods[path], (), UNCALLED) for path in paths if layers.uncalled(path)}


def count_whole(model: nn.Module, goal: str, example: Any) -> float:
    """Return the parameters of a model, or its operations for one sample.

    Raises:
        ConfigurationError: If the operations cannot be counted.
    """
    if goal == "compression_rate":
        return float(count_parameters(model).total)
    if example is None:
        raise ConfigurationError(
            "`macs` needs to know the sizes of inputs: pass `example_inputs`, `batches`, or set `example_input_array`"
        )
    counted = count_macs(model, example)
    if counted.total is None:
        raise ConfigurationError(
            f"`macs`: the operations of {type(model).__name__} cannot be counted: {counted.reason}"
        )
    return counted.total / (batch_size_of(example) or 1)


def _saved(layers: Layers, path: str, decision: Decision, column: str) -> float:
    """Return what a layer that takes no part in the division saves."""
    table = layers.tables[path]
    values = getattr(table, column)
    if not decision.ranks:
        return 0.0
    near = [abs(sum(ranks) - sum(decision.ranks)) if ranks else np.inf for ranks in table.ranks]
    return float(values[-1] - values[int(np.argmin(near))])


def decision_of(table: Table, pick: int, goal: str) -> Decision:
    """Return what a candidate means for its layer."""
    if pick < len(table.ranks) - 1:
        return Decision(table.method, table.ranks[pick], error=float(table.error[pick]) ** 0.5)
    return Decision(table.method, (), table.why or f"the goal for `{goal}` is met without it")


def _unreachable(goal: Goal, whole: float, least: float, tables: Sequence[Table]) -> str:
    stay = [f"{table.path}: {table.why}" for table in tables if table.why]
    hint = f" ({'; '.join(stay[:4])})" if stay else ""
    rate = goal.kind == "compression_rate"
    best = f"{whole / least:.4g} times at most" if rate else f"{least / whole:.4g} at least"
    return (
        f"`{goal.kind}` asks for {goal}; the selected layers allow {best}{hint}. Ask for less, select more layers, or "
        "choose another method"
    )


UNCALLED = "the model does not call it when it runs"
