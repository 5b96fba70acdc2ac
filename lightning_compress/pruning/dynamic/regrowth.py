"""Dynamic sparse training as functions: which connections go, which come, how many of them, and where they start."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_compress.core.errors import ConfigurationError, did_you_mean
from lightning_compress.pruning.allocation import erk_counts
from lightning_compress.pruning.masks import lowest_masks
from lightning_compress.pruning.scores import random

DISTRIBUTIONS = ("erk", "uniform")
"""How the connections are spread over layers."""


def cosine_fraction(step: int, end: int, initial: float) -> float:
    r"""Return the share of connections to exchange (Evci et al. 2019, RigL, arXiv 1911.11134, section 3).

    .. math:: f(t) = \frac{\alpha}{2} \left(1 + \cos \frac{t \pi}{T_{end}}\right)

    Args:
        step: The step :math:`t`, from 0.
        end: The step :math:`T_{end}` from which nothing is exchanged any more.
        initial: The share :math:`\alpha` at step 0, 0 to 1.

    >>> [round(cosine_fraction(step, 100, 0.3), 4) for step in (0, 25, 50, 75, 100, 101)]
    [0.3, 0.2561, 0.15, 0.0439, 0.0, 0.0]
    """
    return 0.0 if step >= end else initial / 2 * (1 + math.cos(math.pi * step / end))


def drop_and_grow(weight: Tensor, mask: Tensor, growth: Tensor, count: int) -> Tensor:
    r"""Exchange connections of one layer, and keep their number (RigL, arXiv 1911.11134; SET, arXiv 1707.04383).

    With the active connections :math:`A` and :math:`k` of them to exchange,

    .. math::
        D = \operatorname{ArgTopK}_{i \in A}(-|w_i|, k), \quad
        G = \operatorname{ArgTopK}_{i \notin A \setminus D}(g_i, k), \quad A' = (A \setminus D) \cup G,

    where :math:`g` is the magnitude of the dense gradient (RigL) or a random number (SET). A connection that is
    dropped and chosen again at once just stays, with its value.

    Args:
        weight: Of any shape.
        mask: ``int8``, same shape: -1 active, 0 not.
        growth: What makes a connection worth growing, same shape.
        count: The number :math:`k`; at most all active connections are exchanged.

    Returns:
        The new mask, with as many active connections as before. Ties go by place in memory.

    Raises:
        CompressionError: If weights or growth are not numbers.

    >>> weight = torch.tensor([0.5, -0.1, 0.0, 0.0])
    >>> mask = torch.tensor([-1, -1, 0, 0], dtype=torch.int8)
    >>> drop_and_grow(weight, mask, torch.tensor([9.0, 1.0, 2.0, 3.0]), 1).tolist()
    [-1, 0, 0, -1]
    """
    active = mask != 0
    size, alive = weight.numel(), int(torch.count_nonzero(mask))
    count = min(count, alive)
    if count <= 0:
        return mask.clone()
    strength = weight.detach().float().abs().masked_fill(~active, -math.inf)
    (stay,) = lowest_masks([strength], size - (alive - count), absolute=False)
    worth = growth.float().masked_fill(stay != 0, math.inf)
    (chosen,) = lowest_masks([worth], size - alive, absolute=False)
    return torch.empty_like(mask).copy_(chosen)


def random_mask(weight: Tensor, count: int, seed: int, step: int, key: str) -> Tensor:
    """Return a mask of ``count`` random connections that depends on seed, step and name only.

    Args:
        weight: Its shape, strides and device are those of the mask.
        count: How many are active.
        seed: Of the run.
        step: Of the update.
        key: Path of the weight.

    >>> int(random_mask(torch.zeros(4, 5), 6, seed=0, step=0, key="fc.weight").count_nonzero())
    6
    """
    (chosen,) = lowest_masks([random(weight, seed, step, key)], weight.numel() - count, absolute=False)
    return torch.empty_like(weight, dtype=torch.int8, requires_grad=False).copy_(chosen)


def connection_counts(shapes: Mapping[str, tuple[int, ...]], sparsity: float, distribution: str) -> dict[str, int]:
    """Return how many connections each layer has, at a sparsity over all of them.

    Args:
        shapes: Of the weights, by path.
        sparsity: Share of zeros, 0 to below 1.
        distribution: ``"erk"``, as in :func:`~lightning_compress.pruning.allocation.erk_counts`, which leaves more to
            small layers; or ``"uniform"``, the same share in each.

    Raises:
        ConfigurationError: For an unknown distribution.

    >>> connection_counts({"a": (10, 10), "b": (30, 30)}, 0.9, "erk")
    {'a': 25, 'b': 75}
    >>> connection_counts({"a": (10, 10), "b": (30, 30)}, 0.9, "uniform")
    {'a': 10, 'b': 90}
    """
    if distribution not in DISTRIBUTIONS:
        raise ConfigurationError(
            f"`distribution` is {distribution!r}: {did_you_mean(str(distribution), DISTRIBUTIONS)}"
        )
    sizes = {key: math.prod(shape) for key, shape in shapes.items()}
    if distribution == "uniform":
        return {key: max(1, size - round(sparsity * size)) for key, size in sizes.items()}
    total = sum(sizes.values())
    return erk_counts(shapes, total - round(sparsity * total), dict.fromkeys(shapes, 1))


def zero_state(optimizers: Iterable[Optimizer], weight: Tensor, where: Tensor) -> None:
    """Forget what optimizers remember (momentum, squared gradients) of some connections, in place.

    Args:
        optimizers: Those without the weight are left alone.
        weight: A parameter.
        where: Boolean, in its shape.

    >>> weight = torch.nn.Parameter(torch.ones(2, 1))
    >>> optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    >>> weight.sum().backward()
    >>> optimizer.step()
    >>> zero_state([optimizer], weight, torch.tensor([[True], [False]]))
    >>> optimizer.state[weight]["momentum_buffer"].tolist()
    [[0.0], [1.0]]
    """
    for optimizer in optimizers:
        for value in optimizer.state.get(weight, {}).values():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                value.masked_fill_(where.to(value.device), 0)
