"""Exceptions to a selection: these layers to that amount."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lightning_compress.core.errors import ConfigurationError, did_you_mean
from lightning_compress.core.select import Select


@dataclass(frozen=True)
class Rule:
    """Prune the layers that match to an amount of their own, each by itself.

    Args:
        include: Patterns as in :class:`Select`.
        amount: Final sparsity of each of these layers, 0 (leave alone) to 1; it follows the schedule's progress.
        exclude: Patterns that must not match.
        types: Class names of layers; empty for all that can be pruned.

    Raises:
        ConfigurationError: If the amount is outside 0 to 1, or a pattern is malformed.

    >>> Rule(include="conv1", amount=0.34).include
    ('conv1',)
    """

    include: tuple[str, ...]
    amount: float
    exclude: tuple[str, ...] = ()
    types: tuple[str, ...] = ()

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
    if rules is not None and not isinstance(rules, Mapping):
        raise ConfigurationError(f"`rules` must be a mapping of names to rules, got {rules!r}")
    known = [field.name for field in fields(Rule)]
    built: dict[str, Rule] = {}
    for name, rule in (rules or {}).items():
        if isinstance(rule, Rule):
            built[str(name)] = rule
            continue
        if not isinstance(rule, Mapping):
            raise ConfigurationError(f"rule {name!r} must be a Rule or a mapping with {', '.join(known)}, got {rule!r}")
        for key in rule:
            if key not in known:
                raise ConfigurationError(f"rule {name!r} has no argument {key!r}: {did_you_mean(str(key), known)}")
        missing = [key for key in ("include", "amount") if key not in rule]
        if missing:
            raise ConfigurationError(f"rule {name!r} lacks `{missing[0]}`; give include and amount")
        try:
            built[str(name)] = Rule(**rule)
        except ConfigurationError as error:
            raise ConfigurationError(f"rule {name!r}: {error}") from error
    return built
