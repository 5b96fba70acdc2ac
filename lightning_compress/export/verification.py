"""Whether a runtime computes what the network computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lightning_compress.export.result import ExportError

FLOAT_LIMIT, INTEGER_LIMIT = 1e-3, 0.25
"""Greatest difference that is taken as the same: of float kernels, and of integer ones, which round at every layer."""


def relative_difference(got: Sequence[Any], expected: Sequence[Tensor]) -> float:
    """Return the root mean square of the difference of all outputs, as a share of that of the outputs.

    >>> import torch
    >>> round(relative_difference([np.array([1.0, 1.1])], [torch.tensor([1.0, 1.0])]), 4)
    0.0707
    """
    error = size = 0.0
    for mine, theirs in zip(got, expected, strict=True):
        reference = theirs.detach().double().numpy()
        error += float(np.square(np.asarray(mine, dtype=np.float64) - reference).sum())
        size += float(np.square(reference).sum())
    return float(np.sqrt(error / max(size, 1e-30))) if error else 0.0


def require_same(got: Sequence[Any], expected: Sequence[Tensor], quantized: bool, runtime: str) -> float:
    """Return the difference.

    Raises:
        ExportError: If it is beyond what rounding explains.
    """
    if len(got) != len(expected):
        raise ExportError(f"{runtime} returns {len(got)} outputs, the model {len(expected)}; report this model")
    difference = relative_difference(got, expected)
    limit = INTEGER_LIMIT if quantized else FLOAT_LIMIT
    if not difference <= limit:
        raise ExportError(
            f"{runtime} computes something else than the model: a relative difference of {difference:.3g}, where at "
            f"most {limit} was expected. Something in the model depends on more than its inputs, or is not exported "
            "faithfully; export it with verify=False to look at the file"
        )
    return difference
