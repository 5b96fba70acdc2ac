"""What the layers of a model see when it runs: the sizes of their inputs, and rows of them to weigh errors with."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.core.examples import beside
from lightning_compress.core.isolation import batch_size_of, evaluating
from lightning_compress.core.patches import CONVOLUTIONS, layer_patches, padded
from lightning_compress.low_rank.layers import shape_now
from lightning_compress.low_rank.matrix import as_float
from lightning_compress.low_rank.moments import Moment, Seeing
from lightning_compress.low_rank.shapes import own_tensors, shape_of


@dataclass
class Seen:
    """What one layer saw.

    Attributes:
        sizes: Spatial size of the input at each call of the last pass that called it; of Linear the rows of one sample.
        calls: The same of the pass that runs.
        rows: What single outputs see: (groups, n, in) as in ``layer_patches``; of a transposed convolution what single
            inputs hold, of an embedding the numbers (n,). ``None`` if nothing was kept.
        seeing: Far more of them, as the second moment that they have; ``None`` if nobody asked.
        finite: Whether all that was kept are numbers, neither NaN nor infinity.
    """

    sizes: list[tuple[int, ...]] = field(default_factory=list)
    calls: list[tuple[int, ...]] = field(default_factory=list)
    rows: Tensor | None = None
    seeing: Seeing | None = None
    finite: bool = True

    @property
    def moments(self) -> list[Moment]:
        """Second moment of each group, if it was gathered."""
        return [] if self.seeing is None else self.seeing.moments()


def look(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    inputs: Sequence[Any],
    run: Any,
    rows: int = 0,
    gather: Collection[str] = (),
) -> dict[str, Seen]:
    """Run a model and return what its layers see; layers that are never called are missing.

    Args:
        model: Put into evaluation mode meanwhile; random states stay too.
        layers: Those to watch, by path.
        inputs: Batches.
        run: Called with the model and a batch.
        rows: How many to keep of each layer in each batch, at places that are the same in every run.
        gather: Paths of the layers, Linear or convolutions, whose second moments are wanted too.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(18, 2))
    >>> seen = look(net, {"0": net[0], "2": net[2]}, [torch.zeros(4, 1, 5, 5)], lambda m, x: m(x), rows=10)
    >>> seen["0"].sizes, seen["0"].rows.shape, seen["2"].rows.shape
    ([(5, 5)], torch.Size([1, 10, 9]), torch.Size([1, 4, 18]))
    """
    seen: dict[str, Seen] = {}
    generators = tuple(torch.Generator().manual_seed(seed) for seed in (0, 1))
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(evaluating(model))
        for path, layer in layers.items():
            like = shape_now(layer).build("meta")
            more = -(-_enough(like) // max(1, len(inputs))) if path in gather else 0
            hook = partial(_watch, seen.setdefault(path, Seen()), (rows, more), generators, like)
            stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        for batch in inputs:
            run(model, beside(model, batch))
            for found in seen.values():
                found.sizes, found.calls = found.calls or found.sizes, []
    return {path: found for path, found in seen.items() if found.sizes}


def _enough(layer: nn.Module) -> int:
    """Return how many rows make a second moment: twice as many as it has directions."""
    weight = own_tensors(layer)["weight"]
    return max(_LEAST, 2 * weight[0].numel())


_LEAST = 4096
"""Rows of which a second moment is made at least, where there are as many."""


def _watch(
    mine: Seen,
    counts: tuple[int, int],
    generators: tuple[torch.Generator, ...],
    like: nn.Module,
    layer: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Remember what a layer is called with; ``like`` has its shape, and is one layer where that is factors."""
    given = args[0] if args else kwargs.get("input")
    if not isinstance(given, Tensor):
        return
    mine.calls.append(_size(like, given))
    rows, more = counts
    if rows or more:
        mine.finite = mine.finite and bool(given.isfinite().all())
    if rows:
        kept = sample_rows(like, given.detach(), rows, generators[0])
        mine.rows = kept if mine.rows is None else torch.cat([mine.rows, kept], dim=-2 if kept.dim() > 1 else 0)
    if more:
        mine.seeing = mine.seeing or Seeing()
        mine.seeing.add(as_float(sample_rows(like, given.detach(), more, generators[1])))


def _size(layer: nn.Module, given: Tensor) -> tuple[int, ...]:
    kernel = getattr(layer, "kernel_size", ())
    if kernel:
        return tuple(given.shape[-len(kernel) :])
    last = 1 if isinstance(layer, nn.Linear) else 0
    positions = given.shape[: given.dim() - last].numel()
    return (max(1, positions // (batch_size_of(given) or 1)),)


def sample_rows(layer: nn.Module, inputs: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return what some outputs of a layer see, at random places, without unfolding all of them.

    Args:
        layer: Linear, (transposed) convolution or Embedding.
        inputs: What it was called with.
        count: How many rows; fewer if there are not as many.
        generator: Chooses the places.

    Returns:
        As ``Seen.rows``.

    >>> conv = nn.Conv1d(1, 1, 2)
    >>> x = torch.arange(5.0).reshape(1, 1, 5)
    >>> rows = sample_rows(conv, x, 3, torch.Generator().manual_seed(0))[0]
    >>> rows.shape, bool((rows[:, 1] - rows[:, 0] == 1).all())
    (torch.Size([3, 2]), True)
    """
    if isinstance(layer, nn.Embedding):
        return _some(inputs.flatten(), count, generator)
    if isinstance(layer, nn.Linear):
        return _some(inputs.reshape(-1, layer.in_features), count, generator).unsqueeze(0)
    shape = shape_of(layer)
    axes = len(shape.kernel)
    batched = inputs if inputs.dim() == axes + 2 else inputs.unsqueeze(0)
    if not isinstance(layer, CONVOLUTIONS):
        rows = _some(batched.movedim(1, -1).flatten(0, -2), count, generator)
    else:
        every = len(batched) * math.prod(shape.output_size(batched.shape[2:]))
        if count >= every:
            return layer_patches(layer, batched)
        rows = _patches(layer, padded(layer, batched), count, generator)
    return rows.unflatten(1, (shape.groups, -1)).flatten(2).transpose(0, 1)


def _some(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return rows[torch.randperm(len(rows), generator=generator)[:count].to(rows.device)].clone()


def _patches(
    layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, inputs: Tensor, count: int, generator: torch.Generator
) -> Tensor:
    r"""Return (count, c, \*kernel) patches of padded inputs at random places."""
    shapes = zip(inputs.shape[2:], layer.kernel_size, layer.stride, layer.dilation, strict=True)
    places = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in shapes]
    count = min(count, len(inputs) * int(torch.tensor(places).prod()))
    index: list[Tensor] = [torch.randint(len(inputs), (count,), generator=generator)]
    for axis, limit in enumerate(places):
        start = torch.randint(limit, (count,), generator=generator) * layer.stride[axis]
        steps = torch.arange(layer.kernel_size[axis]) * layer.dilation[axis]
        index.append(start[:, None] + steps)
    axes = len(places)
    index = [
        one.reshape(count, *(-1 if axis == own else 1 for axis in range(axes))) for own, one in enumerate(index, -1)
    ]
    channels_last = inputs.movedim(1, -1)
    return channels_last[tuple(one.to(inputs.device) for one in index)].movedim(-1, 1)
