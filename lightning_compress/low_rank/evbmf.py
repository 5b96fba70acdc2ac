r"""How many singular values of a matrix stand out of its noise: analytic variational Bayes (EVBMF).

Nakajima, Sugiyama, Babacan and Tomioka (JMLR 14, 2013) give the global minimum of the free energy of a matrix that is a
product of two thin ones plus Gaussian noise, with priors learned from the data, in closed form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_compress.core.errors import ConfigurationError

_GRID = 256
_GOLDEN = (math.sqrt(5) - 1) / 2
_FLAT = 1e-12


@dataclass(frozen=True)
class NoiseModel:
    """What variational Bayes says of a matrix.

    Attributes:
        rank: Number of components above the noise; 0 if there is nothing but noise.
        variance: Estimated variance of the noise of an entry.
        threshold: Singular values above it stand out.
    """

    rank: int
    variance: float
    threshold: float


def evbmf(singular_values: Tensor, shape: tuple[int, int]) -> NoiseModel:
    r"""Return the rank at which variational Bayes sees signal, and the noise around it.

    With :math:`L \le M` the sides of the matrix, :math:`\alpha = L / M` and :math:`x_h = \gamma_h^2 / (M \sigma^2)`,
    the noise :math:`\sigma^2` minimizes

    .. math::
        \Omega(\sigma^2) = \frac1L \sum_h \psi_0(x_h) + [x_h > \underline{x}]\, \psi_1(x_h), \qquad
        \psi_0(x) = x - \log x, \quad
        \psi_1(x) = \log(\tau + 1) + \alpha \log\!\left(\frac{\tau}{\alpha} + 1\right) - \tau

    where :math:`\tau(x) = \frac12 (x - 1 - \alpha + \sqrt{(x - 1 - \alpha)^2 - 4 \alpha})` and
    :math:`\underline{x} = (1 + \underline\tau)(1 + \alpha / \underline\tau)` with :math:`\underline\tau` the root of
    :math:`\Phi(\tau) + \Phi(\tau / \alpha)`, :math:`\Phi(z) = \log(z + 1) / z - \frac12`. A component counts if
    :math:`\gamma_h^2 > M \sigma^2 \underline{x}`.

    It does not help on weights at their random initialization, which are noise: the rank is 0 then.

    Args:
        singular_values: All min(shape) of them, in any order.
        shape: Of the matrix.

    Raises:
        ConfigurationError: If they are not as many as the smaller side, or not finite.

    >>> import torch
    >>> generator = torch.Generator().manual_seed(0)
    >>> left, right = torch.randn(60, 5, generator=generator), torch.randn(5, 90, generator=generator)
    >>> noisy = left @ right + torch.randn(60, 90, generator=generator)
    >>> evbmf(torch.linalg.svdvals(noisy), (60, 90)).rank
    5
    """
    least, most = sorted(shape)
    values = np.sort(singular_values.detach().double().cpu().numpy())[::-1]
    if values.shape != (least,) or not np.isfinite(values).all():
        raise ConfigurationError(
            f"`singular_values` must be the {least} finite ones of a matrix of {shape[0]} x {shape[1]}, got "
            f"{tuple(singular_values.shape)}"
        )
    squares = values**2
    alpha = least / most
    cut = critical_value(alpha)
    low, high = _noise_bounds(squares, least, most, cut)
    if high <= 0:
        return NoiseModel(0, 0.0, 0.0)
    if squares[-1] <= _FLAT * squares[0]:  # no noise at all: whatever is not zero is signal
        return NoiseModel(int((squares > _FLAT * squares[0]).sum()), 0.0, float(np.sqrt(_FLAT * squares[0])))
    variance = _minimize(lambda noise: free_energy(squares, most, alpha, noise, cut), low, high)
    threshold = math.sqrt(most * variance * cut)
    return NoiseModel(int((values > threshold).sum()), variance, threshold)


def critical_value(alpha: float) -> float:
    r"""Return :math:`\underline{x}`: a squared singular value over M times the noise counts as signal from there on.

    Args:
        alpha: Smaller over larger side, above 0 and at most 1.

    >>> round(critical_value(1.0), 3)
    4.911
    """
    low, high = 1e-9, 10.0  # the root is close to 2.5129 sqrt(alpha)
    for _ in range(100):
        middle = (low + high) / 2
        if _phi(middle) + _phi(middle / alpha) > 0:
            low = middle
        else:
            high = middle
    return (1 + low) * (1 + alpha / low)


def free_energy(
    squares: NDArray[np.float64], most: int, alpha: float, noise: NDArray[np.float64], cut: float
) -> NDArray[np.float64]:
    r"""Return :math:`\Omega` for each of several noise variances.

    Args:
        squares: Squared singular values (L,).
        most: The larger side M.
        alpha: L / M.
        noise: Variances (n,).
        cut: From :func:`critical_value`.
    """
    x = np.maximum(squares[:, None], np.finfo(float).tiny) / (most * noise[None, :])
    inner = np.maximum(x - 1 - alpha, 0)
    tau = 0.5 * (inner + np.sqrt(np.maximum(inner**2 - 4 * alpha, 0)))
    signal = np.log1p(tau) + alpha * np.log1p(tau / alpha) - tau
    total: NDArray[np.float64] = (x - np.log(x) + np.where(x > cut, signal, 0.0)).mean(axis=0)
    return total


def _noise_bounds(squares: NDArray[np.float64], least: int, most: int, cut: float) -> tuple[float, float]:
    """Return between which variances the noise lies (Nakajima et al. 2013, theorem 4)."""
    index = min(math.ceil(least / (1 + least / most)) - 1, least - 1)
    rest = squares[index:]
    high = float(squares.sum() / (least * most))
    low = max(float(rest[min(1, len(rest) - 1)] / (most * cut)), float(rest.mean() / most))
    return min(low, high), high


def _minimize(energy: object, low: float, high: float) -> float:
    """Return where a function of many valleys is least: the best point of a grid, narrowed by golden section."""
    assert callable(energy)
    low = max(low, high * 1e-12)
    grid = np.geomspace(low, high, _GRID)
    values = np.concatenate([energy(part) for part in np.array_split(grid, 16)])
    best = int(values.argmin())
    a, b = math.log(grid[max(0, best - 1)]), math.log(grid[min(_GRID - 1, best + 1)])
    for _ in range(60):
        step = _GOLDEN * (b - a)
        left, right = energy(np.exp(np.array([b - step, a + step])))
        a, b = (a, a + step) if left <= right else (b - step, b)
    return float(math.exp((a + b) / 2))


def _phi(z: float) -> float:
    return math.log1p(z) / z - 0.5
