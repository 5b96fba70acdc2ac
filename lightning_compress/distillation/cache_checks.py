"""What must hold before a teacher's outputs are stored, or stored ones are used again."""

from __future__ import annotations

from collections.abc import Callable, Sized
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.isolation import call, device_of, map_tensors, same_randomness
from lightning_compress.distillation.cache_files import CacheFacts, open_arrays
from lightning_compress.distillation.cached_data import input_checksum, probe_indices
from lightning_compress.distillation.teacher import Question, Teacher

TOLERANCE = 0.02
"""Of the largest stored output: what half precision and another device may change, and another teacher exceeds."""

Forward = Callable[[Any], Tensor]


def check_steady(loader: DataLoader[Any]) -> None:
    """Read some samples twice, by their number and as the training would.

    Raises:
        ConfigurationError: If two reads give different inputs.
    """
    for index in probe_indices(loader):
        with same_randomness():
            reads = [loader.dataset[number] for number in (int(index), index, index)]
        if len({input_checksum(sample) for sample in reads}) > 1:
            raise ConfigurationError(
                f"`loader`: sample {int(index)} differs between two reads, so the data are augmented at random and "
                "stored outputs would be wrong for them; turn that off (`data.augment=null` in a recipe), or let the "
                "teacher run along without a cache"
            )


def check_match(path: Path, found: CacheFacts, wanted: CacheFacts) -> None:
    """Compare what a cache belongs to with what is wanted.

    Raises:
        ConfigurationError: If teacher, length of the data, dtype or shape differ; says which.
    """
    words = {"samples": "data of another length", "teacher": "another teacher", "dtype": "another `dtype`"}
    words["shape"] = "outputs of another shape"
    for field, what in words.items():
        was, now = getattr(found, field), getattr(wanted, field)
        if was != now:
            short = [str(value)[:16] for value in (was, now)]
            raise ConfigurationError(
                f"`path` {str(path)!r} holds a cache of {what} ({field} {short[0]}, now {short[1]}); delete the folder "
                "or give another path"
            )


def check_rows(path: Path, found: CacheFacts, loader: DataLoader[Any], forward: Forward) -> None:
    """Compute four of the stored rows again.

    Raises:
        ConfigurationError: If the inputs or the outputs are other ones.
    """
    outputs, checksums = open_arrays(path, found, "r")
    for index in sorted({round(place * (found.done - 1)) for place in (0, 1 / 3, 2 / 3, 1)} if found.done else ()):
        batch = collated(loader, [index])
        if input_checksum(loader.dataset[index]) != int(checksums[index]):
            raise ConfigurationError(
                f"`path` {str(path)!r}: sample {index} of the data set is not what the teacher saw; the data or their "
                "transforms changed: delete the folder or give another path"
            )
        stored = np.asarray(outputs[index], np.float32)
        new = forward(batch)[0].float().cpu().numpy()
        if np.abs(new - stored).max(initial=0.0) > TOLERANCE * max(1e-3, float(np.abs(stored).max(initial=0.0))):
            raise ConfigurationError(
                f"`path` {str(path)!r}: the teacher gives other outputs for sample {index} than are stored; it has "
                "changed: delete the folder or give another path"
            )


def storable(rows: Tensor, facts: CacheFacts, count: int) -> np.ndarray[Any, Any]:
    """Return outputs (n, ...) in the type of the file.

    Raises:
        ConfigurationError: If their shape is not that of the others, or they are not finite.
    """
    if rows.shape != (count, *facts.shape):
        raise ConfigurationError(
            f"`teacher` returned {tuple(rows.shape)} for a batch of {count} samples, expected {(count, *facts.shape)}; "
            "outputs of varying shape cannot be cached"
        )
    stored = rows.to(getattr(torch, facts.dtype)).cpu()
    if not stored.isfinite().all():
        limit = "" if facts.dtype == "float32" else " or beyond what float16 holds (65,504); try dtype='float32'"
        raise ConfigurationError(f"`teacher` returned values that are not finite{limit}")
    return stored.numpy()


def teacher_forward(teacher: Any, pick: Callable[[Any], Any]) -> Forward:
    """Return a function that takes a batch to the teacher's outputs; it raises unless they are one tensor."""
    device = device_of(getattr(teacher, "module", teacher))  # a ModuleTeacher runs where its module lies

    def ask(inputs: Any, batch: Any) -> Any:
        if not isinstance(teacher, Teacher):
            return call(teacher, inputs)
        answer = teacher.answer(Question(tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,), {}, batch))
        return None if answer is None else answer.output

    def forward(batch: Any) -> Tensor:
        found = ask(map_tensors(lambda tensor: tensor.to(device), pick(batch)), batch)
        if not isinstance(found, Tensor) or found.dim() == 0:
            raise ConfigurationError(
                f"`teacher` must return one tensor (batch, ...) to be cached, got {type(found).__name__}; wrap it in a "
                "function that returns its logits, and give that a `name`"
            )
        return found

    return forward


def collated(loader: DataLoader[Any], indices: list[int]) -> Any:
    """Return a batch of some samples, made as the loader makes one."""
    whole = getattr(loader.dataset, "__getitems__", None)
    return loader.collate_fn([loader.dataset[index] for index in indices] if whole is None else whole(indices))


def length_of(loader: DataLoader[Any]) -> int:
    """Return the number of samples.

    Raises:
        ConfigurationError: If there are none.
    """
    length = len(cast(Sized, loader.dataset))
    if length == 0:
        raise ConfigurationError("`loader` reads an empty data set; there is nothing to cache")
    return length


def inputs_of(batch: Any) -> Any:
    """Return the first element of a tuple or list, else the batch."""
    return batch[0] if isinstance(batch, tuple | list) else batch
