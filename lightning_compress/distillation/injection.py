"""Gradients that join a backward pass of somebody else's."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_compress.core.copies import tensors_in
from lightning_compress.core.errors import ConfigurationError

Hook = Callable[[Tensor], Tensor]


def depends_on(value: Tensor, outputs: Iterable[Any]) -> bool:
    """Tell whether the gradient of ``value`` goes through a tensor in ``outputs``; the search begins at ``value``.

    >>> x = torch.ones(2, requires_grad=True)
    >>> y = 2 * x
    >>> depends_on(y.sum(), [(y,)]), depends_on((3 * y.detach() * x).sum(), [(y,)])
    (True, False)
    """
    wanted = {tensor.grad_fn for tensor in tensors_in(list(outputs)) if tensor.grad_fn is not None}
    queue, known = deque([value.grad_fn] if wanted else []), set()
    while queue:
        node = queue.popleft()
        if node in wanted:
            return True
        if node is not None and node not in known:
            known.add(node)
            queue.extend(following for following, _ in node.next_functions)
    return False


@dataclass
class _Place:
    """A tensor of the student's graph, and the copies of it that losses see."""

    tensor: Tensor
    path: str
    leaves: list[Tensor] = field(default_factory=list)
    is_output: bool = False

    def take(self) -> list[Tensor]:
        """Return the gradients of the copies, once."""
        given = [leaf.grad for leaf in self.leaves if leaf.grad is not None]
        for leaf in self.leaves:
            leaf.grad = None
        return given


class Injector:
    """Hands out detached copies of tensors, and adds the gradients of the copies where the originals get theirs.

    Args:
        output: The layer whose own gradient is scaled too, by ``weight`` of :meth:`provide`.

    >>> injector = Injector("")
    >>> x = torch.ones(2, requires_grad=True)
    >>> z = 2 * x
    >>> copy = injector.leaf(z, "")
    >>> injector.provide((10 * copy).sum(), weight=0.5)
    >>> z.sum().backward()
    >>> x.grad  # 2 * (0.5 * 1 + 10)
    tensor([21., 21.])
    """

    def __init__(self, output: str) -> None:
        self.output = output
        self.weight: float | None = None
        self._places: dict[int, _Place] = {}

    @torch.compiler.disable
    def leaf(self, tensor: Tensor, path: str) -> Tensor:
        """Return a copy of ``tensor`` without its graph; a gradient the copy gets will be added to the tensor's."""
        copied = tensor.detach().clone()
        if not tensor.requires_grad:
            return copied
        place = self._places.get(id(tensor))
        if place is None:
            place = self._places[id(tensor)] = _Place(tensor, path)
            tensor.register_hook(self._adder(place))
        place.leaves.append(copied.requires_grad_(True))
        place.is_output |= path == self.output
        return copied

    def provide(self, total: Tensor, weight: float) -> None:
        """Compute the gradients of ``total`` with respect to the copies; they are added in the next backward pass."""
        self.weight = weight
        if total.requires_grad:  # else every loss has weight 0 at present
            total.backward()

    def check(self) -> None:
        """Forget the tensors, and refuse gradients that no backward pass has taken along.

        Raises:
            ConfigurationError: With the layer's path.
        """
        places, self._places, self.weight = self._places, {}, None
        lost = [place for place in places.values() if place.take()]
        if lost:
            raise ConfigurationError(
                f"the task's loss does not depend on what {lost[0].path or 'the module'!r} returned, so the callback's "
                "gradients cannot reach it; name another layer, or use DistillationModule"
            )

    def _adder(self, place: _Place) -> Hook:
        def add(gradient: Tensor) -> Tensor:
            total = gradient
            if place.is_output and self.weight is not None:
                total = gradient * self.weight
            for given in place.take():
                total = total + given.to(total.dtype)
            return total

        return add
