"""The teacher's outputs on disk: computed once, memory-mapped, looked up by sample number.

A cache is a folder of three files: ``outputs.npy`` (samples, ...), ``checksums.npy`` (samples,) of the inputs, and
``cache.json`` with what they belong to and how many rows are done. With a data set and loader of your own::

    cache = cache_teacher(teacher, loader, "teacher_cache")  # the second time it is only opened and checked
    trainer.fit(DistillationModule(student, cache, ...), cached_loader(loader, cache))

It is right only if a sample number stands for the same inputs in every epoch: no random augmentation. Both functions
read some samples twice and refuse others, and so does every later batch. What changes inputs after the loader
(``on_after_batch_transfer``) is out of their sight.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader

from lightning_compress.core.errors import ArtifactError, ConfigurationError, did_you_mean
from lightning_compress.core.isolation import evaluating
from lightning_compress.core.progress import slow
from lightning_compress.distillation.cache_checks import (
    Forward,
    check_match,
    check_rows,
    check_steady,
    collated,
    inputs_of,
    length_of,
    storable,
    teacher_forward,
)
from lightning_compress.distillation.cache_files import (
    DTYPES,
    CacheFacts,
    create_arrays,
    open_arrays,
    read_facts,
    write_facts,
)
from lightning_compress.distillation.cached_batch import take_cached
from lightning_compress.distillation.cached_data import CachedCollate, ChecksummedDataset, check_loader
from lightning_compress.distillation.teacher import Answer, Question, Teacher

_RECORD_EVERY = 5.0  # seconds
_PATIENCE = 900.0  # seconds without progress after which a waiting process gives up


class TeacherCache(Teacher):
    """Stored outputs of a teacher, mapped into memory, as a teacher of its own that never runs.

    It answers for training batches that :func:`cached_loader` made, and for nothing else; it has no features. It
    pickles as its path, so that workers map the file too.

    Args:
        path: The folder that :func:`cache_teacher` wrote.

    Attributes:
        facts: What the outputs belong to.
        checksums: Of the inputs, (samples,).

    Raises:
        ArtifactError: If the folder holds no cache, or one that is unfinished, damaged or of a newer version.
    """

    has_validation = False

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        facts = read_facts(self.path)
        if facts is None:
            raise ArtifactError(f"`path` {str(self.path)!r} holds no teacher cache; write one with `cache_teacher`")
        self.facts = facts
        self.outputs, self.checksums = open_arrays(self.path, facts, "r")
        self._rows = np.asarray(self.outputs)  # a plain view, which is quicker to index
        if facts.done < facts.samples:
            raise ArtifactError(
                f"`path` {str(self.path)!r}: {facts.done} of {facts.samples} outputs are written; call `cache_teacher` "
                "again, which goes on where it stopped"
            )

    def __len__(self) -> int:
        return self.facts.samples

    def rows(self, indices: Sequence[int]) -> Tensor:
        """Return the outputs of some samples as float32, (n, ...)."""
        chosen = self._rows[np.asarray(indices, np.int64)]
        return torch.from_numpy(chosen.astype(np.float32))

    def split(self, batch: Any) -> tuple[Any, Any]:
        """Take the stored outputs off a batch."""
        return take_cached(batch)

    def answer(self, question: Question) -> Answer | None:
        """Return the stored outputs of a training batch.

        Raises:
            ConfigurationError: If the batch brings none.
        """
        if not question.training:
            return None
        if question.extra is None:
            raise ConfigurationError(
                "`teacher` is a cache, but the training batches bring no stored outputs; train on "
                "`cached_loader(loader, cache)`, or on a loader over `CachedDataset(dataset, cache)`"
            )
        return Answer(question.extra)

    def fingerprint(self) -> str:
        """Return the teacher's fingerprint."""
        return self.facts.teacher

    def __reduce__(self) -> tuple[type[TeacherCache], tuple[Path]]:
        return type(self), (self.path,)


def cache_teacher(
    teacher: Callable[..., Any],
    loader: DataLoader[Any],
    path: str | Path,
    dtype: Literal["float16", "float32"] = "float16",
    name: str | None = None,
    inputs: Callable[[Any], Any] | None = None,
) -> TeacherCache:
    """Store what ``teacher`` says about every sample of a loader's data set, once; go on where a killed run stopped.

    The data set is read in order with the loader's ``collate_fn``, batch size and workers; the teacher runs where it
    lies, in evaluation mode and without gradients. In a distributed run the first process writes and the others wait,
    so the folder must be one that all of them see.

    Args:
        teacher: A module, a :class:`Teacher`, or any function of a batch's inputs, that gives one tensor (batch, ...).
        loader: The training loader, over a map-style data set without random augmentation.
        path: Folder of the cache.
        dtype: ``"float16"`` (half the size, three digits) or ``"float32"``.
        name: What tells this teacher from others, for one that is not a module with tensors.
        inputs: Takes a batch to the teacher's input; by default its first element if it is a tuple or list.

    Returns:
        The complete cache.

    Raises:
        ConfigurationError: If samples differ between two reads, the outputs cannot be stored, or the cache at ``path``
            is of another teacher, data set or dtype.
        ArtifactError: If the cache at ``path`` is damaged.

    >>> import tempfile
    >>> data = torch.utils.data.TensorDataset(torch.arange(6.0).reshape(3, 2), torch.zeros(3))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     cache_teacher(lambda x: x.sum(1, keepdim=True), DataLoader(data), folder, name="sum").rows([2, 0])
    tensor([[9.],
            [1.]])
    """
    if dtype not in DTYPES:
        raise ConfigurationError(f"`dtype` is unknown: {dtype!r}; {did_you_mean(str(dtype), DTYPES)}")
    check_loader(loader)
    check_steady(loader)
    path, fingerprint = Path(path), teacher_fingerprint(teacher, name)
    with torch.no_grad(), evaluating(teacher):
        forward = teacher_forward(teacher, inputs or inputs_of)
        shape = tuple(forward(collated(loader, [0])).shape[1:])
        wanted = CacheFacts(length_of(loader), fingerprint, dtype, shape)
        found = read_facts(path)
        if found is not None:
            check_match(path, found, wanted)
            check_rows(path, found, loader, forward)
        if _rank() == 0:
            if found is None:
                create_arrays(path, wanted)
            _write(path, found or wanted, loader, forward)
        else:
            _wait(path, wanted)
    return TeacherCache(path)


def teacher_fingerprint(teacher: Any, name: str | None = None) -> str:
    """Return the SHA-256 of a module's tensors with their names, a Teacher's own, or ``name`` for anything else.

    Raises:
        ConfigurationError: If there is neither.

    >>> linear = nn.Linear(2, 1)
    >>> before = teacher_fingerprint(linear); _ = nn.init.ones_(linear.weight)
    >>> before == teacher_fingerprint(linear), teacher_fingerprint(max, "largest")
    (False, 'largest')
    """
    own = teacher.fingerprint() if isinstance(teacher, Teacher) else ""
    if own:
        return f"{name or ''}{own}"
    state = teacher.state_dict() if isinstance(teacher, nn.Module) else {}
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors and not name:
        raise ConfigurationError(
            "`name` is needed for a teacher without tensors of its own, as the cache must notice when it is another "
            "one; give any word that changes with the teacher"
        )
    if not tensors:
        return str(name)
    digest = hashlib.sha256(str(name or "").encode())
    for key, value in tensors.items():
        digest.update(f"{key} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write(path: Path, facts: CacheFacts, loader: DataLoader[Any], forward: Forward) -> None:
    """Compute the rows that are missing; what is done is recorded every few seconds, and when interrupted."""
    arrays = outputs, checksums = open_arrays(path, facts, "r+")
    done, recorded = facts.done, time.monotonic()

    def record() -> None:
        for array in arrays:
            array.flush()
        write_facts(path, replace(facts, done=done))

    reader = DataLoader(
        ChecksummedDataset(loader.dataset),
        loader.batch_size or 1,
        sampler=range(done, facts.samples),
        num_workers=loader.num_workers,
        collate_fn=CachedCollate(loader.collate_fn),
        generator=torch.Generator(),
    )
    try:
        for batch in slow(reader, "The teacher's outputs"):
            rows = storable(forward(batch.training_batch), facts, len(batch.outputs))
            outputs[done : done + len(rows)] = rows
            checksums[done : done + len(rows)] = batch.outputs.numpy()
            done += len(rows)
            if time.monotonic() - recorded > _RECORD_EVERY:
                record()
                recorded = time.monotonic()
    finally:
        if done > facts.done:
            record()


def _wait(path: Path, wanted: CacheFacts) -> None:
    """Wait until the first process has written everything."""
    done, changed = -1, time.monotonic()
    while done < wanted.samples:
        found = read_facts(path)
        if found is not None and found.done > done:
            check_match(path, found, wanted)
            done, changed = found.done, time.monotonic()
        elif time.monotonic() - changed > _PATIENCE:
            raise ConfigurationError(
                f"`path` {str(path)!r}: no progress for {_PATIENCE:.0f} s while waiting for the first process to write "
                "the teacher's outputs; is the folder one that all processes see?"
            )
        time.sleep(0.0 if done == wanted.samples else 0.2)


def _rank() -> int:
    """Return this process's number, also before the processes have found each other."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank()
    return next((int(os.environ[key]) for key in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if key in os.environ), 0)
