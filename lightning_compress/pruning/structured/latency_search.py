"""Widths that make a model fast enough on this machine: searched for by measuring cut copies."""

from __future__ import annotations

import statistics
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn

from lightning_compress.core.copies import full_copy
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.isolation import device_of
from lightning_compress.core.latency import (
    LatencyGoal,
    agree,
    batch_of,
    clock_for,
    interpolate,
    many_processes,
    relative,
    time_models,
)
from lightning_compress.core.progress import slow
from lightning_compress.core.verbs import apply
from lightning_compress.pruning.structured.groups import ChannelGroup, slice_edits

Widths = dict[str, int]
_TRIES = 12
_CLOSE, _NEAR = 0.97, 0.85
_FASTER = 0.98
_MULTIPLES = (8, 16)


class LatencySearch:
    """Measures a model and cut copies, and remembers the widths it decided for, so that a resume measures nothing.

    A cut model's time does not depend on which channels are left, only on how many, so widths can be searched for
    before the channels are chosen. Times are always compared with the whole model's in the same rounds.

    Args:
        goal: What to reach.

    Attributes:
        widths: Channels that each group keeps, once decided.
        figures: What was measured: milliseconds before and after, shares, the multiple chosen.
    """

    def __init__(self, goal: LatencyGoal) -> None:
        self.goal = goal
        self.widths: Widths = {}
        self.figures: dict[str, float] = {}
        self._model: weakref.ref[nn.Module] | None = None
        self._inputs: Any = None
        self._spent = 0.0
        self._before: list[float] = []
        self._groups: tuple[ChannelGroup, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the model, so that callbacks pickle and deepcopy at any time."""
        return {**self.__dict__, "_model": None, "_inputs": None}

    @property
    def target(self) -> float:
        """The share of the whole model's latency that may remain."""
        return self.goal.share if self.goal.share is not None else (self.goal.ms or 0.0) / self.figures["before_ms"]

    def look(self, model: nn.Module, example_inputs: object, groups: Sequence[ChannelGroup], least: Widths) -> None:
        """Measure the model as it is and as narrow as it may become, unless a checkpoint knows the widths already.

        Raises:
            ConfigurationError: If even the narrowest model is too slow.
        """
        self._model, self._groups = weakref.ref(model), tuple(groups)
        self._inputs = batch_of(example_inputs, self.goal.batch)
        if self.widths:
            return
        (share,) = self._shares([least], self.goal.seconds / 10)
        self.figures["least_share"] = share
        if share > self.target:
            raise ConfigurationError(
                f"`latency` asks for {self.goal}; {type(model).__name__} takes {self.figures['before_ms']:.3g} ms now "
                f"and at least {share * self.figures['before_ms']:.3g} ms with what can be cut; lower `floor`, ask for "
                "less, or look for what else takes the time"
            )

    def solve(
        self,
        widths_at: Callable[[float, int], Widths],
        share_of: Callable[[Widths], float],
        least: float,
        step: int,
    ) -> None:
        """Find the widths that keep the most while the model is fast enough, once.

        The share of operations is narrowed down by measuring; then multiples of 8 and 16 are tried at equal operations,
        and kept if they are faster, which lets more operations stay. The last word has a longer measurement.

        Args:
            widths_at: Returns widths for a share of the operations and a multiple.
            share_of: Returns the share of the operations that widths have.
            least: The smallest share of the operations that can be had.
            step: Multiple that was asked for.
        """
        if self.widths:
            return
        whole = {group.name: group.channels for group in self._groups}
        if self.target >= 1:
            self.widths = whole
            self.figures |= {"after_share": 1.0, "round_to": float(step)}
            return
        with closing(cast(Any, slow(range(_TRIES), "Measuring latencies"))) as tries:
            share, low = self._narrow(tries, widths_at, step, (least, self.figures["least_share"]), 5)
            slope = (1 - low) / (1 - share) if share < 1 else 0.0
            found = {multiple: _try(widths_at, share, multiple) for multiple in self._steps(step)}
            usable = {multiple: widths for multiple, widths in found.items() if widths is not None}
            missing = {multiple: slope * (share - share_of(widths)) for multiple, widths in usable.items()}
            chosen = self._multiple(tries, usable, missing, step)
            if chosen != step:
                share, _ = self._narrow(tries, widths_at, chosen, (share, low), 4)
            self._verify(tries, widths_at, share, least, chosen)

    def describe(self) -> str:
        """Return what has been measured, in words."""
        now = self.figures.get("before_ms", 0.0)
        if "after_share" not in self.figures:
            return f"now {now:.3g} ms, at least {now * self.figures['least_share']:.3g} ms; goal {self.goal}"
        return f"{now:.3g} ms before, {now * self.figures['after_share']:.3g} ms after the cut; goal {self.goal}"

    def record(self) -> dict[str, Any]:
        """Return what was measured and how, for the journal."""
        before, share = self.figures["before_ms"], self.figures["after_share"]
        return {
            "latency_ms": [round(before, 4), round(before * share, 4)],
            "batch": self.goal.batch,
            "threads": self.goal.threads,
            "round_to": int(self.figures["round_to"]),
            "met": share <= self.target,
        }

    def values(self) -> dict[str, Tensor]:
        """Return the decision as tensors, for a checkpoint."""
        widths = {f"width:{name}": torch.tensor(width) for name, width in self.widths.items()}
        figures = {f"figure:{name}": torch.tensor(value, dtype=torch.float64) for name, value in self.figures.items()}
        return widths | figures if self.widths else {}

    def load_values(self, values: Mapping[str, Tensor]) -> None:
        """Take the decision from a checkpoint."""
        found = {kind: _after(values, f"{kind}:") for kind in ("width", "figure")}
        self.widths = {name: int(value) for name, value in found["width"].items()}
        self.figures = {name: float(value) for name, value in found["figure"].items()}

    def measure(self, models: Sequence[nn.Module], seconds: float) -> list[list[float]]:
        """Return milliseconds of each model in every round."""
        return time_models(models, self._inputs, self.goal.threads, seconds)

    def _narrow(
        self, tries: Any, widths_at: Callable[[float, int], Widths], step: int, low: tuple[float, float], most: int
    ) -> tuple[float, float]:
        """Return the largest share of operations found to be fast enough, and its share of the latency.

        What is far below the goal is never the last word while there are tries, however busy the machine is.
        """
        high = (1.0, 1.0)
        for turn, _ in enumerate(tries, 1):
            share = interpolate([low, high], _CLOSE * self.target)
            widths = _try(widths_at, share, step)
            if widths is None:
                break
            (taken,) = self._shares([widths], self.goal.seconds / (2 * _TRIES))
            if taken > self.target:
                high = (share, max(taken, low[1]))
            else:
                low = (share, taken)
            enough = turn >= most or self._spent > self.goal.seconds / 2
            if _CLOSE * self.target <= taken <= self.target or (enough and low[1] > _NEAR * self.target):
                break
        return low

    def _steps(self, step: int) -> list[int]:
        return [step, *(multiple for multiple in _MULTIPLES if multiple > step and multiple % step == 0)]

    def _multiple(self, tries: Any, usable: Mapping[int, Widths], missing: Mapping[int, float], step: int) -> int:
        """Return the multiple of channels that is fastest, had all the same operations: coarse ones have fewer."""
        if len(usable) < 2 or next(tries, None) is None:
            return step
        taken = dict(zip(usable, self._shares(list(usable.values()), self.goal.seconds / 6), strict=True))
        fair = {multiple: taken[multiple] + missing[multiple] for multiple in usable}
        best = min(fair, key=lambda multiple: fair[multiple])
        return best if fair[best] < _FASTER * fair.get(step, 1.0) else step

    def _verify(
        self, tries: Any, widths_at: Callable[[float, int], Widths], share: float, least: float, step: int
    ) -> None:
        """Measure longer, and cut more while that says the model is too slow."""
        widths = _try(widths_at, share, step) or widths_at(least, step)
        for attempt in range(4):
            (taken,) = self._shares([widths], self.goal.seconds / 8)
            self.widths = widths
            self.figures |= {"after_share": taken, "round_to": float(step), "operations": share}
            if taken <= self.target or attempt == 3 or self._spent > 2 * self.goal.seconds or next(tries, None) is None:
                return
            share = max(least, share * min(0.97, self.target / taken))
            widths = _try(widths_at, share, step) or widths

    def _shares(self, candidates: Sequence[Widths], seconds: float) -> list[float]:
        """Return the latency of each candidate over that of the whole model; the first process's count for all."""
        model = self._model() if self._model is not None else None
        if model is None:
            raise ConfigurationError("`latency` cannot be measured: this callback is a copy that has no model; fit it")
        clock = clock_for(device_of(model), self.goal.threads)
        start, found = clock(), [0.0] * (len(candidates) + 2)
        if not many_processes() or distributed.get_rank() == 0:
            times = self.measure([full_copy(model), *(self._cut(model, each) for each in candidates)], seconds)
            shares = [relative(each, times[0]) for each in times[1:]]
            found = [clock() - start, statistics.median(times[0]), *shares]
        spent, before, *shares = agree(found)
        self._spent += spent
        self._before.append(before)
        self.figures["before_ms"] = statistics.median(self._before)
        return shares

    def _cut(self, model: nn.Module, widths: Widths) -> nn.Module:
        copied = full_copy(model)
        cuts = {group.name: range(widths[group.name], group.channels) for group in self._groups}
        for edit in slice_edits(self._groups, cuts):
            apply(copied, edit)
        return copied


def _try(widths_at: Callable[[float, int], Widths], share: float, step: int) -> Widths | None:
    try:
        return widths_at(share, step)
    except ConfigurationError:  # the multiple is too coarse for so small a share
        return None


def _after(values: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
