"""A mixture of Gaussians as the prior of weights, and what it does to them (soft weight sharing)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_compress.core.errors import ConfigurationError

_CHUNK = 1 << 18
_NAMES = ("means", "log_sigmas", "logits")
ZERO_PRECISION = (5000.0, 2.0)
PRECISION = (250.0, 0.1)
"""Shape and rate of the Gamma priors on :math:`1/\\sigma^2`, of the component at zero and of the others."""


@dataclass(frozen=True)
class Mixture:
    r"""J + 1 Gaussians, the first of them at zero with a share that is fixed.

    .. math:: p(w) = \pi_0 N(w | 0, \sigma_0^2) + (1 - \pi_0) \sum_{j=1}^{J} s_j N(w | \mu_j, \sigma_j^2),
       \quad s = \mathrm{softmax}(\text{logits})

    Args:
        means: (J,), of the components beside zero.
        log_sigmas: (J + 1,), logarithms of the standard deviations, that of zero first.
        logits: (J,).
        zero: :math:`\pi_0`, between 0 and 1.
    """

    means: Tensor
    log_sigmas: Tensor
    logits: Tensor
    zero: float

    def log_shares(self) -> Tensor:
        """Return the logarithms of all shares, (J + 1,)."""
        others = self.logits.log_softmax(0) + math.log1p(-self.zero)
        return torch.cat([others.new_full((1,), math.log(self.zero)), others])

    def centres(self) -> Tensor:
        """Return all means, zero first, (J + 1,)."""
        return torch.cat([self.means.new_zeros(1), self.means])


class Pull(NamedTuple):
    """Where a mixture and the weights under it want to go.

    Args:
        loss: Negative log prior of all values, hyper-prior not included, 0-dim.
        values: Its gradient by each value, (n,).
        means: By each mean, (J,), and so on for the other two.
        log_sigmas: (J + 1,).
        logits: (J,).
    """

    loss: Tensor
    values: Tensor
    means: Tensor
    log_sigmas: Tensor
    logits: Tensor


def initial_mixture(values: Tensor, components: int, zero: float) -> Mixture:
    """Spread the components evenly over the range of trained weights, a quarter of their distance wide.

    Args:
        values: Weights, (n,).
        components: J, at least 2.
        zero: Share of the component at zero, between 0 and 1.

    >>> initial_mixture(torch.tensor([-1.0, 0.5, 2.0]), 4, 0.99).means.tolist()
    [-1.0, 0.0, 1.0, 2.0]
    """
    low, high = float(values.min()), float(values.max())
    if not math.isfinite(low) or not math.isfinite(high):
        raise ConfigurationError("weights are NaN or infinite; look for the step at which training diverged")
    high = high if high > low else low + 1e-3
    means = torch.linspace(low, high, components, dtype=torch.float64, device=values.device)
    wide = math.log((high - low) / (components - 1) / 4)
    sigmas = torch.full((components + 1,), wide, dtype=torch.float64, device=values.device)
    return Mixture(means, sigmas, torch.zeros_like(means), zero)


def log_joint(values: Tensor, mixture: Mixture) -> Tensor:
    r"""Return :math:`\log \pi_j N(w_i | \mu_j, \sigma_j^2)`, (n, J + 1).

    >>> mixture = Mixture(torch.tensor([1.0, 2.0]), torch.zeros(3), torch.zeros(2), zero=0.5)
    >>> [round(x, 3) for x in log_joint(torch.tensor([0.0]), mixture)[0].exp().tolist()]  # 0.399 times the shares
    [0.199, 0.06, 0.013]
    """
    away = (values[:, None] - mixture.centres()) / mixture.log_sigmas.exp()
    return mixture.log_shares() - mixture.log_sigmas - 0.5 * away.square() - 0.5 * math.log(2 * math.pi)


def pull(values: Tensor, mixture: Mixture) -> Pull:
    r"""Return the negative log prior :math:`-\sum_i \log p(w_i)` and its gradients (Ullrich et al., arXiv:1702.04008).

    With responsibilities :math:`r_{ij} = \pi_j N_j(w_i) / p(w_i)` the gradient by :math:`w_i` is
    :math:`\sum_j r_{ij} (w_i - \mu_j) / \sigma_j^2`: each weight is drawn to the components that may have made it.

    Args:
        values: Weights, (n,); taken in pieces, so memory does not grow with n times J.
        mixture: On the same device.
    """
    centres, precise = mixture.centres(), (-2 * mixture.log_sigmas).exp()
    loss, parts = values.new_zeros((), dtype=torch.float64), []
    by_mean, by_sigma, mass = (torch.zeros_like(centres) for _ in range(3))
    for piece in values.to(centres).split(_CHUNK):
        joint = log_joint(piece, mixture)
        total = joint.logsumexp(1)
        share = (joint - total[:, None]).exp_()
        away = piece[:, None] - centres
        drawn = share * away * precise
        loss -= total.sum()
        parts.append(drawn.sum(1))
        by_mean -= drawn.sum(0)
        by_sigma += share.sum(0) - (drawn * away).sum(0)
        mass += share.sum(0)
    others = mass[1:].sum() * mixture.logits.softmax(0) - mass[1:]
    gradient = torch.cat(parts) if parts else values.to(centres)
    return Pull(loss, gradient, by_mean[1:], by_sigma, others)


def precision_pull(mixture: Mixture) -> Tensor:
    r"""Return the gradient by ``log_sigmas`` of the negative log Gamma priors on the precisions.

    :math:`-\log \Gamma(\lambda | a, b) = b \lambda - (a - 1) \log \lambda` + a constant, at
    :math:`\lambda = \sigma^{-2}`: it keeps components from collapsing onto single weights or growing without limit.

    >>> gradient = precision_pull(Mixture(torch.zeros(1), torch.zeros(2), torch.zeros(1), 0.9))  # at precisions of 1
    >>> [round(x, 1) for x in gradient.tolist()]  # 2 * 4999 - 2 * 2, and 2 * 249 - 2 * 0.1
    [9994.0, 497.8]
    """
    shape, rate = torch.full_like(mixture.log_sigmas, PRECISION[0]), torch.full_like(mixture.log_sigmas, PRECISION[1])
    shape[0], rate[0] = ZERO_PRECISION
    return 2 * (shape - 1) - 2 * rate * (-2 * mixture.log_sigmas).exp()


def adam_step(mixture: Mixture, pulls: Iterable[Tensor], moments: dict[str, Tensor], rate: float) -> Mixture:
    """Return the mixture after one step of Adam (with its usual settings) on its parameters.

    Args:
        mixture: As it is.
        pulls: Gradients by means, log_sigmas and logits.
        moments: What Adam remembers; filled and changed in place.
        rate: Learning rate, above 0.
    """
    step = moments["step"] = moments.get("step", torch.zeros((), dtype=torch.int64)) + 1
    new: dict[str, Tensor] = {}
    for name, gradient in zip(_NAMES, pulls, strict=True):
        first, second = moments.get(f"{name}.first"), moments.get(f"{name}.second")
        first = 0.1 * gradient if first is None else 0.9 * first + 0.1 * gradient
        second = 0.001 * gradient.square() if second is None else 0.999 * second + 0.001 * gradient.square()
        moments[f"{name}.first"], moments[f"{name}.second"] = first, second
        corrected = first / (1 - 0.9 ** int(step))
        root = (second / (1 - 0.999 ** int(step))).sqrt() + 1e-8
        new[name] = getattr(mixture, name) - rate * corrected / root
    return Mixture(new["means"], new["log_sigmas"], new["logits"], mixture.zero)


def merge(mixture: Mixture, threshold: float) -> Mixture:
    r"""Merge components beside zero that say the same, nearest pair first.

    Two are alike if their symmetric Kullback-Leibler divergence,
    :math:`\frac{1}{2}(KL(a|b) + KL(b|a))`, is below ``threshold``; the new one has the sum of their
    shares, and the mean and variance of both together.

    Args:
        mixture: As it was learnt.
        threshold: At least 0; 0 merges nothing.

    >>> same = Mixture(torch.tensor([1.0, 1.0, 3.0]), torch.zeros(4), torch.zeros(3), 0.9)
    >>> [round(x, 3) for x in merge(same, 0.01).means.tolist()]
    [1.0, 3.0]
    """
    means, variances = mixture.means.tolist(), (2 * mixture.log_sigmas[1:]).exp().tolist()
    shares = mixture.logits.softmax(0).tolist()
    while len(means) > 1:
        order = sorted(range(len(means)), key=means.__getitem__)
        pairs = [(_divergence(means, variances, a, b), a, b) for a, b in itertools.pairwise(order)]
        nearest, a, b = min(pairs)
        if not nearest < threshold:
            break
        share = shares[a] + shares[b]
        p, q = shares[a] / share, shares[b] / share
        mean = p * means[a] + q * means[b]
        variance = p * (variances[a] + means[a] ** 2) + q * (variances[b] + means[b] ** 2) - mean**2
        means[a], variances[a], shares[a] = mean, variance, share
        for kept in (means, variances, shares):
            del kept[b]
    like = mixture.means
    sigmas = torch.cat([mixture.log_sigmas[:1], torch.tensor(variances).to(like).clamp(min=1e-30).log() / 2])
    return Mixture(
        torch.tensor(means).to(like), sigmas, torch.tensor(shares).to(like).clamp(min=1e-30).log(), mixture.zero
    )


def _divergence(means: list[float], variances: list[float], a: int, b: int) -> float:
    apart = (means[a] - means[b]) ** 2
    return ((variances[a] + apart) / variances[b] + (variances[b] + apart) / variances[a] - 2) / 4


def assign(values: Tensor, mixture: Mixture) -> Tensor:
    """Return the number of the component that most likely made each weight, or -1 for the one at zero, (n,).

    >>> mixture = Mixture(torch.tensor([-1.0, 1.0]), torch.full((3,), 0.1).log(), torch.zeros(2), zero=0.9)
    >>> assign(torch.tensor([0.05, 0.9, -2.0, 0.0]), mixture).tolist()
    [-1, 1, 0, -1]
    """
    pieces = [log_joint(piece, mixture).argmax(1) for piece in values.to(mixture.means).split(_CHUNK)]
    return torch.cat(pieces) - 1 if pieces else values.long()


def mixture_state(mixture: Mixture, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a mixture and its optimizer's memory as tensors, for a checkpoint."""
    state = {f"mixture.{name}": getattr(mixture, name).clone() for name in _NAMES}
    return state | {f"adam.{name}": value.clone() for name, value in moments.items()}


def load_mixture(state: Mapping[str, Tensor], zero: float) -> tuple[Mixture | None, dict[str, Tensor]]:
    """Undo :func:`mixture_state`; the first is ``None`` if there is none in it."""
    found = {name: state[f"mixture.{name}"].clone() for name in _NAMES if f"mixture.{name}" in state}
    moments = {name.removeprefix("adam."): value.clone() for name, value in state.items() if name.startswith("adam.")}
    return (Mixture(**found, zero=zero) if len(found) == len(_NAMES) else None), moments
