"""Whether a runtime computes what the network computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_compress.core.isolation import call, map_tensors
from lightning_compress.export.preparation import Prepared, outputs_of
from lightning_compress.export.result import ExportError

FLOAT_LIMIT, INTEGER_LIMIT = 1e-3, 0.25
"""Greatest difference that is taken as the same: of float kernels, and of integer ones, which round at every layer."""
ROUNDING = 2.0
"""How many times what rounding does to a network by itself is taken as the same, where that is more."""
_SHARE = 1e-4


def relative_difference(got: Sequence[Any], expected: Sequence[Tensor]) -> float:
    """Return the root mean square of the difference of all outputs, as a share of that of the outputs.

    >>> import torch
    >>> round(relative_difference([np.array([1.0, 1.1])], [torch.tensor([1.0, 1.0])]), 4)
    0.0707
    """
    error = size = 0.0
    for mine, theirs in zip(got, expected, strict=True):
        reference = theirs.detach().double()
        other = torch.as_tensor(mine).detach().double()
        equal = (other == reference) & reference.isinf()  # masked scores, for example
        error += float((other - reference).masked_fill(equal, 0.0).square().sum())
        size += float(reference.masked_fill(equal, 0.0).square().sum())
    return float(np.sqrt(error / max(size, 1e-30))) if error else 0.0


def require_same(got: Sequence[Any], prepared: Prepared, runtime: str) -> float:
    """Return the difference between what a runtime computed and what the network itself does.

    Raises:
        ExportError: If it is beyond what rounding explains.
    """
    expected = outputs_of(prepared.expected)
    if len(got) != len(expected):
        raise ExportError(f"{runtime} returns {len(got)} outputs, the model {len(expected)}; report this model")
    difference = relative_difference(got, expected)
    limit = INTEGER_LIMIT if prepared.quantized else FLOAT_LIMIT
    if prepared.quantized and difference > limit:
        limit = max(limit, ROUNDING * rounding_noise(prepared))
    if not difference <= limit:
        raise ExportError(
            f"{runtime} computes something else than the model: a relative difference of {difference:.3g}, where "
            f"at most {limit:.3g} was expected. Something in the model depends on more than its inputs, or is not "
            "exported faithfully; export it with verify=False to look at the file"
        )
    return difference


@torch.inference_mode()
def rounding_noise(prepared: Prepared) -> float:
    """Return how much the outputs change when inputs move by a ten-thousandth of their size: by rounding alone.

    In a deep network of few bits, above all in one that has hardly been trained, one value that is rounded the other
    way moves others behind it. No runtime computes more alike than that.
    """
    generator = torch.Generator().manual_seed(0)

    def moved(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        return x + _SHARE * x.std(correction=0) * torch.randn(x.shape, generator=generator).to(x)

    def change_of(inputs: Any) -> float:
        outputs = outputs_of(call(prepared.module, inputs))
        return relative_difference(outputs, outputs_of(prepared.expected))

    is_a_function = change_of(prepared.inputs) == 0.0
    return change_of(tuple(map_tensors(moved, prepared.inputs))) if is_a_function else 0.0
