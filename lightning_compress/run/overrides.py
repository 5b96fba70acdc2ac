"""Values on the command line that would change nothing."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from lightning_compress.core.errors import ConfigurationError

log = logging.getLogger(__name__)

COMMON = "trainer."


def check_overrides(config: DictConfig, words: Sequence[str]) -> None:
    """Refuse a ``trainer.KEY=VALUE`` that every stage overrides; warn of one that some stages override.

    Args:
        config: The composed configuration, not resolved: a stage that refers to ``${trainer.KEY}`` does follow it.
        words: The overrides it was composed with.

    Raises:
        ConfigurationError: If a value has no effect; names the keys that have.
    """
    stages = cast(dict[Any, Any], OmegaConf.to_container(config, resolve=False)).get("stages")
    if not isinstance(stages, Mapping):
        return
    fits = {name: stage for name, stage in stages.items() if isinstance(stage, Mapping) and not stage.get("apply")}
    for override in OverridesParser.create().parse_overrides(list(words)):
        name = str(override.key_or_group)
        key = name.removeprefix(COMMON).partition(".")[0]
        if not name.startswith(COMMON) or override.is_delete():
            continue
        own = [stage for stage, content in fits.items() if _sets(content, key)]
        keys = ", ".join(f"`stages.{stage}.trainer.{key}`" for stage in own)
        if own and len(own) == len(fits):
            raise ConfigurationError(f"`{name}` has no effect, since every stage of the recipe sets its own: {keys}")
        if own:
            log.warning("%s does not reach stages that set their own: %s", name, keys)


def _sets(stage: Mapping[str, object], key: str) -> bool:
    trainer = stage.get("trainer")
    return isinstance(trainer, Mapping) and key in trainer and "${" not in str(trainer[key])
