"""The quantizer that a spec asks for."""

from __future__ import annotations

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.quantization.learned_quantizers import (
    LearnedActivation,
    LearnedAffineActivation,
    LearnedBoundActivation,
    LearnedWeight,
    TanhWeight,
)
from lightning_compress.quantization.quantizer import ActivationQuantizer, Quantizer, WeightQuantizer
from lightning_compress.quantization.spec import QuantizerSpec


def build_quantizer(spec: QuantizerSpec, role: str, axis: int | None = None, size: int | None = None) -> Quantizer:
    """Return a new quantizer, switched off.

    Args:
        spec: What it is.
        role: ``"weight"`` or ``"input"`` (any activation).
        axis: Of a weight, the dimension of the output channels.
        size: Their number.

    Raises:
        ConfigurationError: If the spec does not fit the role.

    >>> type(build_quantizer(QuantizerSpec(), "input")).__name__
    'ActivationQuantizer'
    """
    if role == "weight":
        if spec.range in ("lsq+", "pact"):
            raise ConfigurationError(f"`range` {spec.range!r} is for activations; for weights write 'lsq'")
        if spec.learned and not spec.symmetric:
            raise ConfigurationError("a weight's learned range is symmetric; write symmetric=True")
        return _WEIGHTS.get(spec.range, WeightQuantizer)(spec, axis, size)
    if spec.per_channel or spec.range == "dorefa":
        wrong = "per_channel=True" if spec.per_channel else "range='dorefa'"
        raise ConfigurationError(f"{wrong} is for weights; an activation has one scale, and no tanh")
    return _ACTIVATIONS.get(spec.range, ActivationQuantizer)(spec)


_WEIGHTS: dict[str, type[WeightQuantizer]] = {"lsq": LearnedWeight, "dorefa": TanhWeight}
_ACTIVATIONS: dict[str, type[ActivationQuantizer]] = {
    "lsq": LearnedActivation,
    "lsq+": LearnedAffineActivation,
    "pact": LearnedBoundActivation,
}
