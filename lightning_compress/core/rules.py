"""Named exceptions to a selection, of whatever kind a family needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar, cast

from lightning_compress.core.errors import ConfigurationError, did_you_mean

RuleT = TypeVar("RuleT")


def build_rules(
    rules: Mapping[str, RuleT | Mapping[str, Any]] | None, kind: type[RuleT], needed: str = ""
) -> dict[str, RuleT]:
    """Return named rules of any kind, built from plain mappings where configs gave those.

    Args:
        rules: By name.
        kind: A dataclass with ``include`` among its fields.
        needed: A field that every rule must give beside ``include``, if there is one.

    Raises:
        ConfigurationError: If a rule is neither of that kind nor a mapping of its arguments; names the rule.
    """
    if rules is not None and not isinstance(rules, Mapping):
        raise ConfigurationError(f"`rules` must be a mapping of names to rules, got {rules!r}")
    known = [field.name for field in fields(cast(Any, kind))]
    built: dict[str, RuleT] = {}
    for name, rule in (rules or {}).items():
        if isinstance(rule, kind):
            built[str(name)] = rule
            continue
        if not isinstance(rule, Mapping):
            raise ConfigurationError(
                f"rule {name!r} must be a {kind.__name__} or a mapping with {', '.join(known)}, got {rule!r}"
            )
        for key in rule:
            if key not in known:
                raise ConfigurationError(f"rule {name!r} has no argument {key!r}: {did_you_mean(str(key), known)}")
        required = ["include", needed] if needed else ["include"]
        missing = [key for key in required if key not in rule]
        if missing:
            raise ConfigurationError(f"rule {name!r} lacks `{missing[0]}`; give {' and '.join(required)}")
        try:
            built[str(name)] = kind(**rule)
        except ConfigurationError as error:
            raise ConfigurationError(f"rule {name!r}: {error}") from error
    return built
