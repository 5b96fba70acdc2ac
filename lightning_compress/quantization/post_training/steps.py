"""Which steps post-training quantization takes, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lightning_compress.core.calibration import check_batches
from lightning_compress.core.errors import ConfigurationError, did_you_mean

ROUNDINGS = ("nearest", "gptq", "adaround")
"""Ways to round weights."""


@dataclass(frozen=True)
class PostTrainingSteps:
    """What is done to a trained model before and while its weights become integers.

    Args:
        equalize: Move scales between consecutive layers first, where one of them has a single scale for its weight.
        rounding: ``"nearest"``; ``"gptq"``: column by column, later columns make up for the error of earlier ones;
            ``"adaround"``: up or down, by gradient descent.
        correct_bias: Give each layer the mean output back that it had in float.
        samples: How many calibration samples are enough, 1 or more; whole batches are used.
        damping: Share of the Hessian's mean diagonal that is added to it, above 0.
        iterations: Steps of gradient descent of ``"adaround"`` for each layer, 1 or more.

    Raises:
        ConfigurationError: For a value outside its range.

    >>> PostTrainingSteps(rounding="nearest").correct_bias
    True
    """

    equalize: bool = True
    rounding: str = "gptq"
    correct_bias: bool = True
    samples: int = 1024
    damping: float = 0.01
    iterations: int = 300

    def __post_init__(self) -> None:
        for name in ("equalize", "correct_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigurationError(f"`{name}` must be true or false, got {getattr(self, name)!r}")
        if self.rounding not in ROUNDINGS:
            raise ConfigurationError(f"`rounding` is {self.rounding!r}: {did_you_mean(str(self.rounding), ROUNDINGS)}")
        check_batches(None, self.samples)
        if isinstance(self.damping, bool) or not isinstance(self.damping, int | float) or not self.damping > 0:
            raise ConfigurationError(f"`damping` must be a number above 0, got {self.damping!r}")
        if isinstance(self.iterations, bool) or not isinstance(self.iterations, int) or self.iterations < 1:
            raise ConfigurationError(f"`iterations` must be an int >= 1, got {self.iterations!r}")


def as_steps(value: PostTrainingSteps | Mapping[str, Any] | None) -> PostTrainingSteps:
    """Return the steps that a user may write as a mapping of what differs from the defaults.

    Raises:
        ConfigurationError: For anything else, or an unknown step.

    >>> as_steps({"rounding": "adaround"}).rounding
    'adaround'
    """
    if value is None or isinstance(value, PostTrainingSteps):
        return value or PostTrainingSteps()
    if not isinstance(value, Mapping):
        raise ConfigurationError(f"`steps` must be a mapping such as {{rounding: gptq}}, got {value!r}")
    known = [field.name for field in fields(PostTrainingSteps)]
    for key in value:
        if key not in known:
            raise ConfigurationError(f"`steps` has no {key!r}: {did_you_mean(str(key), known)}")
    try:
        return PostTrainingSteps(**value)
    except ConfigurationError as error:
        raise ConfigurationError(f"`steps`: {error}") from error
