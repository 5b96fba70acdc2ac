"""Which weights of a tensor belong to which cluster, and moving a cluster as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Members:
    """The weights of one tensor that are shared.

    Args:
        index: Their places in row-major order, (m,); ``None`` if that is all of them.
        codes: The cluster of each, (m,), ``int64``.
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
        return flat if self.index is None else flat[self.index]

    def put(self, tensor: Tensor, values: Tensor) -> None:
        """Write values to the places, and zero everywhere else."""
        flat = values
        if self.index is not None:
            flat = torch.zeros(tensor.numel(), dtype=values.dtype, device=values.device)
            flat[self.index] = values
        tensor.detach().copy_(flat.reshape(tensor.shape))

    def alive(self, tensor: Tensor) -> Members:
        """Return those of them that are not zero in ``tensor``."""
        chosen = self.take(tensor) != 0
        if bool(chosen.all()):
            return self
        places = torch.arange(self.total, device=chosen.device) if self.index is None else self.index
        return Members(places[chosen], self.codes[chosen], self.total)

    def packed(self, kind: torch.dtype) -> Tensor:
        """Return one small integer a weight: the cluster's number plus 1, or 0 for a weight that is zero."""
        codes = (self.codes + 1).to(kind).cpu()
        if self.index is None:
            return codes
        return torch.zeros(self.total, dtype=kind).index_copy_(0, self.index.cpu(), codes)

    @classmethod
    def of(cls, codes: Tensor) -> Members:
        """Return the members for the number of the cluster of each weight, (n,), -1 where it is zero."""
        flat = codes.reshape(-1).long()
        index = (flat >= 0).nonzero().flatten()
        return cls(None, flat, len(flat)) if len(index) == len(flat) else cls(index, flat[index], len(flat))


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
    device = pool[0][0].device
    sums = torch.zeros(size, dtype=torch.float64, device=device)
    count = torch.zeros(size, dtype=torch.float64, device=device)
    for weight, members in pool:
        if weight.grad is not None:
            terms = members.take(weight.grad).double()
            sums += torch.bincount(members.codes, weights=terms, minlength=size).to(device)
            if how == "mean":
                count += torch.bincount(members.codes, minlength=size).to(device)
    return sums / count.clamp(min=1) if how == "mean" else sums


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
    taken = [members.take(tensor) for tensor, members in pool]
    table = torch.zeros(size, dtype=first.dtype, device=first.device)
    for values, (_, members) in zip(taken, pool, strict=True):
        table[members.codes.to(first.device)] = values.to(table)
    if not all(torch.equal(table.to(v)[m.codes], v) for v, (_, m) in zip(taken, pool, strict=True)):
        sums = torch.zeros(size, dtype=torch.float64, device=first.device)
        count = torch.zeros_like(sums)
        for values, (_, members) in zip(taken, pool, strict=True):
            sums += torch.bincount(members.codes, weights=values.double(), minlength=size).to(sums)
            count += torch.bincount(members.codes, minlength=size).to(sums)
        table = sums / count.clamp(min=1)
    for values, (tensor, members) in zip(taken, pool, strict=True):
        members.put(tensor, table.to(values)[members.codes])
