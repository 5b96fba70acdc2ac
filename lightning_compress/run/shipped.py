"""The configuration groups and recipes that come with the package, from a checkout or from an installed wheel."""

from __future__ import annotations

from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from hydra_plugins.lightning_compress_searchpath import PROVIDER, shipped_folder

PACKAGE_HEADER = "# @package"


def config_folder() -> Path:
    """Return the folder of the configuration groups."""
    return shipped_folder("conf")


def recipe_files() -> dict[str, Path]:
    """Return the recipes by name, sorted.

    >>> "digits_prune" in recipe_files()
    True
    """
    return {path.stem: path for path in sorted(shipped_folder("recipes").glob("*.yaml"))}


def header(path: Path) -> list[str]:
    """Return the comment lines at the top of a configuration file, without ``#`` and the ``@package`` line."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith(PACKAGE_HEADER):
            lines.append(line.lstrip("# ").rstrip())
    return lines


def summary(path: Path) -> str:
    """Return the first comment line of a configuration file, its one-line summary."""
    lines = header(path)
    return lines[0] if lines else ""


def groups() -> dict[str, dict[str, Path]]:
    """Return the choices of every configuration group: ``{"trainer": {"default": path, ...}, ...}``.

    >>> sorted(groups()["task"])
    ['compress', 'evaluate', 'plan']
    """
    folder = config_folder()
    found: dict[str, dict[str, Path]] = {"recipes": recipe_files()}
    for path in sorted(folder.rglob("*.yaml")):
        if path.parent != folder:
            found.setdefault(path.parent.relative_to(folder).as_posix(), {})[path.stem] = path
    return found


def register_recipes() -> None:
    """Make the recipes a Hydra group of their own.

    They go into Hydra's store, not on its search path: their parent folder would bring every other folder beside
    them along as a group.
    """
    store = ConfigStore.instance()
    for name, path in recipe_files().items():
        store.store(group="recipes", name=name, node=OmegaConf.load(path), package="_global_", provider=PROVIDER)
