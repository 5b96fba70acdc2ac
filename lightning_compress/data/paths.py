"""Where data lies: an argument, an environment variable, or a few usual places."""

from __future__ import annotations

import os
from pathlib import Path

from lightning_compress.core.errors import ConfigurationError

#: Name of the environment variable with the folder that holds all data sets.
DATA_VARIABLE = "LIGHTNING_COMPRESS_DATA"


def find_data(name: str, marker: str = "", root: str | Path | None = None, argument: str = "root") -> Path:
    """Return the first existing place of a data set.

    Looked at in this order: ``root`` if given (nothing else then), ``$LIGHTNING_COMPRESS_DATA/name``,
    ``shared/data/name`` beside the checkout, ``data/name`` and ``data`` in the working directory.

    Args:
        name: Folder or file name of the data set, such as ``"mnist"``.
        marker: A path below it that must exist, such as ``"MNIST/raw"``.
        root: The place the user named.
        argument: The name of that argument, for the error.

    Returns:
        The path.

    Raises:
        ConfigurationError: If no place has the data; it lists what was looked at and says what to set.
    """
    places = [Path(root).expanduser()] if root is not None else _usual_places(name)
    for place in places:
        if (place / marker).exists():
            return place
    looked = ", ".join(str(place / marker) for place in places)
    raise ConfigurationError(
        f"`{argument}`: no data found, looked at {looked}; set `{argument}` to the folder or file, or the environment "
        f"variable {DATA_VARIABLE} to the folder that holds {name!r}"
    )


def _usual_places(name: str) -> list[Path]:
    variable = os.environ.get(DATA_VARIABLE)
    from_variable = [Path(variable).expanduser() / name] if variable else []
    beside_checkout = Path(__file__).resolve().parents[2].parent / "shared" / "data" / name
    plain = [] if Path(name).suffix else [Path("data")]
    return [*from_variable, beside_checkout, Path("data") / name, *plain]
