"""An order of samples that depends on seed and epoch alone, and a loader that resumes inside an epoch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from typing import Any

import numpy as np
import torch
from torch import distributed
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, SequentialSampler

from lightning_compress.core.errors import ConfigurationError


def stream_key(seed: int, epoch: int) -> int:
    """Mix seed and epoch into one 63-bit number, so that (0, 1) and (1, 0) draw unrelated random numbers.

    Args:
        seed: Seed of the run, any integer >= 0.
        epoch: Epoch, counted from 0.

    >>> stream_key(0, 1) == stream_key(1, 0)
    False
    """
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0] >> np.uint64(1))


class KeyedIndex(int):
    """An index that carries the key of its epoch's random stream, also into worker processes.

    Attributes:
        key: ``stream_key(seed, epoch)``.
    """

    key: int

    def __new__(cls, index: int, key: int) -> KeyedIndex:
        """Return ``index`` with ``key`` attached."""
        self = super().__new__(cls, index)
        self.key = key
        return self

    def __reduce__(self) -> tuple[type[KeyedIndex], tuple[int, int]]:
        return KeyedIndex, (int(self), self.key)


class EpochSampler(DistributedSampler[KeyedIndex]):
    """Draws an order that depends on (seed, epoch) alone; each rank takes its share of the same permutation.

    It is a ``DistributedSampler``, so Lightning calls ``set_epoch`` and leaves it in place; rank and world size are
    looked up when the iteration begins. As with its base, shares are made equal by repeating the first samples, or by
    leaving out the last with ``drop_last``.

    Args:
        dataset: Anything with a length.
        shuffle: ``False`` keeps the order of the data set.
        seed: Seed of the order, >= 0.
        drop_last: Leave out the samples that do not fill a whole share.

    >>> sampler = EpochSampler(range(4), seed=0)
    >>> first = list(sampler); sampler.set_epoch(1); second = list(sampler)
    >>> sorted(first) == sorted(second) == [0, 1, 2, 3], list(sampler) == second
    (True, True)
    """

    def __init__(self, dataset: Sized, shuffle: bool = True, seed: int = 0, drop_last: bool = False) -> None:
        if seed < 0:
            raise ConfigurationError(f"`seed` must be an integer >= 0, got {seed}")
        self.source = dataset
        super().__init__(_Length(len(dataset)), num_replicas=1, rank=0, shuffle=shuffle, seed=seed, drop_last=drop_last)
        self.start = 0

    @staticmethod
    def world() -> tuple[int, int]:
        """Return (rank, world size) of this process, (0, 1) outside distributed runs."""
        if distributed.is_available() and distributed.is_initialized():
            return distributed.get_rank(), distributed.get_world_size()
        return 0, 1

    def __len__(self) -> int:
        """Return this rank's number of samples in a whole epoch."""
        _, world = self.world()
        total = len(self.source)
        return total // world if self.drop_last else -(-total // world)

    def __iter__(self) -> Iterator[KeyedIndex]:
        """Yield this rank's indices from position ``start`` on; ``start`` applies once."""
        rank, world = self.world()
        total, key = len(self.source), stream_key(self.seed, self.epoch)
        order = torch.arange(total)
        if self.shuffle:
            order = torch.randperm(total, generator=torch.Generator().manual_seed(key))
        wanted = len(self) * world
        while 0 < len(order) < wanted:
            order = torch.cat([order, order[: wanted - len(order)]])
        start, self.start = self.start, 0
        return iter([KeyedIndex(index, key) for index in order[rank:wanted:world][start:].tolist()])


class _Length(Dataset[int]):
    """The length of a data set, which is all that a sampler needs of it."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length


class ResumableLoader(DataLoader):
    """A DataLoader that knows its place: order from (seed, epoch), and continuing after the last batch it handed out.

    Lightning saves the state of such a loader in every checkpoint. The position counts batches that were handed out,
    not those that workers have fetched ahead, so it is right for any ``num_workers``.

    Args:
        dataset: A map-style data set.
        batch_size: Samples per batch and rank.
        shuffle: ``False`` keeps the order of the data set.
        seed: Seed of the order and of the workers' own random states.
        drop_last: Leave out an incomplete last batch.
        sampler: For Lightning's use when it rebuilds a loader: an ``EpochSampler``, or a ``SequentialSampler``, which
            turns shuffling off.
        **options: Further arguments of ``DataLoader``.

    Raises:
        ConfigurationError: If another sampler or a batch sampler is given, or ``batch_size`` is not positive.

    >>> loader = ResumableLoader(range(6), batch_size=2, seed=3)
    >>> whole = [batch.tolist() for batch in loader]
    >>> batches = iter(loader); _ = next(batches); state = loader.state_dict()
    >>> again = ResumableLoader(range(6), batch_size=2); again.load_state_dict(state)
    >>> [batch.tolist() for batch in again] == whole[1:]
    True
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        sampler: Sampler | None = None,
        **options: Any,
    ) -> None:
        if sampler is not None and not isinstance(sampler, EpochSampler | SequentialSampler):
            raise ConfigurationError(
                f"`sampler` of a ResumableLoader must be an EpochSampler, got {type(sampler).__name__}: it draws "
                "its own order; pass `shuffle` and `seed`, or use a plain DataLoader"
            )
        if options.pop("batch_sampler", None) is not None:
            raise ConfigurationError("`batch_sampler` cannot be resumed by position; use a plain DataLoader for it")
        if batch_size is None or batch_size < 1:
            raise ConfigurationError(f"`batch_size` must be an integer >= 1, got {batch_size}")
        if not isinstance(sampler, EpochSampler):
            sampler = EpochSampler(dataset, shuffle and sampler is None, seed, drop_last)
        options.setdefault("generator", torch.Generator())
        super().__init__(dataset, batch_size, sampler=sampler, drop_last=drop_last, **options)
        self.order = sampler
        self._epoch, self._batch, self._resuming = 0, 0, False

    def __iter__(self) -> Any:
        """Yield the batches of the sampler's epoch, from the loaded position on if that lies in this epoch.

        Nothing is fetched before the first batch is asked for: Lightning makes its iterator before it sets the epoch.
        """
        first = self._batch if self._resuming and self._epoch == self.order.epoch else 0
        self._epoch, self._batch, self._resuming = self.order.epoch, first, False
        self.order.start = first * (self.batch_size or 1)
        self.generator.manual_seed(stream_key(self.order.seed, self._epoch))
        for batch in super().__iter__():
            self._batch += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the position as plain numbers: epoch, batches handed out in it, and what the order depends on."""
        return {"epoch": self._epoch, "batch": self._batch, **self._layout(), "seed": self.order.seed}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from ``state``; its seed replaces this loader's, so that the order is the interrupted run's.

        Args:
            state: What ``state_dict`` returned.

        Raises:
            ConfigurationError: If the position lies inside an epoch and the data set's length, the batch size or the
                number of processes is another one now, so that it cannot be found again.
        """
        layout = self._layout()
        changed = [name for name, value in layout.items() if state[name] != value]
        if changed and 0 < state["batch"] < -(-state["samples"] // (state["batch_size"] * state["processes"])):
            before = ", ".join(f"{name} {state[name]} (now {layout[name]})" for name in changed)
            raise ConfigurationError(
                f"`ckpt_path` names a checkpoint from inside epoch {state['epoch']} taken with {before}; "
                "resume with the same values, or from a checkpoint at the end of an epoch"
            )
        self.order.seed = state["seed"]
        self.order.set_epoch(state["epoch"])
        self._epoch, self._batch, self._resuming = state["epoch"], state["batch"], True

    def _layout(self) -> dict[str, int]:
        samples = len(self.order.source)
        return {"samples": samples, "batch_size": self.batch_size or 1, "processes": self.order.world()[1]}
