"""Share of predictions that compression changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.core.isolation import device_of, evaluating, map_tensors


@dataclass(frozen=True)
class Flips:
    """How many predictions two models disagree on.

    Attributes:
        changed: Predictions that differ.
        total: Predictions compared; several for each sample if the output has more dimensions than (N, C).
        reason: Why nothing was compared; else empty.
    """

    changed: int = 0
    total: int = 0
    reason: str = ""

    @property
    def rate(self) -> float | None:
        """Share of predictions that differ, 0 to 1; ``None`` if nothing was compared."""
        return None if self.reason or not self.total else self.changed / self.total


class _UnknownError(Exception):
    """Carries the sentence that says why a class cannot be told."""


def prediction_flip_rate(
    before: nn.Module,
    after: nn.Module,
    batches: Iterable[object],
    predict: Callable[[nn.Module, Any], Tensor] | None = None,
) -> float | None:
    r"""Return the share of predictions whose class differs between two models, or ``None`` if it cannot be told.

    .. math:: \frac{1}{N} \sum_i [\arg\max_c a(x_i)_c \ne \arg\max_c b(x_i)_c]

    Two models of equal accuracy can still disagree on many inputs, so this sees what an accuracy delta hides.

    Args:
        before: A module.
        after: Another module with outputs of the same shape.
        batches: Tensors, or tuples and lists that start with the input tensor.
        predict: Returns the predicted classes (N, ...) for a module and a batch that lies on the module's device.
            By default outputs (N, C, ...) are classed by the largest of C, outputs (N,) and (N, 1) by their sign, and
            nothing is compared if the targets (the second element of a batch) are those of a regression.

    Returns:
        The rate, 0 to 1. :func:`count_flips` also tells why there is none.

    >>> net, same = nn.Linear(2, 2), nn.Linear(2, 2)
    >>> _ = same.load_state_dict({key: -value for key, value in net.state_dict().items()})
    >>> prediction_flip_rate(net, same, [torch.randn(8, 2)]), prediction_flip_rate(net, net, [torch.randn(8, 2)])
    (1.0, 0.0)
    """
    return count_flips(before, after, batches, predict).rate


def count_flips(
    before: nn.Module,
    after: nn.Module,
    batches: Iterable[object],
    predict: Callable[[nn.Module, Any], Tensor] | None = None,
) -> Flips:
    """Count the predictions that differ between two models; the arguments are those of :func:`prediction_flip_rate`."""
    changed = total = 0
    signs = _SignCheck()
    with evaluating(before, after), torch.no_grad():
        for batch in batches:
            try:
                one, two = (_classes(model, batch, predict, signs) for model in (before, after))
            except _UnknownError as error:
                return Flips(reason=str(error))
            if one.shape != two.shape:
                return Flips(reason=f"the outputs have different shapes, {tuple(one.shape)} and {tuple(two.shape)}")
            changed += int((one != two).sum())
            total += one.numel()
    if not total:
        return Flips(reason="there was no batch to compare on")
    return Flips(reason=signs.objection()) if signs.objection() else Flips(changed, total)


class _SignCheck:
    """Remembers whether outputs that are classed by their sign had both signs."""

    def __init__(self) -> None:
        self.used = self.negative = False

    def classes(self, outputs: Tensor) -> Tensor:
        self.used = True
        self.negative = self.negative or bool((outputs < 0).any())
        return outputs > 0

    def objection(self) -> str:
        if self.used and not self.negative:
            return "no output is negative, so its sign does not tell the class; pass `predict`"
        return ""


def _classes(
    model: nn.Module, batch: object, predict: Callable[[nn.Module, Any], Tensor] | None, signs: _SignCheck
) -> Tensor:
    device = device_of(model)
    moved = map_tensors(lambda tensor: tensor.to(device), batch)
    if predict is not None:
        return predict(model, moved).cpu()
    outputs = model(_typed(model, _first_input(moved)))
    if isinstance(outputs, Tensor) and _regression(outputs, batch):
        raise _UnknownError("the targets are quantities, not classes, so no prediction can flip")
    if not isinstance(outputs, Tensor):
        raise _UnknownError(f"the output is a {type(outputs).__name__}, not a tensor of scores; pass `predict`")
    if not outputs.is_floating_point() or outputs.dim() == 0:
        raise _UnknownError(
            f"the output is {outputs.dtype} of shape {tuple(outputs.shape)}, not scores; pass `predict`"
        )
    if outputs.dim() == 1 or outputs.shape[1:] == (1,):
        return signs.classes(outputs).flatten().cpu()
    return outputs.argmax(dim=1).cpu()


def _regression(outputs: Tensor, batch: object) -> bool:
    """Return whether the targets of a batch are quantities: no class numbers, no shares of classes."""
    targets = batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None
    if not isinstance(targets, Tensor) or targets.is_complex() or not targets.numel():
        return False
    if outputs.dim() == 1 or outputs.shape[1:] == (1,):
        return not bool(torch.isin(targets, torch.tensor([-1, 0, 1], device=targets.device)).all())
    if not targets.is_floating_point():
        return False
    if targets.shape != outputs.shape:
        return bool((targets != targets.round()).any())
    shares = bool((targets >= 0).all()) and torch.allclose(targets.sum(1), targets.new_ones(()), atol=1e-3)
    return not shares and not bool(torch.isin(targets, targets.new_tensor([0, 1])).all())


def _typed(model: nn.Module, x: Tensor) -> Tensor:
    """Return inputs in the type of a model that has one, as Trainers with precision bf16-true give them."""
    types = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return x.to(types.pop()) if x.is_floating_point() and len(types) == 1 else x


def _first_input(batch: object) -> Tensor:
    first = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(first, Tensor):
        raise _UnknownError(
            f"a batch is a {type(batch).__name__} that does not start with a tensor of inputs; pass `predict`"
        )
    return first
