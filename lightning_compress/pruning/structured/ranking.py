"""Which channels go first: what makes them matter, and how groups are compared with each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_compress.core.errors import CompressionError, ConfigurationError, did_you_mean
from lightning_compress.core.mapping import from_mapping
from lightning_compress.pruning.structured.groups import ChannelGroup, Layers
from lightning_compress.pruning.structured.importance import (
    KINDS,
    by_mean,
    channel_scores,
    has_gradients,
    lamp,
)

SCOPES = ("global", "layer", "lamp", "global_raw")


@dataclass(frozen=True)
class Ranking:
    """What makes a channel matter, and how channels of different groups are compared.

    Args:
        importance: A word of :data:`~lightning_compress.pruning.structured.importance.KINDS`: ``"l2"``, ``"l1"``,
            ``"taylor"`` (gradients seen in ``fit``), ``"fpgm"``, ``"bn_scale"`` or ``"random"``.
        scope: ``"global"`` ranks all channels together, each group divided by its mean; ``"lamp"`` divides by what is
            left of a group instead (:func:`~lightning_compress.pruning.structured.importance.lamp`); ``"global_raw"``
            does not divide, for scores that mean the same everywhere (``"taylor"``, ``"bn_scale"``); ``"layer"`` takes
            the same share of every group.

    Raises:
        ConfigurationError: For an unknown word; names the nearest.

    >>> Ranking("taylor", scope="global_raw").importance
    'taylor'
    """

    importance: str = "l2"
    scope: str = "global"

    def __post_init__(self) -> None:
        if self.importance not in KINDS:
            raise ConfigurationError(
                f"`importance` is {self.importance!r}: {did_you_mean(str(self.importance), KINDS)}"
            )
        if self.scope not in SCOPES:
            raise ConfigurationError(f"`scope` is {self.scope!r}: {did_you_mean(str(self.scope), SCOPES)}")

    def score(self, groups: Sequence[ChannelGroup], layers: Layers, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a number per channel and group; small ones go first.

        Args:
            groups: The groups.
            layers: Modules by path.
            seen: What :meth:`look` has added up; a group that is missing there had no gradients. If nothing was seen,
                gradients must be there now.

        Raises:
            CompressionError: If a group has scores that are no finite numbers; names it.
        """
        raw = {group.name: self._raw(group, layers, seen) for group in groups}
        for name, scores in raw.items():
            if not bool(scores.isfinite().all()):
                raise CompressionError(
                    f"{self.importance!r} importance of the channels of {name!r} is NaN or infinite: training has "
                    "probably diverged; lower the learning rate or clip gradients"
                )
        compare = {"lamp": lamp, "global_raw": lambda scores: scores}.get(self.scope, by_mean)
        return {name: compare(scores) for name, scores in raw.items()}

    def look(self, groups: Sequence[ChannelGroup], layers: Layers, seen: dict[str, Tensor]) -> None:
        """Add the scores of the gradients that are there now, if the importance needs gradients."""
        if self.importance != "taylor":
            return
        found = {g.name: channel_scores(g, layers, "taylor") for g in groups if has_gradients(g, layers)}
        if not all(bool(scores.isfinite().all()) for scores in found.values()):
            return  # the gradient scaler will skip that step
        for name, scores in found.items():
            seen[name] = seen[name] + scores if name in seen else scores

    def _raw(self, group: ChannelGroup, layers: Layers, seen: Mapping[str, Tensor]) -> Tensor:
        if not seen:
            return channel_scores(group, layers, self.importance)
        return seen.get(group.name, torch.zeros(group.channels, dtype=torch.float64))


def as_ranking(ranking: Ranking | str | Mapping[str, Any] | None) -> Ranking:
    """Return a ranking, built from a word for its importance or a plain mapping where those were given.

    >>> as_ranking("fpgm"), as_ranking({"scope": "layer"})
    (Ranking(importance='fpgm', scope='global'), Ranking(importance='l2', scope='layer'))
    """
    return Ranking(ranking) if isinstance(ranking, str) else from_mapping(Ranking, ranking, "ranking")
