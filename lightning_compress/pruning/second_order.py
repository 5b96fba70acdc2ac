r"""Second-order saliency: how much the loss rises when a weight goes, and how the others make up for it.

Around trained weights the loss is a quadratic, :math:`\delta L = \frac12 \delta w^\top H \delta w`. Optimal Brain
Damage keeps the diagonal of H, Optimal Brain Surgeon all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.isolation import eval_mode

DEAD = 1e-12
"""A diagonal of an inverse Hessian at or below this means that the weight is determined by nothing."""


def obd_saliency(weight: Tensor, curvature: Tensor) -> Tensor:
    r"""Return the rise of the loss when each weight alone is removed (Optimal Brain Damage, LeCun et al. 1989).

    .. math:: s_k = \tfrac12 h_{kk} w_k^2

    Args:
        weight: Weights of any shape.
        curvature: Diagonal of the Hessian in the same shape, >= 0, from :func:`gauss_newton_diagonal`,
            :func:`fisher_diagonal` or :func:`hutchinson_diagonal`; negative entries count as 0.

    Returns:
        Saliencies in the shape of ``weight``, >= 0, at least in float32.

    Raises:
        ConfigurationError: If the shapes differ.

    >>> obd_saliency(torch.tensor([2.0, -1.0]), torch.tensor([1.0, 6.0])).tolist()
    [2.0, 3.0]
    """
    if weight.shape != curvature.shape:
        raise ConfigurationError(
            f"`curvature` must have the shape of `weight`, {tuple(weight.shape)}, got {tuple(curvature.shape)}"
        )
    wide = torch.promote_types(weight.dtype, torch.float32)
    return curvature.clamp(min=0) * weight.detach().to(wide).square() / 2


def fisher_diagonal(gradients: Iterable[Tensor]) -> Tensor:
    r"""Return the diagonal of the empirical Fisher information, :math:`h_k = \frac1N \sum_n g_{nk}^2`.

    Args:
        gradients: The gradient of the loss of each sample, all of one shape; read once, never held together.

    Returns:
        The mean of the squares.

    Raises:
        ConfigurationError: If there are no gradients.

    >>> fisher_diagonal([torch.tensor([1.0, 0.0]), torch.tensor([3.0, 2.0])]).tolist()
    [5.0, 2.0]
    """
    total: Tensor | None = None
    count = 0
    for gradient in gradients:
        square = gradient.detach().square()
        total = square if total is None else total.add_(square)
        count += 1
    if total is None:
        raise ConfigurationError("`gradients` is empty: give the gradient of at least one sample")
    return total / count


def gauss_newton_diagonal(
    model: nn.Module, layers: Mapping[str, nn.Linear], batches: Iterable[Tensor]
) -> dict[str, Tensor]:
    r"""Return the exact diagonal of the Gauss-Newton matrix of cross entropy, for the weights of Linear layers.

    .. math:: h_k = \frac1N \sum_n \sum_c p_{nc} \left(\frac{\partial \log p_{nc}}{\partial w_k}\right)^2

    What Optimal Brain Damage takes for the Hessian (LeCun et al. 1989), and the Fisher information of the model's own
    predictions: it needs no labels, and is not made of the few images that are still wrong, as :func:`fisher_diagonal`
    is. Costs a forward pass and one backward pass per class; the gradients of single samples are never formed.

    Args:
        model: Returns logits (batch, classes); run in evaluation mode.
        layers: Layers of it by name, whose inputs are (batch, features) and which run once.
        batches: Inputs.

    Returns:
        By name, in float64 and the shape of the weight.

    Raises:
        ConfigurationError: If there are no inputs, or a layer does not run once on a matrix.

    >>> net = nn.Linear(1, 2).double()
    >>> _ = [nn.init.zeros_(p) for p in net.parameters()]
    >>> gauss_newton_diagonal(net, {"fc": net}, [torch.tensor([[2.0]]).double()])["fc"].flatten()
    tensor([1.0000, 1.0000], dtype=torch.float64)
    """
    totals = {name: torch.zeros_like(layer.weight, dtype=torch.float64) for name, layer in layers.items()}
    count = 0
    with eval_mode(model), torch.enable_grad():
        for batch in batches:
            logits, inputs, outputs = _run_watched(model, layers, batch)
            log_probability = logits.log_softmax(1)
            weighted = log_probability * log_probability.detach().div(2).exp()  # the square brings p back
            for column in weighted.sum(0):
                found = torch.autograd.grad(column, list(outputs.values()), retain_graph=True)
                for name, gradient in zip(outputs, found, strict=True):
                    totals[name] += (gradient.square().T @ inputs[name].square()).double()
            count += len(batch)
    if not count:
        raise ConfigurationError("`batches` is empty: give at least one batch of inputs")
    return {name: total / count for name, total in totals.items()}


def _run_watched(
    model: nn.Module, layers: Mapping[str, nn.Linear], batch: Tensor
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Return the logits, and the inputs and outputs of each layer."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def watch(name: str, layer: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        if name in inputs or given[0].dim() != 2:
            raise ConfigurationError(f"{name!r} must run once, on (batch, features); got {tuple(given[0].shape)}")
        inputs[name], outputs[name] = given[0].detach(), made

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(layer.register_forward_hook(partial(watch, name)))
        logits = model(batch)
    missing = [name for name in layers if name not in inputs]
    if missing:
        raise ConfigurationError(f"{missing[0]!r} did not run on the batch; give layers that the model uses")
    return logits, inputs, outputs


def hutchinson_diagonal(
    loss: Callable[[], Tensor], parameters: Sequence[Tensor], samples: int = 32, seed: int = 0
) -> list[Tensor]:
    r"""Return an unbiased estimate of the Hessian's diagonal (Hutchinson 1990; Bekas et al. 2007).

    .. math:: h \approx \frac1S \sum_s v_s \odot H v_s, \qquad v_s \in \{-1, 1\}^n

    It is exact where the Hessian is diagonal; else its variance is the sum of squares beside the diagonal.

    Args:
        loss: Returns the loss as a differentiable scalar; called once.
        parameters: What to differentiate by.
        samples: Number of random sign vectors, >= 1; each costs about two backward passes.
        seed: Seed of the signs.

    Returns:
        One tensor per parameter.

    Raises:
        ConfigurationError: If ``samples`` is below 1, or the loss does not depend on a parameter.

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> hutchinson_diagonal(lambda: (w**3).sum(), [w])[0].tolist()
    [6.0, 12.0]
    """
    if samples < 1:
        raise ConfigurationError(f"`samples` must be at least 1, got {samples}")
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        try:
            first = torch.autograd.grad(loss(), parameters, create_graph=True)
        except RuntimeError as error:
            raise ConfigurationError(f"`loss` cannot be differentiated by all `parameters`: {error}") from error
    totals = [torch.zeros_like(parameter) for parameter in parameters]
    smooth = [index for index, gradient in enumerate(first) if gradient.requires_grad]
    for _ in range(samples):
        signs = [
            torch.randint(0, 2, p.shape, generator=generator).to(p.device, p.dtype).mul_(2).sub_(1) for p in parameters
        ]
        if not smooth:  # a linear loss has no curvature
            break
        products = torch.autograd.grad(
            [first[i] for i in smooth], parameters, [signs[i] for i in smooth], retain_graph=True, allow_unused=True
        )
        for total, sign, product in zip(totals, signs, products, strict=True):
            if product is not None:
                total.addcmul_(sign, product.detach(), value=1 / samples)
    return totals


@dataclass(frozen=True)
class Surgery:
    """What :func:`obs_prune_exact` did.

    Args:
        weight: The new weights (d,): zeros where pruned, the others moved to make up for it.
        order: Indices of the pruned weights, in the order they went.
        losses: The predicted rise of the loss at each removal.
        inverse: The inverse Hessian (d, d) of what is left; rows and columns of pruned weights are zero.
    """

    weight: Tensor
    order: tuple[int, ...]
    losses: tuple[float, ...]
    inverse: Tensor


def obs_prune_exact(weight: Tensor, inverse_hessian: Tensor, count: int) -> Surgery:
    r"""Remove ``count`` weights one by one, each time the least salient (Optimal Brain Surgeon, Hassibi & Stork 1992).

    .. math::
        s_q = \frac{w_q^2}{2 [H^{-1}]_{qq}}, \qquad
        \delta w = -\frac{w_q}{[H^{-1}]_{qq}} H^{-1} e_q, \qquad
        H^{-1} \leftarrow H^{-1} - \frac{H^{-1} e_q e_q^\top H^{-1}}{[H^{-1}]_{qq}}

    For the set that went, the result is exactly the minimum of the quadratic; the set itself is chosen greedily. It
    takes ``count * d^2`` operations, so this is for small layers; :func:`obc_trace` does the rows of larger ones.

    Args:
        weight: Weights (d,).
        inverse_hessian: Inverse of the positive definite Hessian (d, d).
        count: How many to remove, 0 to d.

    Returns:
        New weights, the order, predicted losses and the inverse Hessian of what is left.

    Raises:
        ConfigurationError: If the shapes do not fit, ``count`` is out of range, or a diagonal entry is not positive.

    >>> H = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> done = obs_prune_exact(torch.tensor([1.0, 3.0]), torch.linalg.inv(H), count=1)
    >>> done.order, [round(value, 4) for value in done.weight.tolist()], round(done.losses[0], 4)
    ((0,), [0.0, 3.5], 0.75)
    """
    size = weight.numel()
    if weight.dim() != 1 or inverse_hessian.shape != (size, size):
        raise ConfigurationError(
            f"`weight` must be (d,) and `inverse_hessian` (d, d), got {tuple(weight.shape)} and "
            f"{tuple(inverse_hessian.shape)}"
        )
    if not 0 <= count <= size:
        raise ConfigurationError(f"`count` must lie in 0..{size}, got {count}")
    value, inverse = weight.detach().clone(), inverse_hessian.detach().clone()
    left = torch.ones(size, dtype=torch.bool, device=weight.device)
    order: list[int] = []
    losses: list[float] = []
    for _ in range(count):
        diagonal = inverse.diagonal()
        if not bool((diagonal[left] > DEAD * inverse_hessian.diagonal()[left]).all()):
            raise ConfigurationError(
                "`inverse_hessian` is not positive definite (after the downdates so far); add damping to the diagonal "
                "of the Hessian before inverting it"
            )
        scores = torch.where(left, value.square() / (2 * diagonal), torch.inf)
        worst = int(scores.argmin())
        column = inverse[:, worst].clone()
        value -= column * (value[worst] / column[worst])
        inverse -= torch.outer(column, column) / column[worst]
        left[worst] = False
        value[worst], inverse[worst, :], inverse[:, worst] = 0, 0, 0
        order.append(worst)
        losses.append(float(scores[worst]))
    value[~left] = 0
    return Surgery(value, tuple(order), tuple(losses), inverse)
