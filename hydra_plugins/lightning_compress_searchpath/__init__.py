"""Lets any Hydra app in this environment use the package's config groups, e.g. ``+callbacks/compress=[prune]``.

Hydra imports this module in every app it starts, so it must stay cheap: it does not import ``lightning_compress``
(and with it torch), it only asks where the package lies.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

PROVIDER = "lightning-compress"


def shipped_folder(name: str) -> Path:
    """Return the folder ``name`` (``"conf"`` or ``"recipes"``) that belongs to the importable package.

    A checkout's own folder wins over the copy inside the package: an editable install leaves a copy behind that
    goes stale at the next edit.

    Args:
        name: ``"conf"`` or ``"recipes"``.

    Returns:
        An absolute path; in a checkout a sibling of the package, in a wheel a folder inside it.

    >>> shipped_folder("conf").name
    'conf'
    """
    spec = find_spec("lightning_compress")
    origin = spec.origin if spec is not None else None
    package = Path(origin).resolve().parent if origin is not None else Path.cwd()
    checkout = package.parent
    beside = checkout / name
    if (checkout / "pyproject.toml").is_file() and beside.is_dir():
        return beside
    return package / name


class CompressSearchPath(SearchPathPlugin):
    """Append the package's ``conf`` folder, last, so that an app's own groups and choices win."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Add the folder unless it is there already (as it is for the package's own command)."""
        folder = str(shipped_folder("conf"))
        known = {str(element.path).removeprefix("file://") for element in search_path.get_path()}
        if folder not in known:
            search_path.append(provider=PROVIDER, path=f"file://{folder}")
