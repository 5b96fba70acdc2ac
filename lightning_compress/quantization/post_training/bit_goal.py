"""One goal for the bits of a whole model, as data: a size of the file, or an accuracy that may be lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import nn

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.quantization.affine import integer_bounds
from lightning_compress.quantization.assignment import SpecLike
from lightning_compress.quantization.spec import WEIGHT, QuantizerSpec, as_spec


@dataclass(frozen=True)
class BitGoal:
    r"""Weights of as many bits in each layer as one goal for the whole model allows.

    Each layer is tried with each number of bits. What its outputs lose on the calibration batches, the relative squared
    error e, counts as :math:`-\log(1 - e)`; the least sum of these losses within the goal decides
    (:mod:`~lightning_compress.core.allocation`). The quantized model is then measured, and the goal drawn tighter until
    it holds: what comes out obeys it.

    Args:
        size: Bytes of the file that ``save_compressed`` writes, over those of the model's tensors: above 0, below 1.
        drop: Instead, how much ``metric`` may fall, at least 0; by default points of accuracy, in per cent. What
            comes out is the smallest model found that falls no more.
        bits: What a layer can get, at least two different numbers from 2 to 8.
        metric: For ``drop``: called with a model, returns what should be large, a number. By default the share of right
            answers on the calibration batches, in per cent; without labels right is what the float model answers.
            Calibration batches flatter: a function that looks at validation data tells more. With a Trainer it is also
            called once before training, so that an error in it is found then.
        weights: Other arguments of the weights' quantizers, such as ``{per_channel: false}``.

    Raises:
        ConfigurationError: Unless exactly one of ``size`` and ``drop`` is given, or for a value outside its range.

    >>> str(BitGoal(size=0.15, bits=[2, 4, 8]))
    'a file of at most 0.15 of the tensors, with 2, 4 or 8 bits'
    """

    size: float | None = None
    drop: float | None = None
    bits: Sequence[int] = (2, 3, 4, 5, 6, 8)
    metric: Callable[[nn.Module], float] | None = None
    weights: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.size is None) == (self.drop is None):
            raise ConfigurationError("give one of `size` and `drop`, such as BitGoal(size=0.15)")
        if self.size is not None and not (_is_number(self.size) and 0 < self.size < 1):
            raise ConfigurationError(f"`size` must be a number above 0 and below 1, got {self.size!r}")
        if self.drop is not None and not (_is_number(self.drop) and self.drop >= 0):
            raise ConfigurationError(f"`drop` must be a number of at least 0, got {self.drop!r}")
        if self.metric is not None and (self.drop is None or not callable(self.metric)):
            raise ConfigurationError("`metric` must be a function of a model, and goes with `drop`")
        if isinstance(self.bits, str) or not isinstance(self.bits, Sequence):
            raise ConfigurationError(f"`bits` must be a list of numbers from 2 to 8, got {self.bits!r}")
        for bits in self.bits:
            integer_bounds(bits, symmetric=True)
        if len(set(self.bits)) < 2:
            raise ConfigurationError(f"`bits` must hold at least two different numbers, got {list(self.bits)}")
        object.__setattr__(self, "bits", tuple(sorted(set(self.bits))))
        if not isinstance(self.weights, Mapping) or "bits" in self.weights:
            raise ConfigurationError(
                f"`weights` must be a mapping such as {{per_channel: false}}, without bits; got {self.weights!r}"
            )

    def __str__(self) -> str:
        *few, last = map(str, self.bits)
        what = f"a file of at most {self.size:g} of the tensors" if self.drop is None else f"a drop of {self.drop:g}"
        return f"{what}, with {', '.join(few)} or {last} bits"

    def spec(self, default: QuantizerSpec = WEIGHT) -> QuantizerSpec:
        """Return the spec of weights with the most bits.

        >>> BitGoal(drop=0.5, bits=[6, 4]).spec().bits
        6
        """
        built: QuantizerSpec = as_spec({**self.weights, "bits": self.bits[-1]}, default, "weights")
        return built


def split_goal(weights: SpecLike | BitGoal, default: QuantizerSpec) -> tuple[SpecLike, BitGoal | None]:
    """Return the spec of weights that a user wrote, and the goal that divides their bits, if there is one.

    Args:
        weights: Bits, arguments of a spec, a goal, or arguments of a goal (with ``size`` or ``drop`` among them).
        default: What holds for arguments that are not given.

    Raises:
        ConfigurationError: For a goal that is none.

    >>> split_goal({"size": 0.2}, WEIGHT)[0].bits, split_goal(4, WEIGHT)
    (8, (4, None))
    """
    if isinstance(weights, Mapping) and {"size", "drop"} & set(weights):
        known = [item.name for item in fields(BitGoal)]
        own = {key: value for key, value in weights.items() if key in known}
        rest = {key: value for key, value in weights.items() if key not in known}
        weights = replace(_named(own), weights={**own.get("weights", {}), **rest})
    if not isinstance(weights, BitGoal):
        return weights, None
    return weights.spec(default), weights


def _named(arguments: Mapping[str, Any]) -> BitGoal:
    try:
        return BitGoal(**arguments)
    except ConfigurationError as error:
        raise ConfigurationError(f"`weights`: {error}") from error


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
