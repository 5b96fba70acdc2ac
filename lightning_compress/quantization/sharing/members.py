"""Which weights of a tensor belong to which cluster, and moving a cluster as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_COPIES = 64
"""Sums on an accelerator are made in so many copies, as adding up many numbers in one place takes turns."""


@dataclass(frozen=True)
class Members:
    """The weights of one tensor that are shared.

    Nothing here asks an accelerator for a value, but :meth:`of`.

    Args:
        index: Their places in row-major order, (m,); ``None`` if that is all of them.
        codes: The number of the cluster of each plus 1, or 0 for one that has been pruned since, (m,), ``int64``.
        total: Number of weights of the tensor.
    """

    index: Tensor | None
    codes: Tensor
    total: int

    def to(self, device: torch.device) -> Members:
        """Return the same on another device."""
        if self.codes.device == device:
            return self
        return Members(None if self.index is None else self.index.to(device), self.codes.to(device), self.total)

    def take(self, tensor: Tensor) -> Tensor:
        """Return what stands at the places, (m,)."""
        flat = tensor.detach().reshape(-1)
        return flat if self.index is None else flat.index_select(0, self.index)

    def put(self, tensor: Tensor, table: Tensor) -> None:
        """Write the value of each cluster, (k,), to its places, and zero everywhere else."""
        flat = nn.functional.pad(table, (1, 0)).index_select(0, self.codes)
        if self.index is not None:
            flat = torch.zeros(tensor.numel(), dtype=flat.dtype, device=flat.device).scatter_(0, self.index, flat)
        tensor.detach().copy_(flat.reshape(tensor.shape))

    def drop(self, tensor: Tensor) -> None:
        """Drop those of them that are zero in ``tensor``, for good."""
        pruned = self.take(tensor) == 0
        if pruned.device.type != "cpu" or bool(pruned.any()):
            self.codes.masked_fill_(pruned, 0)

    def alive(self, tensor: Tensor) -> Members:
        """Return the same without those that are zero in ``tensor``."""
        return Members(self.index, torch.where(self.take(tensor) == 0, 0, self.codes), self.total)

    def sums(self, terms: Tensor, size: int) -> Tensor:
        """Return the sum of one number a member over each of so many clusters, in float64, (size,).

        >>> Members.of(torch.tensor([0, 0, -1, 1])).sums(torch.tensor([1.0, 2.0, 8.0]), 3).tolist()
        [3.0, 8.0, 0.0]
        """
        return sum_by_code(self.codes, terms, size, 1 if terms.device.type == "cpu" else _COPIES)

    def packed(self, kind: torch.dtype) -> Tensor:
        """Return one small integer a weight: the cluster's number plus 1, or 0 for a weight that is zero."""
        codes = self.codes.to(kind).cpu()
        if self.index is None:
            return codes
        return torch.zeros(self.total, dtype=kind).index_copy_(0, self.index.cpu(), codes)

    @classmethod
    def of(cls, codes: Tensor) -> Members:
        """Return the members for the number of the cluster of each weight, (n,), -1 where it is zero."""
        flat = codes.reshape(-1).long()
        index = (flat >= 0).nonzero().flatten()
        return cls(None, flat + 1, len(flat)) if len(index) == len(flat) else cls(index, flat[index] + 1, len(flat))


def sum_by_code(codes: Tensor, terms: Tensor, size: int, copies: int = 1) -> Tensor:
    """Return the sums of numbers with the same code from 1 to ``size``, in float64; what has the code 0 is left out.

    As ``torch.bincount`` does, which however asks an accelerator for the greatest code.

    Args:
        codes: (m,), from 0 to ``size``.
        terms: (m,).
        size: Number of sums.
        copies: How many parts are summed on their own and added up at last.

    >>> sum_by_code(torch.tensor([1, 2, 2, 0]), torch.tensor([1.0, 2.0, 4.0, 8.0]), 2, copies=3).tolist()
    [1.0, 6.0]
    """
    places = codes
    if copies > 1:
        places = torch.arange(len(codes), device=codes.device).remainder_(copies).mul_(size + 1).add_(codes)
    table = torch.zeros(copies * (size + 1), dtype=torch.float64, device=terms.device)
    table.index_add_(0, places, terms.double())
    return table.reshape(copies, -1).sum(0)[1:] if copies > 1 else table[1:]


def sum_gradients(size: int, pool: list[tuple[nn.Parameter, Members]], how: str) -> Tensor:
    """Return the gradient of each shared value, in float64, on the device of the first weight.

    Args:
        size: Number of clusters.
        pool: The weights of one codebook, all with gradients.
        how: ``"sum"`` or ``"mean"``.

    >>> weight = nn.Parameter(torch.zeros(4))
    >>> weight.grad = torch.tensor([1.0, 2.0, 4.0, 8.0])
    >>> sum_gradients(2, [(weight, Members.of(torch.tensor([0, 0, -1, 1])))], "sum").tolist()
    [3.0, 8.0]
    """
    given = [(members.take(weight.grad), members) for weight, members in pool if weight.grad is not None]
    sums = _sums(size, given, pool[0][0].device)
    return sums / _counts(size, given, sums.device).clamp(min=1) if how == "mean" else sums


def tie_values(size: int, pool: Sequence[tuple[Tensor, Members]]) -> None:
    """Put the weights of each cluster on one value, theirs if they are equal, else their mean; all others on zero.

    Args:
        size: Number of clusters.
        pool: The tensors of one codebook.

    >>> tensor = torch.tensor([1.0, 2.0, 4.0, 8.0])
    >>> tie_values(2, [(tensor, Members.of(torch.tensor([0, 0, -1, 1])))])
    >>> tensor.tolist()
    [1.5, 1.5, 0.0, 8.0]
    """
    first = pool[0][0]
    taken = [(members.take(tensor), members) for tensor, members in pool]
    table = torch.zeros(size + 1, dtype=first.dtype, device=first.device)
    for values, members in taken:
        table.scatter_(0, members.codes.to(first.device), values.to(table))
    same, table = torch.stack([_fits(table, v, m).to(first.device) for v, m in taken]).all(), table[1:]
    if same.device.type != "cpu" or not bool(same):  # an accelerator is not asked, but computes both
        mean = _sums(size, taken, first.device) / _counts(size, taken, first.device).clamp(min=1)
        table = torch.where(same, table.double(), mean)
    for (tensor, members), (values, _) in zip(pool, taken, strict=True):
        members.put(tensor, table.to(values))


def _fits(table: Tensor, values: Tensor, members: Members) -> Tensor:
    """Return whether each member that is not pruned has the value of its code."""
    equal = table.to(values).index_select(0, members.codes) == values
    every = equal.all()
    return every if every.device.type == "cpu" and bool(every) else (equal | (members.codes == 0)).all()


def _sums(size: int, given: Sequence[tuple[Tensor, Members]], device: torch.device) -> Tensor:
    total = torch.zeros(size, dtype=torch.float64, device=device)
    for values, members in given:
        total += members.sums(values, size).to(device)
    return total


def _counts(size: int, given: Sequence[tuple[Tensor, Members]], device: torch.device) -> Tensor:
    return _sums(size, [(torch.ones_like(values), members) for values, members in given], device)
