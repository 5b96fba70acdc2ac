"""How layers are factorized: the method, local ranks, multiples, and exceptions for named layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_compress.core.errors import ConfigurationError, SelectionError, did_you_mean
from lightning_compress.core.mapping import from_mapping
from lightning_compress.core.rules import build_rules
from lightning_compress.core.select import Select
from lightning_compress.low_rank.methods import METHODS

Rank = int | tuple[int, ...] | str | Mapping[str, float]
FAVORS = ("speed", "accuracy")
KEEP = ("weights", "outputs")
WORDS = ("evbmf",)
"""Ranks that are words: ``"evbmf"`` asks variational Bayes."""


@dataclass(frozen=True)
class FactorRule:
    """An exception for some layers; what is ``None`` stays as it is for all.

    Args:
        include: Patterns as in :class:`~lightning_compress.Select`.
        method: Name of a method.
        rank: As in :class:`Factors`; these layers take no part in a goal's division, but count.
        round_to: Multiples of so many.
        exclude: Patterns that must not match.

    Raises:
        ConfigurationError: For a value outside its range, or a rule that says nothing.

    >>> FactorRule("classifier.*", rank=64).include
    ('classifier.*',)
    """

    include: str | Sequence[str]
    method: str | None = None
    rank: Rank | Sequence[int] | None = None
    round_to: int | None = None
    exclude: str | Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.method is None and self.rank is None and self.round_to is None:
            raise ConfigurationError("a factor rule must give at least one of `method`, `rank` and `round_to`")
        _check(self.method or "auto", self.round_to or 1)
        object.__setattr__(self, "rank", as_rank(self.rank))
        for name in ("include", "exclude"):
            object.__setattr__(self, name, getattr(self.select, name))

    @property
    def select(self) -> Select:
        """The rule's patterns as a selection."""
        return Select(include=self.include, exclude=self.exclude)


@dataclass(frozen=True)
class Factors:
    """How layers are factorized.

    Args:
        method: ``"auto"`` (spatial SVD for kernels with two axes, else an SVD of channels), or the name of a method.
        rank: The ranks of every layer, if no goal decides: a whole number (or one for each rank of the method) for all
            layers alike, ``"evbmf"`` (what stands out of the noise), ``{"energy": 0.9}`` (share of the squared weights
            that is kept), ``{"ratio": 4.0}`` (how many times fewer parameters).
        round_to: Ranks are multiples of this, which fast kernels like (8 or 16), where layers are wide enough.
        batch_norm: Put a batch norm between the factors of convolutions (Tai et al. 2016): to train them on, or from
            scratch.
        favor: What a ``compression_rate`` does with freedom: ``"speed"`` makes the model as fast as the summed squared
            error of an equal share for every layer allows, with at least half of the signal that each layer lets
            through there; ``"accuracy"`` lets most of the signal through, whatever the time, which keeps far more of a
            trained network.
        keep: What factors are nearest to: the ``"weights"``, or the ``"outputs"`` on calibration ``batches``
            (activation-aware: the SVD of the weight whitened by what the layer sees, Wang et al. 2024; a second spatial
            kernel fitted to it). Of the calibration outputs no more is lost than otherwise; with few samples new data
            may lose more. Tucker, CP, trains, embeddings and transposed convolutions stay with the weights.
        samples: How many calibration samples are enough.
        rules: Exceptions by name: a :class:`FactorRule`, or a mapping of its arguments; the last that matches wins.

    Raises:
        ConfigurationError: For a value outside its range, or something that is not a rule; names it.

    >>> Factors(rank={"energy": 0.9}, rules={"head": {"include": "fc", "rank": 4}}).rules["head"].rank
    4
    """

    method: str = "auto"
    rank: Rank | Sequence[int] | None = None
    round_to: int = 1
    batch_norm: bool = False
    favor: str = "speed"
    keep: str = "weights"
    samples: int = 256
    rules: Mapping[str, FactorRule] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self.method, self.round_to)
        if self.favor not in FAVORS:
            raise ConfigurationError(f"`favor` is {self.favor!r}: {did_you_mean(str(self.favor), FAVORS)}")
        if self.keep not in KEEP:
            raise ConfigurationError(f"`keep` is {self.keep!r}: {did_you_mean(str(self.keep), KEEP)}")
        if not isinstance(self.batch_norm, bool):
            raise ConfigurationError(f"`batch_norm` must be true or false, got {self.batch_norm!r}")
        object.__setattr__(self, "rank", as_rank(self.rank))
        object.__setattr__(self, "rules", build_rules(self.rules, FactorRule, "include"))

    def of(self, model: nn.Module, paths: Sequence[str]) -> dict[str, Factors]:
        """Return what holds for each of some layers.

        Raises:
            SelectionError: If a rule matches no module, or only layers that are not among them.
        """
        found = dict.fromkeys(paths, self)
        for name, rule in self.rules.items():
            try:
                matched = rule.select.resolve(model).layers
            except SelectionError as error:
                raise SelectionError(f"rule {name!r} of `factors`: {error}") from error
            mine = [path for path in paths if path in matched]
            if not mine:
                raise SelectionError(
                    f"rule {name!r} of `factors` matches {', '.join(list(matched)[:4])}, which cannot be factorized or "
                    f"are not selected; what can be: {', '.join(list(paths)[:8]) or 'nothing'}"
                )
            for path in mine:
                found[path] = _refine(found[path], rule)
        return found


def _refine(factors: Factors, rule: FactorRule) -> Factors:
    return Factors(
        method=rule.method or factors.method,
        rank=factors.rank if rule.rank is None else rule.rank,
        round_to=rule.round_to or factors.round_to,
        batch_norm=factors.batch_norm,
        favor=factors.favor,
        keep=factors.keep,
        samples=factors.samples,
    )


def as_factors(factors: Factors | str | int | Mapping[str, Any] | None) -> Factors:
    """Return how to factorize, built from a method's name, a rank, or a plain mapping.

    >>> as_factors("channel_svd").method, as_factors(16).rank, as_factors("evbmf").rank
    ('channel_svd', 16, 'evbmf')
    """
    if isinstance(factors, str):
        return Factors(rank=factors) if factors in WORDS else Factors(method=factors)
    if isinstance(factors, int) and not isinstance(factors, bool):
        return Factors(rank=factors)
    given: Any = factors
    return from_mapping(Factors, given, "factors")


def as_rank(rank: Any) -> Rank | None:
    """Return a checked rank, with lists as tuples.

    >>> as_rank([8, 16]), as_rank({"ratio": 2})
    ((8, 16), {'ratio': 2})
    """
    if rank is None:
        return None
    if isinstance(rank, str):
        if rank not in WORDS:
            raise ConfigurationError(f"`rank` is {rank!r}: {did_you_mean(rank, (*WORDS, 'energy', 'ratio'))}")
        return rank
    if isinstance(rank, Mapping):
        return _share(rank)
    several = tuple(rank) if isinstance(rank, Sequence) else (rank,)
    if not several or any(isinstance(one, bool) or not isinstance(one, int) or one < 1 for one in several):
        raise ConfigurationError(
            f"`rank` must be a whole number >= 1 (or one for each rank of the method), 'evbmf', {{'energy': 0.9}} or "
            f"{{'ratio': 4.0}}; got {rank!r}"
        )
    return several if isinstance(rank, Sequence) else several[0]


def _share(rank: Mapping[str, Any]) -> Mapping[str, float]:
    kinds = ("energy", "ratio")
    if len(rank) != 1 or next(iter(rank)) not in kinds:
        raise ConfigurationError(f"`rank` as a mapping must have one key, 'energy' or 'ratio'; got {dict(rank)!r}")
    kind, value = next(iter(rank.items()))
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    if not numeric or (kind == "energy" and not 0 < value <= 1) or (kind == "ratio" and not value >= 1):
        allowed = "a share above 0 and at most 1" if kind == "energy" else "a number >= 1"
        raise ConfigurationError(f"`{kind}` of `rank` must be {allowed}, got {value!r}")
    return dict(rank)


def _check(method: str, round_to: int) -> None:
    if method not in ("auto", *METHODS):
        raise ConfigurationError(f"`method` is {method!r}: {did_you_mean(str(method), ('auto', *METHODS), limit=4)}")
    if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
        raise ConfigurationError(f"`round_to` must be an int >= 1, got {round_to!r}")
