"""Training data that brings the teacher's stored outputs along, and the check that they belong to its inputs."""

from __future__ import annotations

import copy
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.isolation import same_randomness
from lightning_compress.distillation.cached_batch import CachedBatch

PROBES = 16
"""Samples that are read twice before anything is written or trained."""


class Outputs(Protocol):
    """Rows of stored outputs and the checksums of the inputs they were computed from."""

    checksums: np.ndarray

    def rows(self, indices: Sequence[int]) -> Tensor:
        """Return the outputs of some samples, (n, ...)."""

    def __len__(self) -> int: ...


def input_checksum(sample: Any) -> int:
    """Return a 32-bit checksum (CRC-32) of the inputs of one sample, bit for bit.

    Args:
        sample: Its inputs are the first element of a tuple or list, else all of it; tensors, arrays, images, numbers
            and strings in any nesting.

    Raises:
        ConfigurationError: If something in it has no bytes to look at.

    >>> input_checksum((torch.zeros(3), 1)) == input_checksum((torch.zeros(3), 2)) != input_checksum(torch.ones(3))
    True
    """
    inputs = sample[0] if isinstance(sample, tuple | list) and sample else sample
    checksum = 0
    for leaf in _leaves(inputs):
        checksum = zlib.crc32(_bytes(leaf), checksum)
    return checksum


def row_of(batch: Any, row: int) -> Any:
    """Return one sample of a batch of any nesting, as views.

    >>> row_of((torch.tensor([1, 2]), {"a": torch.tensor([3, 4])}), 1)
    (tensor(2), {'a': tensor(4)})
    """
    if isinstance(batch, Mapping):
        return {key: row_of(value, row) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(row_of(value, row) for value in batch)
    return batch[row] if isinstance(batch, Tensor | np.ndarray) else batch


class PairedDataset(Dataset[Any], ABC):
    """A map-style data set that hands out each sample with one tensor beside it.

    Args:
        dataset: Has a length and takes indices. If its ``__getitems__`` returns something else than a list, that is
            taken as a finished batch.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    @abstractmethod
    def beside(self, indices: Sequence[int], found: Any) -> Tensor:
        """Return one row per sample; ``found`` is a list of samples or a finished batch."""

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> CachedBatch:
        """Return one sample and its row."""
        sample = self.dataset[index]
        return CachedBatch(sample, self.beside([index], [sample])[0])

    def __getitems__(self, indices: Sequence[int]) -> Any:
        """Return a list of samples with their rows, or one finished batch if the data set makes them."""
        whole = getattr(self.dataset, "__getitems__", None)  # as torch's own fetcher does
        found = [self.dataset[index] for index in indices] if whole is None else whole(indices)
        rows = self.beside(indices, found)
        if isinstance(found, list):
            return [CachedBatch(sample, row) for sample, row in zip(found, rows, strict=True)]
        return CachedBatch(found, rows)


class ChecksummedDataset(PairedDataset):
    """A data set whose samples come with the checksums of their inputs, while their outputs are being computed."""

    def beside(self, indices: Sequence[int], found: Any) -> Tensor:
        """Return the checksums, (n,)."""
        samples = found if isinstance(found, list) else [row_of(found, row) for row in range(len(indices))]
        return torch.tensor([input_checksum(sample) for sample in samples])


class CachedDataset(PairedDataset):
    """A map-style data set that hands out each sample with the teacher's stored output.

    The default ``collate_fn`` of a ``DataLoader`` makes batches of it; wrap your own in :class:`CachedCollate`, or let
    :func:`cached_loader` do both. The inputs of one sample per batch are compared with what the teacher saw.

    Args:
        dataset: Has a length and takes indices. If its ``__getitems__`` returns something else than a list, that is
            taken as a finished batch.
        cache: A :class:`~lightning_compress.distillation.cache.TeacherCache` of the same data set.

    Raises:
        ConfigurationError: If the lengths differ; later, if a sample is not the one that the teacher saw.
    """

    def __init__(self, dataset: Any, cache: Outputs) -> None:
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise ConfigurationError(
                f"`dataset` must be map-style, with a length and indices, to look outputs up; got "
                f"{type(dataset).__name__}; let the teacher run along without a cache"
            )
        if len(dataset) != len(cache):
            raise ConfigurationError(
                f"`cache` holds outputs of {len(cache)} samples, the data set has {len(dataset)}; it belongs to other "
                "data: write another one"
            )
        super().__init__(dataset)
        self.cache = cache

    def beside(self, indices: Sequence[int], found: Any) -> Tensor:
        """Return the stored outputs (n, ...), after a look at the first sample's inputs."""
        sample = found[0] if isinstance(found, list) else row_of(found, 0)
        if input_checksum(sample) != int(self.cache.checksums[indices[0]]):
            raise ConfigurationError(
                f"`cache`: sample {int(indices[0])} of the training data is not what the teacher saw, so its stored "
                "output is wrong for it. If the data are augmented at random, turn that off (`data.augment=null` in a "
                "recipe) or let the teacher run along without a cache; if the data changed, write the cache anew"
            )
        return self.cache.rows(indices)


class CachedCollate:
    """A ``collate_fn`` for :class:`CachedDataset` around one's own, which keeps getting the plain samples.

    Args:
        collate_fn: Makes a batch of a list of samples, or passes a finished batch on.

    Raises:
        ConfigurationError: When called, if ``collate_fn`` changes the first sample's inputs (as mixup does).
    """

    def __init__(self, collate_fn: Callable[[Any], Any] = default_collate) -> None:
        self.collate_fn = collate_fn

    def __call__(self, samples: Any) -> CachedBatch:
        """Return the batch and its outputs."""
        if isinstance(samples, CachedBatch):
            return CachedBatch(self.collate_fn(samples.training_batch), samples.outputs)
        plain = [sample.training_batch for sample in samples]
        batch = self.collate_fn(plain)
        before, after = (next(_leaves(one), None) for one in (plain[0], row_of(batch, 0)))
        if (
            isinstance(before, Tensor)
            and isinstance(after, Tensor)
            and before.shape == after.shape
            and not torch.equal(before, after.to(before))
        ):
            raise ConfigurationError(
                "`collate_fn` changes the inputs (mixup?), so the teacher's stored outputs are wrong for them; let the "
                "teacher run along without a cache"
            )
        return CachedBatch(batch, torch.stack([sample.outputs for sample in samples]))


def cached_loader(loader: DataLoader[Any], cache: Outputs) -> DataLoader[Any]:
    """Return a copy of ``loader`` whose batches are :class:`CachedBatch`; order, workers and position stay its own.

    Sixteen samples are read as training would read them, and refused now if they differ from what the teacher saw.

    Args:
        loader: Over a map-style data set, forming batches itself.
        cache: Of the same data set.

    Raises:
        ConfigurationError: If the loader has no batches or indices, or the data are augmented or other ones.
    """
    check_loader(loader)
    paired = CachedDataset(loader.dataset, cache)
    for index in probe_indices(loader):
        with same_randomness():
            paired[index]
    twin = copy.copy(loader)
    for name in [name for name in vars(twin) if name.startswith("__")]:
        del vars(twin)[name]  # what a Trainer noted of the original's construction, to build one like it
    vars(twin)["dataset"] = paired  # a DataLoader refuses to have it assigned, as another sampler may belong to it
    twin.collate_fn = CachedCollate(loader.collate_fn)
    return twin


def check_loader(loader: Any) -> None:
    """Raise unless samples of ``loader`` have numbers and it forms the batches.

    Raises:
        ConfigurationError: For anything but a DataLoader over a map-style data set with a batch size.
    """
    if not isinstance(loader, DataLoader):
        raise ConfigurationError(
            f"`loader` must be a torch DataLoader, got {type(loader).__name__}; wrap your data set in CachedDataset, "
            "or let the teacher run along without a cache"
        )
    if not hasattr(loader.dataset, "__getitem__") or not hasattr(loader.dataset, "__len__"):
        raise ConfigurationError(
            f"`loader` reads a {type(loader.dataset).__name__}, whose samples have no numbers to look stored outputs "
            "up by; let the teacher run along without a cache"
        )
    if loader.batch_sampler is None:
        raise ConfigurationError(
            "`loader` has `batch_size=None`: the data set forms the batches, so samples have no numbers of their own; "
            "let the loader form them"
        )


def probe_indices(loader: DataLoader[Any]) -> list[int]:
    """Return the first indices that a loader's sampler would draw, and leave its random states as they are."""
    generator = getattr(loader.sampler, "generator", None)
    state = None if generator is None else generator.get_state()
    with same_randomness():
        indices = list(islice(iter(loader.sampler), PROBES))
    if generator is not None and state is not None:
        generator.set_state(state)
    return indices


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _bytes(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    if hasattr(leaf, "tobytes"):
        return leaf.tobytes()
    if isinstance(leaf, int | float | str | bytes | None):
        return repr(leaf).encode()
    raise ConfigurationError(
        f"`dataset` gives inputs with a {type(leaf).__name__} in them, which cannot be compared with what the teacher "
        "saw; give tensors, or let the teacher run along without a cache"
    )
