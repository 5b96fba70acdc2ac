"""How long a model and smaller copies of it take on this machine, measured so that noise does not decide."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.isolation import batch_size_of, call, device_of, evaluating, map_tensors
from lightning_compress.core.mapping import from_mapping

_LEAST_ROUNDS, _MOST_ROUNDS = 5, 41
_SHORTEST = 2e-3


@dataclass(frozen=True)
class LatencyGoal:
    """How fast a model should be on this machine.

    One of ``ms`` and ``share`` must be given.

    Args:
        ms: Milliseconds of one forward pass.
        share: Share of what the model takes now, above 0 and at most 1.
        batch: Samples in the batch; ``None`` takes the example inputs as they are. Tensors are repeated or cut along
            their first dimension.
        threads: CPU threads.
        seconds: About how long the whole search may take on a machine that does nothing else.

    Raises:
        ConfigurationError: For a value outside its range, or both or none of ``ms`` and ``share``.

    >>> LatencyGoal(share=0.5).batch
    1
    """

    ms: float | None = None
    share: float | None = None
    batch: int | None = 1
    threads: int = 1
    seconds: float = 30.0

    def __post_init__(self) -> None:
        if (self.ms is None) == (self.share is None):
            raise ConfigurationError(
                f"`latency` needs one of `ms` and `share`, got ms={self.ms!r}, share={self.share!r}"
            )
        for name in ("ms", "share", "seconds"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
                raise ConfigurationError(f"`{name}` of `latency` must be a number above 0, got {value!r}")
        if self.share is not None and self.share > 1:
            raise ConfigurationError(f"`share` of `latency` is what remains, at most 1, got {self.share!r}")
        for name in ("batch", "threads"):
            value = getattr(self, name)
            if name == "batch" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigurationError(f"`{name}` of `latency` must be an int >= 1, got {value!r}")

    def __str__(self) -> str:
        wanted = f"{self.ms:g} ms" if self.ms is not None else f"{self.share:.3g} of the latency"
        batch = "the example inputs" if self.batch is None else f"batch {self.batch}"
        return f"{wanted} at {batch}, {self.threads} thread{'s' if self.threads > 1 else ''}"


def as_goal(latency: LatencyGoal | float | Mapping[str, Any]) -> LatencyGoal:
    """Return a goal, built from a share or from a plain mapping where those were given.

    >>> as_goal(0.5) == as_goal({"share": 0.5}), as_goal({"ms": 5, "batch": 16}).batch
    (True, 16)
    """
    if isinstance(latency, int | float) and not isinstance(latency, bool):
        return LatencyGoal(share=latency)
    if isinstance(latency, Mapping):
        return from_mapping(LatencyGoal, latency, "latency")
    if not isinstance(latency, LatencyGoal):
        raise ConfigurationError(
            f"`latency` must be a share, a mapping such as {{'ms': 5.0, 'batch': 1}}, got {latency!r}"
        )
    return latency


def batch_of(inputs: object, size: int | None) -> Any:
    """Return example inputs with ``size`` samples: repeated or cut along the first dimension, in the same layout.

    >>> batch_of(torch.arange(2), 3).tolist()
    [0, 1, 0]
    """
    given = batch_size_of(inputs)
    if size is None or not given or given == size:
        return inputs

    def resize(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0 or tensor.shape[0] != given:
            return tensor
        resized = torch.cat([tensor] * -(-size // given))[:size]
        last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
        return resized.contiguous(memory_format=torch.channels_last) if last else resized

    return map_tensors(resize, inputs)


def time_models(models: Sequence[nn.Module], inputs: object, threads: int, seconds: float) -> list[list[float]]:
    """Return milliseconds of each model in every round: interleaved, in turning order, after a warm-up.

    One thread on a CPU is timed by its processor time, which other programs do not lengthen; all else by the wall.

    Args:
        models: Modules that run on ``inputs``; they run in evaluation and inference mode.
        inputs: One batch.
        threads: CPU threads.
        seconds: About how long it may take; there are at least five rounds.
    """
    device = device_of(models[0])
    clock = clock_for(device, threads)
    with _threads(threads), evaluating(*models), torch.inference_mode(), torch.compiler.set_stance("force_eager"):
        moved = map_tensors(lambda tensor: tensor.to(device), inputs)
        runs = [partial(_run, model, moved, device) for model in models]
        warm = [min(_time(run, 1, clock) for _ in range(3)) for run in runs]
        inner = [max(1, round(_SHORTEST / max(taken, 1e-6))) for taken in warm]
        one_round = sum(taken * times for taken, times in zip(warm, inner, strict=True))
        rounds = int(min(_MOST_ROUNDS, max(_LEAST_ROUNDS, seconds / max(one_round, 1e-9))))
        found: list[list[float]] = [[] for _ in runs]
        for turn in range(rounds):
            for index in range(len(runs)) if turn % 2 == 0 else reversed(range(len(runs))):
                found[index].append(1e3 * _time(runs[index], inner[index], clock))
    return found


def clock_for(device: torch.device, threads: int) -> Callable[[], float]:
    """Return the clock for a measurement: of the processor for one thread on a CPU, of the wall for all else.

    >>> clock_for(torch.device("cpu"), 2) is time.perf_counter
    True
    """
    return time.thread_time if device.type == "cpu" and threads == 1 else time.perf_counter


def relative(times: Sequence[float], against: Sequence[float]) -> float:
    """Return the median of the ratios of two candidates in the same rounds.

    >>> relative([1.0, 2.0, 9.0], [2.0, 4.0, 4.0])
    0.5
    """
    return statistics.median(one / other for one, other in zip(times, against, strict=True))


def interpolate(bracket: Sequence[tuple[float, float]], wanted: float) -> float:
    """Return where a rising function known at the ends of a bracket should have a value, kept away from the ends.

    >>> interpolate([(0.0, 0.0), (1.0, 2.0)], 1.0), interpolate([(0.0, 0.0), (1.0, 2.0)], 2.0)
    (0.5, 0.9)
    """
    (low, below), (high, above) = bracket
    part = (wanted - below) / (above - below) if above > below else 0.5
    return low + min(0.9, max(0.1, part)) * (high - low)


def many_processes() -> bool:
    """Return whether this is one of several processes that train together."""
    return distributed.is_available() and distributed.is_initialized()


def agree(numbers: list[float]) -> list[float]:
    """Return the first process's numbers, so that all decide alike.

    >>> agree([1.5])
    [1.5]
    """
    if not many_processes():
        return numbers
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    tensor = torch.tensor(numbers, dtype=torch.float64, device=device)
    distributed.broadcast(tensor, 0)
    return tensor.tolist()


def _run(model: nn.Module, inputs: object, device: torch.device) -> None:
    call(model, inputs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _time(run: Callable[[], None], times: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(times):
        run()
    return (clock() - start) / times


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
