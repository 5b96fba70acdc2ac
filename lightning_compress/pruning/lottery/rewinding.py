"""Lottery tickets as functions: how much is left, which weights stay, and what they are set back to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn

from lightning_compress.core.errors import ConfigurationError, did_you_mean
from lightning_compress.core.paths import clean_path
from lightning_compress.core.schedule import Horizon, Schedule, Time, Timeline
from lightning_compress.pruning.allocation import Ranked, allocate, least_kept
from lightning_compress.pruning.scores import random


def remaining_share(fraction: float, rounds: int) -> float:
    r"""Return :math:`(1 - p)^n`, what is left after n rounds (Frankle & Carbin 2018, arXiv 1803.03635).

    Args:
        fraction: Share :math:`p` of the remaining weights that each round prunes, above 0 and below 1.
        rounds: Number of prunings so far.

    >>> round(remaining_share(0.2, 7), 4)
    0.2097
    """
    return float((1 - fraction) ** rounds)


def prune_remaining(
    weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], sparsity: float, scope: str, floor: float
) -> dict[str, Tensor]:
    """Return masks at a sparsity, by magnitude; what is pruned already stays pruned.

    Args:
        weights: Trained, by path.
        masks: ``int8``, -1 keep and 0 prune, of the last round; empty in the first.
        sparsity: Share of zeros, of each weight in scope ``"layer"``, of all together in the others.
        scope: One of :data:`~lightning_compress.pruning.allocation.SCOPES`.
        floor: Least share of each weight that stays; at least one element does.

    >>> weights = {"a": torch.tensor([4.0, 0.0, -1.0, 2.0]), "b": torch.tensor([3.0, 5.0])}
    >>> masks = {"a": torch.tensor([-1, 0, -1, -1], dtype=torch.int8)}
    >>> {key: mask.tolist() for key, mask in prune_remaining(weights, masks, 0.5, "global", 0.0).items()}
    {'a': [-1, 0, 0, 0], 'b': [-1, -1]}
    """
    ranked = {}
    for key, weight in weights.items():
        score = weight.detach().float().abs()
        if key in masks:
            score = score.masked_fill(masks[key].to(score.device) == 0, -math.inf)
        ranked[key] = Ranked(score, tuple(weight.shape), least_kept(weight.numel(), floor))
    chosen = allocate(ranked, sparsity, scope)
    return {key: torch.empty_like(weights[key], dtype=torch.int8).copy_(mask) for key, mask in chosen.items()}


def take_copy(root: nn.Module) -> dict[str, Tensor]:
    """Return copies, on the CPU, of all parameters and saved buffers of a module, each under one clean path.

    In a distributed run all processes must call it at once; buffers, of which each has its own (running means of batch
    norm), are those of the first process in every copy, as ``DistributedDataParallel`` does it.
    """
    shared = distributed.is_available() and distributed.is_initialized()
    copies = {}
    for name, tensor in _tensors(root).items():
        copied = tensor.detach().clone()
        if shared and not isinstance(tensor, nn.Parameter):
            distributed.broadcast(copied, 0)
        copies[name] = copied.cpu()
    return copies


def put_back(root: nn.Module, copy: Mapping[str, Tensor]) -> None:
    """Set all parameters and saved buffers, in place, to what :func:`take_copy` returned, on whatever device they are.

    Raises:
        ConfigurationError: If the copy was taken of another module; names the first difference.

    >>> net = nn.Linear(2, 2)
    >>> copy = take_copy(net)
    >>> with torch.no_grad(): before, _ = net.weight.clone(), net.weight.mul_(2)
    >>> put_back(net, copy)
    >>> torch.equal(net.weight, before)
    True
    """
    tensors = _tensors(root)
    for name in [*tensors, *copy]:
        shapes = [tuple(side[name].shape) if name in side else None for side in (tensors, copy)]
        if shapes[0] != shapes[1]:
            near = "" if name in tensors else f" {did_you_mean(name, tensors)}"
            raise ConfigurationError(
                f"the copy to rewind to has {name!r} of shape {shapes[1]}, the module {shapes[0]}.{near} Rewind the "
                "module the copy was taken of"
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(copy[name])


def shuffled(copy: Mapping[str, Tensor], seed: int, step: int) -> dict[str, Tensor]:
    """Return the same tensors with their elements in random order: new weights from the same initial distribution.

    Args:
        copy: Tensors by path.
        seed: Of the run.
        step: Number of the round.

    >>> mixed = shuffled({"w": torch.arange(6.0)}, seed=0, step=1)["w"]
    >>> mixed.sort().values.tolist(), torch.equal(mixed, torch.arange(6.0))
    ([0.0, 1.0, 2.0, 3.0, 4.0, 5.0], False)
    """
    return {
        name: tensor.flatten()[random(tensor, seed, step, name).flatten().argsort(stable=True)].reshape(tensor.shape)
        for name, tensor in copy.items()
    }


@dataclass(frozen=True)
class RewindSchedule(Schedule):
    """A constant amount, and the number of updates after which a copy of the weights is taken.

    Args:
        rewind: When: an epoch, a share of the run, or ``{"step": k}``; 0 for before training.

    >>> timeline = RewindSchedule(0.2, initial=0.2, shape="linear", rewind={"step": 3}).resolve(Horizon(10, 5))
    >>> [t for t in range(10) if timeline.due(t)], timeline.amount(0)
    ([0, 2], 0.2)
    """

    rewind: Time = 0

    def times(self) -> tuple[tuple[str, Time], ...]:
        """Return none: whether a copy is still to be taken is known when a checkpoint has been loaded."""
        return ()

    def resolve(self, horizon: Horizon, clamp: bool = False) -> Timeline:
        """Return the two updates that count: the first, and the one after which the copy is taken.

        Raises:
            ConfigurationError: If the run is over by then.
        """
        step = horizon.steps(self.rewind, "rewind")
        if horizon.total is not None and step >= horizon.total > 0:
            if not clamp:
                raise ConfigurationError(
                    f"`rewind` is optimizer step {step}, but a round has {horizon.total}; train longer in each round, "
                    "or rewind to an earlier step"
                )
            step = horizon.total - 1
        return RewindTimeline(self, 0, max(0, step - 1), max(1, step))


class RewindTimeline(Timeline):
    """A :class:`RewindSchedule` in optimizer updates; the copy is taken right after update ``end``."""

    def __str__(self) -> str:
        copied = f", a copy is taken at step {self.end + 1}" if self.end else ""
        return f"{self.schedule.final:.1%} zeros in this round{copied}"


def _tensors(root: nn.Module) -> dict[str, Tensor]:
    saved = root.state_dict(keep_vars=True)
    buffers = {name: buffer for name, buffer in root.named_buffers() if name in saved}
    return {clean_path(name): tensor for name, tensor in [*root.named_parameters(), *buffers.items()]}
