"""Packages that only some targets need."""

from __future__ import annotations

import importlib
from typing import Any

from lightning_compress.core.errors import ConfigurationError


def require(module: str, extra: str) -> Any:
    """Return a module, or say which extra installs it.

    Args:
        module: Its name.
        extra: Of this package.

    Raises:
        ConfigurationError: If it is not installed.

    >>> require("json", "onnx").__name__
    'json'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigurationError(
            f"this target needs {module.split('.')[0]!r}, which cannot be imported ({error}); install it with: "
            f"pip install 'lightning-compress[{extra}]'"
        ) from error
