"""What optimizers hold of a model's weights, and what they remember of them; asked before training starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from torch.optim import Adamax, Optimizer

from lightning_compress.core.errors import ConfigurationError

SECOND_MOMENTS = ("exp_avg_sq", "square_avg", "sum")
"""What torch's adaptive optimizers call the running second moment: Adam and its kin, RMSprop, Adagrad."""


def holders(optimizers: Iterable[Optimizer]) -> dict[int, tuple[Optimizer, ...]]:
    """Return the optimizers that hold each parameter, by its ``id``.

    >>> import torch
    >>> layer = nn.Linear(2, 1)
    >>> found = holders([torch.optim.SGD([layer.weight], lr=0.1)])
    >>> [type(one).__name__ for one in found[id(layer.weight)]], id(layer.bias) in found
    (['SGD'], False)
    """
    found: dict[int, tuple[Optimizer, ...]] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                found[id(parameter)] = (*found.get(id(parameter), ()), optimizer)
    return found


def second_moment(optimizer: Optimizer, weight: nn.Parameter) -> Tensor | None:
    """Return the running second moment that an optimizer keeps of a weight; ``None`` before its first step."""
    state = optimizer.state.get(weight, {})
    return next((state[key] for key in SECOND_MOMENTS if isinstance(state.get(key), Tensor)), None)


def keeps_second_moment(optimizer: Optimizer) -> bool:
    """Return whether an optimizer will keep a second moment, as far as its settings tell.

    >>> import torch
    >>> make = (torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adamax, torch.optim.SGD)
    >>> [keeps_second_moment(one(nn.Linear(1, 1).parameters(), lr=0.1)) for one in make]
    [True, True, False, False]
    """
    given = optimizer.defaults.keys()
    kinds: tuple[set[str], ...] = ({"betas", "eps"}, {"alpha", "eps"}, {"rho"}, {"lr_decay"})
    return not isinstance(optimizer, Adamax) and any(kind <= given for kind in kinds)


def check_second_moments(
    weights: Mapping[str, nn.Parameter], optimizers: Iterable[Optimizer], argument: str, instead: str
) -> None:
    """Refuse, before training, weights of which no second moment will be kept.

    Args:
        weights: Those it is needed of, by path; frozen ones are passed over.
        optimizers: Of the fit.
        argument: What needs it, as it was given, such as ``"`importance` 'adam'"``.
        instead: What would do without.

    Raises:
        ConfigurationError: For a weight that no optimizer holds, or none that keeps second moments; names it.
    """
    held = holders(optimizers)
    for path, weight in weights.items():
        mine = held.get(id(weight), ())
        if not weight.requires_grad or any(keeps_second_moment(one) for one in mine):
            continue
        needs = f"{argument} needs an optimizer that keeps a second moment of the gradients (Adam, RMSprop, Adagrad)"
        if mine:
            raise ConfigurationError(
                f"{needs}, but {path!r} is trained by {type(mine[0]).__name__}; change the optimizer, or {instead}"
            )
        raise ConfigurationError(
            f"{needs}, but {path!r} is in no optimizer: let `configure_optimizers` take it, freeze it "
            f"(requires_grad_(False)), leave it out by `select`, or {instead}"
        )
