"""Exceptions to a selection: these layers to that amount."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.rules import build_rules
from lightning_compress.core.schedule import Schedule
from lightning_compress.core.select import Select
from lightning_compress.pruning.granularity import Granularity


@dataclass(frozen=True)
class Rule:
    """Prune the layers that match to an amount of their own, each by itself.

    Args:
        include: Patterns as in :class:`Select`; a single one needs no list.
        amount: Final sparsity of each of these layers, 0 (leave alone) to 1; it follows the schedule's progress.
        exclude: Patterns that must not match.
        types: Class names of layers, or classes; empty for all that can be pruned.

    Raises:
        ConfigurationError: If the amount is outside 0 to 1, or a pattern is malformed.

    >>> Rule(include="conv1", amount=0.34).include
    ('conv1',)
    """

    include: str | Sequence[str]
    amount: float
    exclude: str | Sequence[str] = ()
    types: str | type | Sequence[str | type] = ()

    def __post_init__(self) -> None:
        if isinstance(self.amount, bool) or not isinstance(self.amount, int | float) or not 0 <= self.amount <= 1:
            raise ConfigurationError(
                f"`amount` of a rule must be a number from 0 to 1, got {self.amount!r}; 90 % is written 0.9"
            )
        for name in ("include", "exclude", "types"):
            object.__setattr__(self, name, getattr(self.select, name))

    @property
    def select(self) -> Select:
        """The rule's patterns as a selection."""
        return Select(types=self.types, include=self.include, exclude=self.exclude)


def as_rules(rules: Mapping[str, Rule | Mapping[str, Any]] | None) -> dict[str, Rule]:
    """Return named rules, built from plain mappings where configs gave those.

    Raises:
        ConfigurationError: If a rule is neither a :class:`Rule` nor a mapping of its arguments; names the rule.

    >>> as_rules({"stem": {"include": ["conv1"], "amount": 0.5}})["stem"].amount
    0.5
    """
    return build_rules(rules, Rule, "amount")


def check_amounts(schedule: Schedule, rules: Mapping[str, Rule], floor: float, granularity: Granularity) -> None:
    """Refuse amounts that cannot be reached.

    Args:
        schedule: With the final amount of what no rule names.
        rules: With amounts of their own.
        floor: Least share that stays of every tensor.
        granularity: What is pruned as one; an N:M pattern has an amount of its own.

    Raises:
        ConfigurationError: If an amount contradicts the floor or the pattern, or would never be applied.

    >>> check_amounts(Schedule(0.5), {}, 0.01, Granularity("n:m", 2, 4))
    """
    amounts = {"final": schedule.final, **{f"amount of rule {k!r}": rule.amount for k, rule in rules.items()}}
    for name, amount in amounts.items():
        if 1 - amount < floor - 1e-9:
            raise ConfigurationError(
                f"`{name}` is {amount:g}, but `floor` keeps {floor:g} of every tensor; lower one of them"
            )
        if granularity.final is not None and amount != 0 and not math.isclose(amount, granularity.final):
            raise ConfigurationError(
                f"`{name}` is {amount:g}, but `granularity` {str(granularity)!r} removes exactly "
                f"{granularity.final:g}; write {granularity.final!r}"
            )
    idle = [name for name, rule in rules.items() if rule.amount > 0 and schedule.final == 0]
    if idle:
        raise ConfigurationError(
            f"`final` is 0, so rule {idle[0]!r}, which follows the schedule's progress, would never prune; give a "
            "`final` above 0 and put a rule with amount 0 for '*' before it, or name its layers in `select`"
        )
    if schedule.initial > schedule.final:
        raise ConfigurationError(
            f"`initial` ({schedule.initial:g}) is above `final` ({schedule.final:g}): pruning only grows"
        )
