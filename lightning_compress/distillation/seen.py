"""What one run of the student showed: its output, and the features that losses look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_compress.core.copies import tensors_in
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.distillation.pairs import LayerPair
from lightning_compress.distillation.taps import Record, pick, split_spec
from lightning_compress.distillation.teacher import Answer


@dataclass(frozen=True)
class Seen:
    """One run of the student.

    Args:
        args: Positional inputs of its forward.
        kwargs: Keyword inputs.
        output: The tensor that it returned, the main one if there are several.
        heads: All tensors that it returned, in order.
        features: What each tap gave, by ``"path:key"``: one tensor a call of the layer.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Tensor
    heads: tuple[Tensor, ...]
    features: Mapping[str, tuple[Tensor, ...]]

    def features_of(self, specs: Sequence[str]) -> tuple[Tensor, ...]:
        """Return the tensors of some taps, in order; several for a layer that was called several times."""
        return tuple(tensor for spec in specs for tensor in self.features[spec])

    def partners(self, pairs: Sequence[LayerPair], answer: Answer | None) -> tuple[Tensor, ...]:
        """Return the teacher's tensors for :meth:`features_of` the student's.

        Raises:
            ConfigurationError: If the teacher did not run a layer, or not as often as the student.
        """
        found: list[Tensor] = []
        for pair in pairs:
            path, key = split_spec(pair.teacher)
            outputs = () if answer is None else answer.features.get(path, ())
            ours = self.features[pair.student]
            if len(outputs) != len(ours):
                raise ConfigurationError(
                    f"`pairs`: the student ran {pair.student!r} {_times(len(ours))} and the teacher ran "
                    f"{pair.teacher!r} {_times(len(outputs))}; compare layers that run equally often"
                )
            device = self.output.device
            found += [pick(value, key, f"the teacher's {path!r}").to(device) for value in outputs]
        return tuple(found)

    def detached(self) -> Seen:
        """Return the same with tensors that are leaves of their own, so that gradients stop there."""

        def cut(tensor: Tensor) -> Tensor:
            return tensor.detach().requires_grad_(tensor.requires_grad)

        features = {spec: tuple(map(cut, tensors)) for spec, tensors in self.features.items()}
        heads = tuple(map(cut, self.heads))
        output = next(new for old, new in zip(self.heads, heads, strict=True) if old is self.output)
        return Seen(self.args, self.kwargs, output, heads, features)


def collect(record: Record, output: str, pairs: Mapping[str, Sequence[LayerPair]], key: str = "") -> tuple[Seen, ...]:
    """Return what each run of the student showed.

    Args:
        record: The calls of the tapped layers.
        output: The path whose every call is one run.
        pairs: The taps of each loss.
        key: Which of several outputs is compared; the main one by default.

    Raises:
        ConfigurationError: If a layer did not run, or not equally often in every run.
    """
    runs = record[output]
    specs = dict.fromkeys(pair.student for some in pairs.values() for pair in some)
    shares: dict[str, int] = {}
    for spec in specs if runs else ():
        calls = len(record[split_spec(spec)[0]])
        if calls == 0 or calls % len(runs):
            raise ConfigurationError(
                f"`pairs`: the student ran its layer {spec!r} {_times(calls)} while it gave {len(runs)} output(s); "
                "name a layer that runs each time"
            )
        shares[spec] = calls // len(runs)
    return tuple(
        Seen(
            run.args,
            run.kwargs,
            pick(run.output, key, "the student"),
            tuple(tensors_in(_parts(run.output))),
            {spec: _features(record, spec, index, share) for spec, share in shares.items()},
        )
        for index, run in enumerate(runs)
    )


def element_of(output: Any, chosen: Tensor) -> str:
    """Return which part of an output was chosen, as text; empty for a single tensor.

    >>> parts = (Tensor([0.0]), Tensor([1.0]))
    >>> element_of(parts, parts[0]), element_of({"logits": parts[1]}, parts[1]), element_of(parts[0], parts[0])
    (':0 of 2', ':logits', '')
    """
    if isinstance(output, Mapping):
        return next((f":{key}" for key, value in output.items() if value is chosen), "")
    if isinstance(output, tuple | list) and len(output) > 1:
        return next((f":{index} of {len(output)}" for index, value in enumerate(output) if value is chosen), "")
    return ""


def _parts(output: Any) -> Any:
    """Return an output object (a dataclass) as the mapping of its attributes, so that its tensors can be listed."""
    return output if isinstance(output, Tensor | Mapping | tuple | list) else vars(output)


def _features(record: Record, spec: str, index: int, share: int) -> tuple[Tensor, ...]:
    path, key = split_spec(spec)
    calls = record[path][index * share : (index + 1) * share]
    return tuple(pick(call.output, key, f"the student's {path!r}") for call in calls)


def _times(count: int) -> str:
    return {0: "not at all", 1: "once", 2: "twice"}.get(count, f"{count} times")
