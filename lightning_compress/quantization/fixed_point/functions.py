r"""Fixed-point numbers :math:`\langle IL, FL \rangle`: sign and integer bits, fraction bits, two roundings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_compress.core.errors import ConfigurationError, did_you_mean

ROUNDINGS = ("nearest", "stochastic")
MAX_BITS = 24
"""Bits that float32 arithmetic holds exactly."""


@dataclass(frozen=True)
class FixedPoint:
    r"""A fixed-point format :math:`\langle IL, FL \rangle` (Gupta et al., arXiv:1502.02551).

    Its numbers are the multiples of :math:`\epsilon = 2^{-FL}` from :math:`-2^{IL-1}` to :math:`2^{IL-1} - \epsilon`.

    Args:
        integer_bits: IL, the sign among them, at least 1.
        fraction_bits: FL, at least 0; both together at most 24.

    Raises:
        ConfigurationError: For bits outside these ranges.

    >>> FixedPoint(2, 14).step, FixedPoint(2, 14).most
    (6.103515625e-05, 1.99993896484375)
    """

    integer_bits: int
    fraction_bits: int

    def __post_init__(self) -> None:
        for name, least in (("integer_bits", 1), ("fraction_bits", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigurationError(f"`{name}` must be an int >= {least}, got {value!r}")
        if self.integer_bits + self.fraction_bits > MAX_BITS:
            raise ConfigurationError(
                f"`integer_bits` + `fraction_bits` must be at most {MAX_BITS}, which float32 holds exactly, got "
                f"{self.integer_bits} + {self.fraction_bits}"
            )

    @property
    def step(self) -> float:
        r""":math:`\epsilon`, the distance of two neighbours."""
        return 2.0**-self.fraction_bits

    @property
    def most(self) -> float:
        """The largest number."""
        return -self.least - self.step

    @property
    def least(self) -> float:
        """The smallest number."""
        return -(2.0 ** (self.integer_bits - 1))

    def __str__(self) -> str:
        return f"<{self.integer_bits},{self.fraction_bits}>"


def round_to(
    x: Tensor, form: FixedPoint, rounding: str = "nearest", generator: torch.Generator | None = None
) -> Tensor:
    r"""Return the fixed-point numbers that stand for ``x``, saturated at the ends of the range.

    ``nearest`` takes the nearer neighbour, the lower one of two equally near. ``stochastic`` takes the upper neighbour
    with probability :math:`(x - \lfloor x \rfloor)/\epsilon`, so that :math:`E[\mathrm{round}(x)] = x` and updates that
    are smaller than :math:`\epsilon` count on average; what is a fixed-point number already stays.

    Args:
        x: Real numbers of any shape; computed in float32, returned in their own type.
        form: The format.
        rounding: ``"nearest"`` or ``"stochastic"``.
        generator: Source of randomness on the device of ``x``; the global one by default.

    Raises:
        ConfigurationError: For an unknown rounding.

    >>> round_to(torch.tensor([0.3, 0.375, -3.0, 3.0]), FixedPoint(2, 2)).tolist()
    [0.25, 0.25, -2.0, 1.75]
    """
    if rounding not in ROUNDINGS:
        raise ConfigurationError(f"`rounding` is {rounding!r}: {did_you_mean(str(rounding), ROUNDINGS)}")
    scaled = x.float() * 2.0**form.fraction_bits
    if rounding == "stochastic":
        noise = torch.rand(x.shape, generator=generator, device=x.device)
        whole = scaled.floor()
        scaled = whole + (noise < scaled - whole)
    else:
        scaled = (scaled - 0.5).ceil()
    return (scaled * form.step).clamp(form.least, form.most).to(x.dtype)
