"""One summand of a distillation objective: a loss, its weight, its temperature, and where it looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_compress.core.errors import ConfigurationError, did_you_mean
from lightning_compress.distillation.losses import DistillationLoss
from lightning_compress.distillation.pairs import Pairs
from lightning_compress.distillation.schedule import Value, check_value

TARGET_KEYS = ("target", "targets", "label", "labels", "y")
"""Keys under which labels are looked for in a batch that is a mapping."""


@dataclass(frozen=True)
class Term:
    """A loss with its place and share in the objective.

    Args:
        loss: What is compared, and how.
        weight: What it is multiplied with, at least 0; a :class:`Ramp` changes it. At 0 it costs nothing.
        pairs: Which layers, for losses on features: ``"layer*"``, ``["layer1", "layer2"]``, ``[[student, teacher]]`` or
            ``{student: teacher}``; LightningCLI splits keys at dots, so give it one of the others.
        temperature: Its own, above 0; ``None`` takes that of the whole objective.

    Raises:
        ConfigurationError: For a loss that is none, a number out of range, or pairs where the loss looks at no layers
            (or none where it does).
    """

    loss: DistillationLoss
    weight: Value = 1.0
    pairs: Pairs | None = None
    temperature: Value | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.loss, DistillationLoss):
            raise ConfigurationError(f"`loss` must be a DistillationLoss, got {self.loss!r}")
        object.__setattr__(self, "weight", check_value(self.weight, "weight"))
        if self.temperature is not None:
            object.__setattr__(self, "temperature", check_value(self.temperature, "temperature", above=0))
        if self.loss.on == "features" and self.pairs is None:
            raise ConfigurationError(
                f"`pairs` is missing: {type(self.loss).__name__} compares layers; name them, as in "
                "Term(loss, pairs={'layer1': 'layer1'}) or pairs='layer*'"
            )
        if self.loss.on == "output" and self.pairs is not None:
            raise ConfigurationError(
                f"`pairs` is {self.pairs!r}, but {type(self.loss).__name__} compares outputs; leave it out"
            )


@dataclass(frozen=True)
class Objective:
    """The value of the objective for one batch.

    Args:
        total: The weighted sum, with its graph.
        parts: Each loss before its weight, by name, without graph.
    """

    total: Tensor
    parts: Mapping[str, Tensor]


Losses = DistillationLoss | Term | Sequence[DistillationLoss | Term] | Mapping[str, DistillationLoss | Term]
"""One loss or term, a list of them, or a mapping from names to them."""


def as_terms(losses: Losses) -> dict[str, Term]:
    """Return terms by name; a bare loss has weight 1, and its own word is its name.

    Raises:
        ConfigurationError: If there is none, or something else among them.
    """
    if isinstance(losses, DistillationLoss | Term):
        losses = [losses]
    if not isinstance(losses, Mapping | Sequence) or isinstance(losses, str) or not losses:
        raise ConfigurationError(f"`losses` must be a loss, or a list or mapping of some, got {losses!r}")
    items = losses.items() if isinstance(losses, Mapping) else [("", one) for one in losses]
    terms: dict[str, Term] = {}
    for key, given in items:
        if isinstance(given, type) or not isinstance(given, DistillationLoss | Term):
            raise ConfigurationError(
                f"`losses` must hold DistillationLoss or Term objects, got {given!r}"
                + (f"; build it: {given.__name__}()" if isinstance(given, type) else "")
            )
        if key == "loss":
            raise ConfigurationError("`losses` has the name 'loss', under which their sum is logged; take another one")
        term = given if isinstance(given, Term) else Term(given)
        terms[_unique(str(key) or term.loss.name, terms)] = term
    return terms


def _unique(name: str, taken: Mapping[str, Any]) -> str:
    count = sum(other == name or other.startswith(f"{name}_") for other in taken)
    return f"{name}_{count + 1}" if name in taken else name


def find_target(batch: Any, where: int | str | None) -> Tensor | None:
    """Return the labels in a batch: its second element, or what lies under a usual key; ``None`` if there are none.

    Args:
        batch: What ``training_step`` gets.
        where: The position or key, where the batch looks different.

    Raises:
        ConfigurationError: If ``where`` is given and nothing lies there.

    >>> find_target(("images", 5), None) is None, find_target({"x": 0, "y": Tensor([1])}, None)
    (True, tensor([1.]))
    """
    if where is not None:
        try:
            return batch[where]
        except (KeyError, IndexError, TypeError) as error:
            options = list(batch) if isinstance(batch, Mapping) else []
            near = did_you_mean(str(where), map(str, options)) if options else f"a batch is a {type(batch).__name__}"
            raise ConfigurationError(f"`target` is {where!r}, which the batch does not have; {near}") from error
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in TARGET_KEYS if key in batch), None)
    else:
        found = batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None
    return found if isinstance(found, Tensor) else None
