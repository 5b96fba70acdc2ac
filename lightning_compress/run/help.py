"""The text of ``lightning-compress --help``."""

from __future__ import annotations

from lightning_compress.run.shipped import groups, summary

USAGE = """\
lightning-compress: compress a PyTorch model while it trains.

  lightning-compress [recipes=NAME] [group=choice] [key=value ...]
  lightning-compress -m key=value1,value2 ...      every combination, compared in one table
  lightning-compress resume=outputs/RECIPE/TIME    continue a run that was interrupted
  lightning-compress --cfg job                     print the configuration and exit
"""

NOTES = """\
  stages.prune.trainer.max_epochs=5   callbacks.prune.schedule.final=0.8   seed=1    change a value
  trainer.precision=16-mixed          for all stages that do not set it themselves
  +trainer.NAME=value    add one that is not listed      ~callbacks.prune    remove one
  model.checkpoint=PATH  start from trained weights; 'model.checkpoint="a=1.ckpt"' if the name has an equals sign
  hydra.run.dir=FOLDER   where the results go            --config-dir=DIR    your own recipes/ and groups

A list, a space or a bracket needs quotes in the shell: 'callbacks.prune.select.include=["conv*"]'.
LIGHTNING_COMPRESS_TRACEBACK=1 shows the traceback of an error."""


def help_text() -> str:
    """Return usage, recipes with their summaries, and groups with their choices.

    >>> "digits_prune" in help_text()
    True
    """
    found = groups()
    recipes = found.pop("recipes")
    width = max(map(len, recipes), default=0)
    lines = [USAGE, "Recipes (recipes=NAME):"]
    lines += [f"  {name:<{width}}  {summary(path)}" for name, path in recipes.items()]
    lines += ["", "Groups (group=choice):"]
    width = max(map(len, found))
    lines += [f"  {name:<{width}}  {', '.join(sorted(choices))}" for name, choices in found.items()]
    return "\n".join([*lines, "", "Values:", NOTES])
