"""Timing the training steps of several fits side by side: one process each, of which only one runs at a time."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from benchmarks._common import Times

SETTLE = 2  # first steps of a turn that are not kept
_DONE, _FAILED = "done", "failed"
_KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_MMAP_THRESHOLD_": str(1 << 40)}


class Pacer(Callback):
    """Stops a fit every few training batches until it is its turn, and times its steps in between.

    Goes first in the fit's list of callbacks, so that a step is timed from its own start to the next one's, with all
    that callbacks do in between.

    Args:
        line: To the process that gives the turns.
        burst: Steps of a turn.
    """

    def __init__(self, line: Connection, burst: int) -> None:
        self._line, self._burst = line, burst
        self._times: list[tuple[float, float]] = []
        self._started: tuple[float, float] | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the time; at the end of a turn hand over, and note the time again when the turn comes back."""
        wall, cpu = time.perf_counter(), time.process_time()
        if self._started is not None:
            self._times.append((wall - self._started[0], cpu - self._started[1]))
        if len(self._times) % self._burst == 0:
            self._line.send(self._times)
            self._line.recv()
            self._times = []
        self._started = time.perf_counter(), time.process_time()


def _work(line: Connection, fit: Callable[[Callback, int], None], steps: int, burst: int, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        fit(Pacer(line, burst), steps)
    except BaseException:
        line.send((_FAILED, traceback.format_exc()))
        raise
    line.send((_DONE, ""))


class _Fit:
    def __init__(self, fit: Callable[[Callback, int], None], steps: int, burst: int, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._line, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, fit, steps, burst, threads), daemon=True)
        self.process.start()
        theirs.close()
        self.times: list[list[tuple[float, float]]] = []

    def turn(self) -> None:
        """Let the fit take its next steps, or come to its end."""
        self._line.send(None)
        self.take()

    def take(self) -> None:
        """Wait for the end of a turn."""
        try:
            got = self._line.recv()
        except EOFError:
            raise RuntimeError("a timed fit ended without a word; was its process killed?") from None
        if isinstance(got, list):
            self.times.append(got)
        elif got[0] == _FAILED:
            raise RuntimeError(f"a timed fit failed:\n{got[1]}")


@contextmanager
def _keeping_memory() -> Iterator[None]:
    """Let processes that are started keep what they free, where they use the allocator of glibc."""
    before = {key: os.environ.get(key) for key in _KEEP_MEMORY}
    os.environ.update(_KEEP_MEMORY)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def time_in_turns(
    fits: Mapping[str, Callable[[Callback, int], None]],
    rounds: int,
    burst: int = 6,
    threads: int = 1,
    seed: int = 0,
) -> dict[str, tuple[Times, Times]]:
    """Return wall and processor seconds of a training step of every fit: one median a round.

    Each fit lives in a process of its own, as it does for its users: its main thread, its memory pool, its threads. A
    round gives every fit a burst of steps, in an order shuffled anew, so that whatever else the machine does falls on
    all of them alike. The first two steps of a burst bring the fit's tensors back into the caches, where a fit that
    runs alone has them, and are not kept; neither is the first round. Processor time is that of all threads of the
    process. No fit gives memory back to the system while it runs: which of them would, and so pay for fresh pages in
    every step, depends on the order of all that was ever allocated (seen: 36 or 45 ms a step for the same fit).

    Args:
        fits: Called in the new process with a callback, to be put first in the Trainer's list, and the number of steps
            to train for. Must be picklable: a function of a module, or a ``functools.partial`` of one.
        rounds: Rounds that are kept, at least 1.
        burst: Steps of each fit in a round, at least 3.
        threads: Threads of torch in each fit.
        seed: Of the order.

    Raises:
        RuntimeError: If a fit fails; with its traceback.
    """
    steps = burst * (rounds + 1) + 1
    running: dict[str, _Fit] = {}
    try:
        with _keeping_memory():
            for name, fit in fits.items():
                running[name] = _Fit(fit, steps, burst, threads)
        for one in running.values():
            one.take()
        order, rng = list(fits), random.Random(seed)
        for _ in range(rounds + 2):
            rng.shuffle(order)
            for name in order:
                running[name].turn()
    finally:
        for one in running.values():
            one.process.terminate()
            one.process.join()
    kept = {name: np.array(one.times[2:])[:, SETTLE:] for name, one in running.items()}
    return {name: (np.median(t[..., 0], axis=1), np.median(t[..., 1], axis=1)) for name, t in kept.items()}
