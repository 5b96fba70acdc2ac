"""Measured time of a forward pass: candidates interleaved in one process, with spread and a check for noise."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.isolation import batch_size_of, call, device_of, evaluating, map_tensors

_SHORTEST = 1e-3
_LEAST_REPEATS = 5
_NOISE = 1.2


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one forward pass, and how they were measured.

    Attributes:
        median, p10, p90: Milliseconds for one batch.
        batch_size: Samples in the batch; ``None`` if the inputs have no batch dimension.
        threads: CPU threads that torch was allowed to use.
        backend: How the candidate was run, for instance ``"eager"``.
        noisy: Whether something else disturbed the measurement (one thread: wall time over 1.2 times CPU time;
            else: p90 over 1.5 times p10).
        repeats: How many times were taken.
    """

    median: float
    p10: float
    p90: float
    batch_size: int | None
    threads: int
    backend: str
    noisy: bool
    repeats: int


def measure_latency(
    candidates: Mapping[str, Callable[..., Any]],
    example_inputs: object,
    *,
    warmup: int = 8,
    repeats: int = 30,
    threads: int = 1,
    budget: float = 20.0,
    backend: str = "eager",
) -> dict[str, Latency]:
    """Measure candidates against each other in one process, on the same inputs, in an order shuffled anew each round.

    Passes shorter than a millisecond are timed several at once, and the time divided. Modules run in evaluation mode
    and in inference mode; modes, random states and the number of threads are given back afterwards.

    Args:
        candidates: Modules or other callables by name.
        example_inputs: One batch: a tensor, a tuple of positional or a mapping of keyword arguments.
        warmup: Rounds before the clock starts, at least 1.
        repeats: Rounds that are timed, at least 5.
        threads: CPU threads, at least 1.
        budget: Seconds that all of it should take; slow candidates get fewer rounds, but never fewer than 5.
        backend: What to call the way the candidates run; ``"eager"`` also runs compiled modules without their graphs,
            so that a compiled and a plain candidate can be compared.

    Returns:
        The latency of each candidate.

    Raises:
        ConfigurationError: If there is no candidate, or a number is below its least value.

    >>> times = measure_latency({"short": torch.nn.Linear(4, 4), "long": lambda x: time.sleep(0.01)}, torch.zeros(2, 4))
    >>> times["short"].median < 10 <= times["long"].median, times["short"].batch_size
    (True, 2)
    """
    _check(candidates, warmup=(warmup, 1), repeats=(repeats, _LEAST_REPEATS), threads=(threads, 1))
    with _threads(threads), evaluating(*candidates.values()), torch.inference_mode(), _stance(backend):
        passes = {name: _prepare(candidate, example_inputs) for name, candidate in candidates.items()}
        single = _warm_up(passes, warmup, budget / 4)
        inner = {name: min(1000, max(1, round(_SHORTEST / max(seconds, 1e-7)))) for name, seconds in single.items()}
        round_time = sum(single[name] * inner[name] for name in passes)
        rounds = max(_LEAST_REPEATS, min(repeats, int(0.75 * budget / round_time)))
        samples = _interleave(passes, inner, rounds)
    return {
        name: _summarize(times, batch_size_of(example_inputs), threads, backend, device_of(candidates[name]).type)
        for name, times in samples.items()
    }


def _prepare(candidate: Callable[..., Any], example_inputs: object) -> Callable[[], None]:
    device = device_of(candidate)
    inputs = map_tensors(lambda tensor: tensor.to(device), example_inputs)
    if device.type == "cuda":

        def run() -> None:
            call(candidate, inputs)
            torch.cuda.synchronize(device)

        return run
    return partial(call, candidate, inputs)


def _warm_up(passes: Mapping[str, Callable[[], None]], rounds: int, budget: float) -> dict[str, float]:
    """Run each candidate a few times and return the shortest time of each in seconds."""
    start, shortest = time.perf_counter(), dict.fromkeys(passes, float("inf"))
    for _ in range(rounds):
        for name, run in passes.items():
            wall, _ = _time(run, 1)
            shortest[name] = min(shortest[name], wall)
        if time.perf_counter() - start > budget:
            break
    return shortest


def _interleave(
    passes: Mapping[str, Callable[[], None]], inner: Mapping[str, int], rounds: int
) -> dict[str, list[tuple[float, float]]]:
    order, shuffler = list(passes), random.Random(0)
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in passes}
    for _ in range(rounds):
        shuffler.shuffle(order)
        for name in order:
            samples[name].append(_time(passes[name], inner[name]))
    return samples


def _time(run: Callable[[], None], times: int) -> tuple[float, float]:
    """Return wall and CPU seconds of one pass, averaged over a few."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(times):
        run()
    return (time.perf_counter() - wall) / times, (time.process_time() - cpu) / times


def _summarize(
    times: list[tuple[float, float]], batch_size: int | None, threads: int, backend: str, device: str
) -> Latency:
    walls = [wall for wall, _ in times]
    tenths = statistics.quantiles(walls, n=10, method="inclusive")
    if threads == 1 and device == "cpu":
        noisy = sum(walls) > _NOISE * sum(cpu for _, cpu in times)
    else:
        noisy = tenths[-1] > 1.5 * tenths[0]
    return Latency(
        median=1e3 * statistics.median(walls),
        p10=1e3 * tenths[0],
        p90=1e3 * tenths[-1],
        batch_size=batch_size,
        threads=threads,
        backend=backend,
        noisy=noisy,
        repeats=len(walls),
    )


def _stance(backend: str) -> AbstractContextManager[object]:
    return torch.compiler.set_stance("force_eager") if backend == "eager" else nullcontext()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check(candidates: Mapping[str, object], **numbers: tuple[int, int]) -> None:
    if not candidates:
        raise ConfigurationError("`candidates`: expected at least one module or function by name, got none.")
    for name, (value, least) in numbers.items():
        if value < least:
            raise ConfigurationError(f"`{name}`: expected at least {least}, got {value}.")
