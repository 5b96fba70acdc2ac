r"""Removing neurons without any data: those that compute nearly the same are merged (Srinivas & Babu 2015).

If the incoming weights of neurons i and j differ by :math:`\varepsilon_{ij}`, biases included, and their outgoing
weights are :math:`a_i, a_j`, then dropping j and adding its outgoing weights to those of i changes the next layer, per
unit of squared input, by at most about

.. math:: s_{ij} = \langle a_j^2 \rangle \, \|\varepsilon_{ij}\|^2
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_compress.core.errors import ConfigurationError


def merge_saliency(incoming: Tensor, outgoing: Tensor) -> Tensor:
    r"""Return :math:`s_{ij}`, what it costs to merge neuron j into neuron i.

    Args:
        incoming: Weights into each neuron, (neurons, inputs), with the bias as one more column.
        outgoing: Weights out of each neuron, (outputs, neurons).

    Returns:
        (neurons, neurons), infinite on the diagonal.

    Raises:
        ConfigurationError: If the shapes do not fit.

    >>> merge_saliency(torch.tensor([[1.0, 0.0], [1.0, 2.0]]), torch.tensor([[3.0, 1.0]])).tolist()
    [[inf, 4.0], [36.0, inf]]
    """
    if incoming.dim() != 2 or outgoing.dim() != 2 or outgoing.shape[1] != len(incoming):
        raise ConfigurationError(
            "`incoming` must be (neurons, inputs) and `outgoing` (outputs, neurons), got "
            f"{tuple(incoming.shape)} and {tuple(outgoing.shape)}"
        )
    return _distances(incoming.detach()) * outgoing.detach().square().mean(0)


def _distances(incoming: Tensor) -> Tensor:
    found = torch.cdist(incoming, incoming, compute_mode="donot_use_mm_for_euclid_dist").square()
    return found.fill_diagonal_(torch.inf)


@dataclass(frozen=True)
class Merged:
    """What :func:`merge_neurons` did.

    Args:
        kept: Rising indices of the neurons that stay.
        outgoing: New outgoing weights (outputs, neurons); columns of neurons that went are zero.
        pairs: (removed, into) in the order of removal.
        costs: The saliency at each removal.
    """

    kept: tuple[int, ...]
    outgoing: Tensor
    pairs: tuple[tuple[int, int], ...]
    costs: tuple[float, ...]


def merge_neurons(incoming: Tensor, outgoing: Tensor, count: int) -> Merged:
    r"""Merge ``count`` neurons into others, each time the cheapest pair (arXiv:1507.06149, algorithm of section 3).

    After :math:`(i, j) = \arg\min s_{ij}`: neuron j goes, :math:`a_i \leftarrow a_i + a_j`, and the saliencies of i are
    those of its new outgoing weights. Neurons with equal incoming weights merge without any change of the output,
    whatever elementwise function follows. As the nearest neighbour of a neuron does not depend on outgoing weights, a
    removal costs one pass over the neurons that had j as theirs.

    Args:
        incoming: (neurons, inputs), with the bias as one more column.
        outgoing: (outputs, neurons).
        count: How many to remove, 0 to neurons - 1.

    Returns:
        Who stays, the new outgoing weights, and what went where at what cost.

    Raises:
        ConfigurationError: If shapes do not fit, or ``count`` is out of range.

    >>> merged = merge_neurons(torch.tensor([[1.0], [4.0], [1.5]]), torch.tensor([[2.0, 1.0, 1.0]]), 1)
    >>> merged.kept, merged.outgoing.tolist(), merged.pairs, merged.costs
    ((0, 1), [[3.0, 1.0, 0.0]], ((2, 0),), (0.25,))
    """
    merge_saliency(incoming[:1], outgoing[:, :1])  # the shapes
    neurons = len(incoming)
    if outgoing.shape[1] != neurons or not 0 <= count < max(neurons, 1):
        raise ConfigurationError(f"`count` must lie in 0..{neurons - 1}, got {count}")
    distance, out = _distances(incoming.detach()), outgoing.detach().clone()
    near, into = distance.min(0)
    strength = out.square().mean(0)
    left = torch.ones(neurons, dtype=torch.bool, device=out.device)
    pairs: list[tuple[int, int]] = []
    costs: list[float] = []
    for _ in range(count):
        score = torch.where(left, strength * near, torch.inf)
        gone = int(score.argmin())
        stays = int(into[gone])
        pairs.append((gone, stays))
        costs.append(float(score[gone]))
        out[:, stays] += out[:, gone]
        out[:, gone] = 0
        strength[stays] = out[:, stays].square().mean()
        left[gone] = False
        distance[gone, :] = torch.inf
        orphans = (left & (into == gone)).nonzero().flatten()
        near[orphans], into[orphans] = distance[:, orphans].min(0)
    return Merged(tuple(left.nonzero().flatten().tolist()), out, tuple(pairs), tuple(costs))
