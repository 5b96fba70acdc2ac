"""Reading what ``torch.save`` wrote without running anything in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lightning_compress.core.errors import ArtifactError


def load_tensors(path: str | Path) -> dict[str, Any]:
    """Return the mapping that ``torch.save`` wrote, tensors and builtins only, on the CPU.

    Args:
        path: A file; pickled code in it is refused, never run.

    Raises:
        ArtifactError: If the file is missing, damaged, or holds anything but tensors and builtins.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"there is no file {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different type for every way a file can be broken
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if reason.startswith("Weights only load failed"):  # torch's own text advises to run the code in the file
            raise ArtifactError(f"{path} is not a file of tensors alone; pickled code is never loaded") from error
        raise ArtifactError(f"{path} cannot be read; it is damaged, or not a file of tensors ({reason})") from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} holds a {type(content).__name__}, expected a mapping of tensors")
    return content
