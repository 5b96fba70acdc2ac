"""Which layer of the student learns from which layer of the teacher."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_compress.core.errors import ConfigurationError, did_you_mean
from lightning_compress.distillation.taps import split_spec

Pairs = str | Sequence[Any] | Mapping[str, str]
"""``"layer*"``, ``["layer1", "layer2"]``, ``[["a", "b"], ...]`` or ``{student: teacher, ...}``."""


@dataclass(frozen=True)
class LayerPair:
    """A tap of the student and one of the teacher, each ``"path"`` or ``"path:key"``."""

    student: str
    teacher: str

    def __str__(self) -> str:
        return self.student if self.student == self.teacher else f"{self.student} -> {self.teacher}"


def match_pairs(pairs: Pairs, student: Sequence[str], teacher: Sequence[str] | None) -> tuple[LayerPair, ...]:
    """Return the pairs that a shorthand means.

    ``*`` stands for any text without a dot. A teacher pattern with as many ``*`` as the student's gets the same text;
    otherwise both sides must match as many layers, which are paired in registration order.

    Args:
        pairs: One name or pattern for both sides, a list of them or of ``[student, teacher]``, or a mapping.
        student: Paths of the student's layers, in registration order.
        teacher: Those of the teacher; ``None`` if it is not looked at, and the teacher's side copies the student's.

    Raises:
        ConfigurationError: If a name or pattern matches nothing, or the two sides do not match as many layers.

    >>> [str(pair) for pair in match_pairs({"layer*": "stage*"}, ["layer1", "layer2"], ["stage1", "stage2", "fc"])]
    ['layer1 -> stage1', 'layer2 -> stage2']
    """
    found: list[LayerPair] = []
    for ours, theirs in _each(pairs):
        matched = _expand(ours, student, "student")
        specs = [spec for spec, _ in matched]
        partners = specs if teacher is None else _partners(theirs, matched, teacher)
        found += map(LayerPair, specs, partners)
    if not found:
        raise ConfigurationError("`pairs` is empty: name the layers to compare, such as {layer1: layer1} or 'layer*'")
    return tuple(found)


def _each(pairs: Any) -> Iterator[tuple[str, str]]:
    if isinstance(pairs, str):
        yield pairs, pairs
    elif isinstance(pairs, Mapping):
        for ours, theirs in pairs.items():
            if not isinstance(ours, str) or not isinstance(theirs, str):
                raise ConfigurationError(f"`pairs` must map layer names to layer names, got {ours!r}: {theirs!r}")
            yield ours, theirs
    elif isinstance(pairs, Sequence):
        for item in pairs:
            if isinstance(item, str):
                yield item, item
            elif isinstance(item, Sequence) and len(item) == 2 and all(isinstance(name, str) for name in item):
                yield item[0], item[1]
            else:
                raise ConfigurationError(
                    f"`pairs` must hold layer names or [student, teacher], got {item!r}; for example "
                    "['layer1', 'layer2'] or {'layer1': 'stage1'}"
                )
    else:
        raise ConfigurationError(f"`pairs` must be a name, a list or a mapping of layer names, got {pairs!r}")


def _expand(pattern: str, names: Sequence[str], side: str) -> list[tuple[str, tuple[str, ...]]]:
    """Return each layer that a pattern means, and what its ``*`` stand for."""
    path, key = split_spec(pattern)
    compiled = re.compile("([^.]*)".join(map(re.escape, path.split("*"))))
    matches = [(name, match.groups()) for name in names if (match := compiled.fullmatch(name))]
    if not matches:
        raise ConfigurationError(
            f"`pairs` names {pattern!r}, which is no layer of the {side}; {did_you_mean(path, names)}"
        )
    return [(_spec(name, key), groups) for name, groups in matches]


def _partners(pattern: str, matched: list[tuple[str, tuple[str, ...]]], names: Sequence[str]) -> list[str]:
    path, key = split_spec(pattern)
    if not names:
        raise ConfigurationError(
            "`pairs` compares layers, but this teacher gives only its output; use losses on the output, or a module "
            "as the teacher"
        )
    if "*" in path and path.count("*") == len(matched[0][1]):
        partners = []
        for spec, groups in matched:
            first, *others = path.split("*")
            name = first + "".join(text + other for text, other in zip(groups, others, strict=True))
            if name not in names:
                raise ConfigurationError(
                    f"`pairs`: the student's {spec!r} has no partner {name!r} in the teacher; "
                    f"{did_you_mean(name, names)} Name the pairs one by one where the two differ"
                )
            partners.append(_spec(name, key))
        return partners
    found = [spec for spec, _ in _expand(pattern, names, "teacher")]
    if len(found) != len(matched):
        raise ConfigurationError(
            f"`pairs`: the student's side means {len(matched)} layers ({_list(s for s, _ in matched)}), the teacher's "
            f"{pattern!r} means {len(found)} ({_list(found)}); name as many on each side"
        )
    return found


def _spec(path: str, key: str) -> str:
    return f"{path}:{key}" if key else path


def _list(names: Iterable[str]) -> str:
    shown = list(names)
    return ", ".join(shown[:4]) + (", ..." if len(shown) > 4 else "")
