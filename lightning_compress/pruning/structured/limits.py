"""How far each group of channels may be cut: a floor, multiples, and exceptions for named layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any

from torch import nn

from lightning_compress.core.errors import ConfigurationError, SelectionError
from lightning_compress.core.mapping import from_mapping
from lightning_compress.core.select import Select
from lightning_compress.pruning.structured.groups import ChannelGroup

_SUITED = ((16, 64), (8, 48), (4, 24), (1, 0))


@dataclass(frozen=True)
class Limit:
    """How far one group may be cut.

    Args:
        floor: Least share of its channels that stays; at least one channel does.
        round_to: What is kept is a multiple of this, where the group is wide enough; a group that loses none stays as
            it is.
        amount: Share of its channels that goes, whatever the ranking says; ``None`` lets the ranking decide.
        yields: Whether ``round_to`` gives way to a finer one, where it would take much more than was asked for.
    """

    floor: float = 0.1
    round_to: int = 1
    amount: float | None = None
    yields: bool = False

    def kept(self, channels: int, removed: int, down: bool = False) -> int:
        """Return how many of ``channels`` stay when ``removed`` should go, the multiple next to that or below.

        >>> Limit(0.1, 8).kept(64, 11), Limit(0.1, 8).kept(64, 11, down=True), Limit(0.5).kept(10, 9)
        (56, 48, 5)
        """
        if removed <= 0:
            return channels
        least = max(1, ceil(self.floor * channels - 1e-9))
        kept = max(channels - removed, least)
        step = self.round_to
        if step > 1:
            kept = max(step, (kept if down else kept + step // 2) // step * step)
            kept += step if kept < least else 0
        return min(channels, kept)

    def least(self, channels: int) -> int:
        """Return how many of ``channels`` stay when as many as possible go.

        >>> Limit(0.1).least(30), Limit(amount=0.25).least(8)
        (3, 6)
        """
        wanted = channels if self.amount is None else round(self.amount * channels)
        return (replace(self, round_to=1) if self.yields else self).kept(channels, wanted)


@dataclass(frozen=True)
class ChannelRule:
    """An exception for the groups of some layers; what is ``None`` stays as it is for all.

    Args:
        include: Patterns as in :class:`~lightning_compress.Select`; one layer of a group is enough.
        amount: Share of the channels that goes, 0 (keep all) to below 1; it follows the schedule's progress.
        floor: Least share that stays, 0 to below 1.
        round_to: Keep multiples of so many channels.
        exclude: Patterns that must not match.

    Raises:
        ConfigurationError: For a value outside its range, or a rule that says nothing.

    >>> ChannelRule("layer4", floor=0.5).include
    ('layer4',)
    """

    include: tuple[str, ...]
    amount: float | None = None
    floor: float | None = None
    round_to: int | None = None
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.amount is None and self.floor is None and self.round_to is None:
            raise ConfigurationError("a channel rule must give at least one of `amount`, `floor` and `round_to`")
        _check_share("amount", self.amount)
        _check_share("floor", self.floor)
        _check_step(self.round_to)
        for name in ("include", "exclude"):
            object.__setattr__(self, name, getattr(self.select, name))

    @property
    def select(self) -> Select:
        """The rule's patterns as a selection."""
        return Select(include=self.include, exclude=self.exclude)

    def refine(self, limit: Limit) -> Limit:
        """Return a limit with what this rule says in place.

        >>> ChannelRule("fc", round_to=8).refine(Limit(0.2))
        Limit(floor=0.2, round_to=8, amount=None, yields=False)
        """
        given = {name: getattr(self, name) for name in ("floor", "round_to", "amount")}
        yields = limit.yields and self.round_to is None
        return replace(limit, yields=yields, **{name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True)
class Limits:
    """How far the groups of a model may be cut.

    Args:
        floor: Least share of each group's channels that stays, 0 to below 1; at least one channel always does.
        round_to: Keep multiples of so many channels, which fast kernels like (8 or 16), where layers are wide enough;
            ``None`` takes what suits each group, see :func:`suited_multiple`, or finer ones where those would miss the
            goal by more than 3 %, and 1 allows any number.
        rules: Exceptions by name: a :class:`ChannelRule`, or a mapping of its arguments; the last that matches wins.

    Raises:
        ConfigurationError: For a value outside its range, or something that is not a rule; names it.

    >>> Limits(round_to=8, rules={"stem": {"include": "conv1", "amount": 0.0}}).rules["stem"].amount
    0.0
    """

    floor: float = 0.1
    round_to: int | None = None
    rules: Mapping[str, ChannelRule] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.floor is None:
            raise ConfigurationError("`floor` must be a number from 0 to below 1, got None")
        _check_share("floor", self.floor)
        _check_step(self.round_to)
        if self.rules is not None and not isinstance(self.rules, Mapping):
            raise ConfigurationError(f"`rules` must be a mapping of names to channel rules, got {self.rules!r}")
        built = {str(name): _rule(str(name), rule) for name, rule in (self.rules or {}).items()}
        object.__setattr__(self, "rules", built)

    def of(self, groups: tuple[ChannelGroup, ...], model: nn.Module) -> dict[str, Limit]:
        """Return the limit of each group.

        Raises:
            SelectionError: If a rule matches no layer, or only layers whose channels cannot be cut.
        """
        found = {group.name: self._limit(group) for group in groups}
        whole = dict(found)
        for name, rule in self.rules.items():
            try:
                matched = rule.select.resolve(model).layers
            except SelectionError as error:
                raise SelectionError(f"rule {name!r} of `limits`: {error}") from error
            mine = [group.name for group in groups if any(path in matched for path in group.producers)]
            if not mine and rule.amount != 0:
                raise SelectionError(
                    f"rule {name!r} of `limits` matches {', '.join(list(matched)[:4])}, whose channels cannot be cut; "
                    f"what can be cut: {', '.join(found) or 'nothing'}"
                )
            exact = rule.amount is not None and self.round_to is None  # a share that was asked for is no place to round
            found |= {group: rule.refine(Limit(self.floor) if exact else whole[group]) for group in mine}
        return found

    def _limit(self, group: ChannelGroup) -> Limit:
        if group.rebuilt is not None:  # heads are few
            return Limit(self.floor)
        if self.round_to is None:
            return Limit(self.floor, suited_multiple(group.channels), yields=True)
        return Limit(self.floor, self.round_to)


def suited_multiple(channels: int) -> int:
    """Return the multiple that a group of so many channels keeps: 16 from 64 on, 8 from 48 on, 4 from 24 on, else 1.

    Kernels work on up to 16 numbers at a time, so that channels beyond a multiple cost as much as a whole one more,
    while an eighth of a group more or less hardly matters to its task.

    >>> [suited_multiple(channels) for channels in (16, 24, 48, 64, 512)]
    [1, 4, 8, 16, 16]
    """
    return next(multiple for multiple, least in _SUITED if channels >= least)


def as_limits(limits: Limits | Mapping[str, Any] | None) -> Limits:
    """Return limits, built from a plain mapping where a config gave one.

    Raises:
        ConfigurationError: If it is neither, or has an unknown key.

    >>> as_limits({"round_to": 16})
    Limits(floor=0.1, round_to=16, rules={})
    """
    return from_mapping(Limits, limits, "limits")


def _rule(name: str, rule: ChannelRule | Mapping[str, Any]) -> ChannelRule:
    if rule is None or (isinstance(rule, Mapping) and "include" not in rule):
        raise ConfigurationError(f"rule {name!r} of `limits` lacks `include`, the patterns of its layers")
    try:
        return from_mapping(ChannelRule, rule, f"rules.{name}")
    except ConfigurationError as error:
        raise ConfigurationError(f"rule {name!r} of `limits`: {error}") from error


def _check_share(name: str, value: object) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1):
        raise ConfigurationError(f"`{name}` must be a number from 0 to below 1, got {value!r}")


def _check_step(value: object) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ConfigurationError(f"`round_to` must be an int >= 1, got {value!r}")
