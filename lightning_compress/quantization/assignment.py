"""Which layer gets which bits: general settings, rules for single layers, and more bits for the first and the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lightning_compress.core.errors import ConfigurationError, SelectionError
from lightning_compress.core.select import Select
from lightning_compress.quantization.affine import BITS, integer_bounds
from lightning_compress.quantization.build import build_quantizer
from lightning_compress.quantization.spec import ACTIVATION, FIXED, WEIGHT, QuantizerSpec, as_spec

SpecLike = QuantizerSpec | Mapping[str, Any] | int | None
"""What a user may write for a quantizer: bits, some arguments of a spec, a spec, or ``None`` for float."""

SAME = "same"
"""Of a rule: as all other layers."""


@dataclass(frozen=True)
class QuantizationRule:
    """Quantize the layers that match in another way.

    Args:
        include: Patterns as in :class:`Select`; a single one needs no list.
        weights: Bits, arguments that differ from the general ones, or ``None`` for float; ``"same"`` by default.
        activations: The same for what these layers compute from.
        exclude: Patterns that must not match.
        types: Class names of layers, or classes.

    Raises:
        ConfigurationError: If it changes nothing, or a pattern is malformed.

    >>> QuantizationRule("conv1", weights=8).include
    ('conv1',)
    """

    include: str | Sequence[str]
    weights: SpecLike | str = SAME
    activations: SpecLike | str = SAME
    exclude: str | Sequence[str] = ()
    types: str | type | Sequence[str | type] = ()

    def __post_init__(self) -> None:
        for name in ("include", "exclude", "types"):
            object.__setattr__(self, name, getattr(self.select, name))
        if self.weights == SAME and self.activations == SAME:
            raise ConfigurationError("a rule must say something: give `weights`, `activations` or both")
        for name in ("weights", "activations"):
            if isinstance(getattr(self, name), str) and getattr(self, name) != SAME:
                raise ConfigurationError(f"`{name}` of a rule must be bits, a mapping, null or 'same'")

    @property
    def select(self) -> Select:
        """The rule's patterns as a selection."""
        return Select(types=self.types, include=self.include, exclude=self.exclude)


@dataclass(frozen=True)
class Assignment:
    """What a layer gets.

    Args:
        weights: Of its weights; ``None`` for float.
        activations: Of what it computes from; ``None`` for float.
        rule: The name of the rule that decided, ``"ends"``, or ``"select"``.
        least: Fewest bits that a search may give its weights; ``None`` if a rule has given them.
    """

    weights: QuantizerSpec | None
    activations: QuantizerSpec | None
    rule: str = "select"
    least: int | None = BITS[0]


@dataclass(frozen=True)
class Settings:
    """The general settings, and the exceptions.

    Args:
        weights: General spec of weights.
        activations: General spec of activations.
        rules: By name; the last that matches a layer wins.
        ends: Least bits of the first and the last layer; ``None`` treats them as the others.
    """

    weights: QuantizerSpec | None
    activations: QuantizerSpec | None
    rules: Mapping[str, QuantizationRule]
    ends: int | None

    def __post_init__(self) -> None:
        if self.ends is not None:
            try:
                integer_bounds(self.ends, symmetric=False)
            except ConfigurationError as error:
                raise ConfigurationError(f"`ends`: {error}, or null") from error
        for name, rule in {"": None, **self.rules}.items():
            where = f"rule {name!r}: " if name else ""
            try:
                general = Assignment(self.weights, self.activations)
                given = general if rule is None else _changed(general, rule, name)
                for spec, role in ((given.weights, "weight"), (given.activations, "input")):
                    if spec is not None and spec.range == FIXED:
                        raise ConfigurationError("`range` 'fixed' is what calibration leaves behind; write 'mse'")
                    if spec is not None:
                        build_quantizer(spec, role, 0, 1)
            except ConfigurationError as error:
                raise ConfigurationError(f"{where}{error}") from error

    def assign(self, root: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, Assignment]:
        """Return what each of the layers gets.

        Args:
            root: The model that rules are resolved on.
            layers: The selected layers by path, in registration order.

        Raises:
            SelectionError: If a rule matches no layer.
        """
        assigned = {path: Assignment(self.weights, self.activations) for path in layers}
        for path in {next(iter(layers)), list(layers)[-1]} if self.ends is not None else ():
            assigned[path] = _at_least(assigned[path], self.ends or 0)
        kinds = tuple({type(layer) for layer in layers.values()})
        for name, rule in self.rules.items():
            try:
                chosen = rule.select.resolve(root, kinds).layers
            except SelectionError as error:
                raise SelectionError(f"rule {name!r}: {error}") from error
            for path in chosen:
                if path in assigned:
                    assigned[path] = _changed(assigned[path], rule, name)
        return assigned


def make_settings(
    weights: SpecLike,
    activations: SpecLike,
    rules: Mapping[str, QuantizationRule],
    ends: int | None,
    defaults: tuple[QuantizerSpec, QuantizerSpec] = (WEIGHT, ACTIVATION),
) -> Settings:
    """Return settings from what a user wrote.

    Args:
        weights: General setting.
        activations: General setting.
        rules: By name.
        ends: Least bits of the first and the last layer, or ``None``.
        defaults: What holds for arguments of weights and activations that are not given.

    Raises:
        ConfigurationError: For values out of range, or if nothing is to be quantized.
    """
    chosen = as_spec(weights, defaults[0], "weights"), as_spec(activations, defaults[1], "activations")
    if chosen == (None, None) and not rules:
        raise ConfigurationError("`weights` and `activations` are both null, so nothing would be quantized")
    return Settings(*chosen, rules, ends)


def _changed(given: Assignment, rule: QuantizationRule, name: str) -> Assignment:
    weights, activations = given.weights, given.activations
    if rule.weights != SAME:
        weights = as_spec(rule.weights, weights or WEIGHT, "weights")
    if rule.activations != SAME:
        activations = as_spec(rule.activations, activations or ACTIVATION, "activations")
    return Assignment(weights, activations, name, given.least if rule.weights == SAME else None)


def _at_least(given: Assignment, bits: int) -> Assignment:
    specs = [
        spec and (spec if spec.bits >= bits else spec.with_bits(bits)) for spec in (given.weights, given.activations)
    ]
    changed = (given.weights, given.activations) != tuple(specs)
    return Assignment(specs[0], specs[1], "ends", bits) if changed else replace(given, least=bits)
