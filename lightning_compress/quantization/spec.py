"""What a quantizer is, as data that JSON can hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from lightning_compress.core.errors import ConfigurationError, did_you_mean
from lightning_compress.quantization.affine import integer_bounds

OBSERVED = ("minmax", "moving_average", "percentile", "mse")
"""Ranges that are taken from what is observed."""

LEARNED = ("lsq", "lsq+", "pact", "dorefa")
"""Ranges that are parameters, or belong to a transformation of the weights (DoReFa)."""

FIXED = "fixed"
"""The range of an activation after calibration: it stands in the buffers, and nothing is observed any more."""

RANGES = (*OBSERVED, *LEARNED, FIXED)
"""All values of :attr:`QuantizerSpec.range`."""


def _check_number(name: str, value: object, above: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not above < value <= most:
        raise ConfigurationError(f"`{name}` must be a number above {above} up to {most}, got {value!r}")


@dataclass(frozen=True)
class QuantizerSpec:
    """How a tensor becomes integers.

    Args:
        bits: 2 to 8.
        symmetric: Signed integers around 0; else unsigned integers with a zero point.
        per_channel: A scale for each output channel (of a weight); else one scale for the tensor.
        range: Where the range comes from. ``"minmax"``: all that was seen; ``"moving_average"``: extremes of each step,
            averaged with ``momentum``; ``"percentile"``: without the tails beyond ``percentile``; ``"mse"``: least
            squared error; learned by gradient descent: ``"lsq"``, ``"lsq+"``, ``"pact"``; ``"dorefa"``: weights
            through a tanh. ``"fixed"``: as calibration left it. For a weight, observed ranges follow the weight itself.
        narrow: Leave out the most negative integer of a signed grid. Folding a negative batch-norm scale is exact only
            then; without it a 2-bit weight has four values instead of three.
        momentum: Share of the newest step in a moving average, above 0 to 1.
        percentile: In percent, above 50 to 100.

    Raises:
        ConfigurationError: For a value outside these ranges, or a combination that has no meaning.

    >>> QuantizerSpec(bits=4, range="lsq").bounds
    (0, 15)
    """

    bits: int = 8
    symmetric: bool = False
    per_channel: bool = False
    range: str = "moving_average"
    narrow: bool = True
    momentum: float = 0.01
    percentile: float = 99.99

    def __post_init__(self) -> None:
        for name in ("symmetric", "per_channel", "narrow"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigurationError(f"`{name}` must be true or false, got {getattr(self, name)!r}")
        integer_bounds(self.bits, self.symmetric, self.narrow)
        if self.range not in RANGES:
            raise ConfigurationError(f"`range` is {self.range!r}: {did_you_mean(str(self.range), RANGES, len(RANGES))}")
        _check_number("momentum", self.momentum, 0, 1)
        _check_number("percentile", self.percentile, 50, 100)
        if self.range in ("lsq+", "pact") and self.per_channel:
            raise ConfigurationError(f"`per_channel` is for weights, and range={self.range!r} for activations")
        if self.range == "lsq+" and self.symmetric:
            raise ConfigurationError("`range` 'lsq+' learns an offset, which symmetric=True forbids; write 'lsq'")
        if self.range == "dorefa" and not self.symmetric:
            raise ConfigurationError("`range` 'dorefa' is for weights: write symmetric=True")
        if self.range == "dorefa" and self.bits == 8 and not self.narrow:
            raise ConfigurationError("`narrow` must be true for 'dorefa' with 8 bits, whose odd integers fit no int8")

    @property
    def bounds(self) -> tuple[int, int]:
        """Least and greatest integer."""
        return integer_bounds(self.bits, self.symmetric, self.narrow)

    @property
    def learned(self) -> bool:
        """Whether the range is a parameter."""
        return self.range in ("lsq", "lsq+", "pact")

    def to_config(self) -> dict[str, Any]:
        """Return the spec as a JSON-able mapping."""
        return asdict(self)

    def with_bits(self, bits: int) -> QuantizerSpec:
        """Return the same spec with another number of bits."""
        return replace(self, bits=bits)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> QuantizerSpec:
        """Rebuild a spec from :meth:`to_config`, or from some of its arguments.

        Raises:
            ConfigurationError: For an unknown argument.
        """
        known = [field.name for field in fields(cls)]
        for key in config:
            if key not in known:
                raise ConfigurationError(f"a quantizer has no argument {key!r}: {did_you_mean(str(key), known)}")
        return cls(**config)


WEIGHT = QuantizerSpec(bits=8, symmetric=True, per_channel=True, range="minmax")
"""Signed, a scale for each output channel, covering the weight."""

ACTIVATION = QuantizerSpec(bits=8, symmetric=False, per_channel=False, range="moving_average")
"""Unsigned with a zero point, one scale, a moving average of the extremes."""


def as_spec(value: QuantizerSpec | Mapping[str, Any] | int | str | None, default: QuantizerSpec, name: str) -> Any:
    """Return a spec from what a user may write: a spec, its arguments beside the defaults, bits, or ``None`` for float.

    Args:
        value: What was written.
        default: What holds for arguments that are not given.
        name: The argument's name, for errors.

    Raises:
        ConfigurationError: For anything else.

    >>> as_spec({"bits": 4, "range": "lsq"}, WEIGHT, "weights").per_channel
    True
    """
    if value is None or isinstance(value, QuantizerSpec):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return _named(name, lambda: default.with_bits(value))
    if isinstance(value, Mapping):
        return _named(name, lambda: QuantizerSpec.from_config({**default.to_config(), **value}))
    raise ConfigurationError(
        f"`{name}` must be a number of bits, a mapping such as {{bits: 4, range: lsq}}, or null (float); got {value!r}"
    )


def _named(name: str, build: Any) -> QuantizerSpec:
    try:
        spec: QuantizerSpec = build()
    except ConfigurationError as error:
        raise ConfigurationError(f"`{name}`: {error}") from error
    return spec
