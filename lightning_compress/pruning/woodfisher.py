r"""WoodFisher: the inverse of the empirical Fisher information in blocks, and pruning with it.

The Fisher information stands in for the Hessian across layers; blocks keep its inverse small (Singh & Alistarh 2020,
arXiv:2004.14340). With blocks of one weight it is Optimal Brain Damage.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compress.core.errors import ConfigurationError, did_you_mean

UPDATES = ("joint", "sum", "none")


class FisherInverse:
    r"""The block-diagonal inverse of :math:`F = \lambda I + \frac1N \sum_n g_n g_n^\top`, one gradient after the other.

    .. math:: F_0^{-1} = I / \lambda, \qquad
        F_n^{-1} = F_{n-1}^{-1} - \frac{F_{n-1}^{-1} g_n g_n^\top F_{n-1}^{-1}}{N + g_n^\top F_{n-1}^{-1} g_n}

    Takes ``size * block`` numbers of memory, and as many operations per gradient, up to a factor of three.

    Args:
        size: Number of weights.
        total: N, the number of gradients that will be added.
        block: Weights per block, in the order of the flat weight; the last block may be smaller.
        damping: :math:`\lambda`, above 0, in units of a squared gradient.
        dtype: Of the blocks.
        device: Of the blocks.

    Raises:
        ConfigurationError: For a value outside its range.

    >>> inverse = FisherInverse(2, total=1, block=2, damping=1.0)
    >>> inverse.add(torch.tensor([1.0, 0.0]))
    >>> inverse.blocks.tolist()
    [[[0.5, 0.0], [0.0, 1.0]]]
    """

    def __init__(
        self,
        size: int,
        total: int,
        block: int = 50,
        damping: float = 1e-5,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value in (("size", size), ("total", total), ("block", block)):
            if value < 1:
                raise ConfigurationError(f"`{name}` must be at least 1, got {value}")
        if not damping > 0:
            raise ConfigurationError(f"`damping` must be above 0, got {damping}; with 0 there is nothing to start from")
        self.size, self.total, self.block = size, total, min(block, size)
        count = -(-size // self.block)
        self.blocks = (torch.eye(self.block, dtype=dtype, device=device) / damping).repeat(count, 1, 1)

    def add(self, gradient: Tensor) -> None:
        """Take in the gradient of one sample, of any shape with ``size`` elements."""
        rows = self.split(gradient.detach().to(self.blocks.dtype)).unsqueeze(2)
        pulled = self.blocks * rows if self.block == 1 else self.blocks @ rows
        divisor = self.total + rows.transpose(1, 2) @ pulled
        self.blocks.addcmul_(pulled / divisor, pulled.transpose(1, 2), value=-1)

    def split(self, values: Tensor) -> Tensor:
        """Return ``values`` as (blocks, block), with zeros behind the last."""
        if values.numel() != self.size:
            raise ConfigurationError(f"expected {self.size} numbers, got {tuple(values.shape)}")
        return F.pad(values.reshape(-1), (0, len(self.blocks) * self.block - self.size)).view(-1, self.block)

    def join(self, parts: Tensor, shape: torch.Size) -> Tensor:
        """Undo :meth:`split`."""
        return parts.reshape(-1)[: self.size].view(shape)


def fisher_inverse(gradients: Iterable[Tensor], block: int = 50, damping: float = 1e-5) -> FisherInverse:
    """Return the inverse over gradients that are all at hand, in their dtype.

    Args:
        gradients: One tensor per sample, all of one shape.
        block: As in :class:`FisherInverse`.
        damping: Likewise.

    Raises:
        ConfigurationError: If there are no gradients.

    >>> fisher_inverse([torch.tensor([1.0, 0.0])], block=1, damping=1.0).blocks.flatten().tolist()
    [0.5, 1.0]
    """
    held = list(gradients)
    if not held:
        raise ConfigurationError("`gradients` is empty: give the gradient of at least one sample")
    inverse = FisherInverse(held[0].numel(), len(held), block, damping, held[0].dtype, held[0].device)
    for gradient in held:
        inverse.add(gradient)
    return inverse


def woodfisher_saliency(weight: Tensor, inverse: FisherInverse) -> Tensor:
    r"""Return :math:`w_q^2 / (2 [F^{-1}]_{qq})`, the rise of the loss when a weight goes and its block makes up for it.

    Args:
        weight: Weights of any shape.
        inverse: Over the same weights.

    Returns:
        Saliencies in the shape of ``weight``.

    >>> inverse = FisherInverse(2, total=1, block=2, damping=1.0)
    >>> woodfisher_saliency(torch.tensor([2.0, 4.0]), inverse).tolist()
    [2.0, 8.0]
    """
    diagonal = inverse.join(inverse.blocks.diagonal(dim1=1, dim2=2), weight.shape)
    return weight.detach().square() / (2 * diagonal)


def woodfisher_update(weight: Tensor, inverse: FisherInverse, keep: Tensor, update: str = "joint") -> Tensor:
    r"""Return the weights after the pruned ones went and the others of each block moved.

    ``"sum"`` adds the steps of single removals,
    :math:`\delta w = -\sum_{q \in Q} w_q F^{-1} e_q / [F^{-1}]_{qq}`, which is right for one removal per block and
    counts what the removed have in common twice; ``"joint"`` solves for all of a block at once,
    :math:`\delta w = -F^{-1}_{\cdot Q} (F^{-1}_{QQ})^{-1} w_Q`, the minimum of the quadratic. ``"none"`` only removes.

    Args:
        weight: Weights of any shape.
        inverse: Over the same weights.
        keep: Boolean tensor in the same shape, true where a weight stays.
        update: One of ``joint, sum, none``.

    Returns:
        New weights, exactly zero where pruned.

    Raises:
        ConfigurationError: For an unknown update.

    >>> inverse = FisherInverse(2, total=1, block=2, damping=1.0)
    >>> inverse.blocks = torch.linalg.inv(torch.tensor([[[2.0, 1.0], [1.0, 2.0]]]))
    >>> new = woodfisher_update(torch.tensor([1.0, 3.0]), inverse, torch.tensor([False, True]))
    >>> [round(value, 4) for value in new.tolist()]
    [0.0, 3.5]
    """
    if update not in UPDATES:
        raise ConfigurationError(f"`update` is {update!r}: {did_you_mean(str(update), UPDATES)}")
    value = inverse.split(weight.detach().to(inverse.blocks.dtype))
    goes = inverse.split(~keep).bool()
    if update == "joint":
        both = goes.unsqueeze(1) & goes.unsqueeze(2)
        eye = torch.eye(inverse.block, dtype=value.dtype, device=value.device)
        within = torch.where(both, inverse.blocks, eye)  # rows and columns of the kept drop out of the system
        pull = torch.linalg.solve(within, torch.where(goes, value, 0.0))
    else:
        pull = torch.where(goes, value / inverse.blocks.diagonal(dim1=1, dim2=2), 0.0)
    if update != "none":
        value = value - (inverse.blocks @ pull.unsqueeze(2)).squeeze(2)
    return inverse.join(torch.where(goes, 0.0, value), weight.shape).to(weight.dtype)
