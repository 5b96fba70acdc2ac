"""Structural costs of a model: parameters, non-zeros and multiply-accumulate operations."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_compress.core.copies import refuse_lazy, structure_copy
from lightning_compress.core.isolation import call, device_of, map_tensors, same_randomness
from lightning_compress.core.paths import clean_path


@runtime_checkable
class HeldWeight(Protocol):
    """A module that keeps a weight in buffers, as integers: its elements count as those of a Parameter do.

    Attributes:
        shape: Of the weight.
        bits: Of each element.
    """

    shape: tuple[int, ...]
    bits: int

    def count_nonzero(self) -> int | None:
        """Return how many elements are not zero; ``None`` without values."""


@dataclass(frozen=True)
class ParameterCount:
    """How many numbers a model learns, and how many of them are not zero.

    Attributes:
        total: Elements of all Parameters, frozen ones too, each tied Parameter once, and of every :class:`HeldWeight`.
        nonzero: Those that are not zero; ``None`` if values are not there (``meta`` device).
        per_layer: ``path -> (total, nonzero)`` of the Parameters that a module itself holds; sums to the totals.
    """

    total: int
    nonzero: int | None
    per_layer: dict[str, tuple[int, int | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class MacCount:
    """Multiply-accumulate operations of one forward pass.

    Attributes:
        total: Operations for the whole example batch; ``None`` if they could not be counted.
        per_layer: ``path -> operations`` done in a module's own forward, outside its submodules; sums to the total.
        reason: Why ``total`` is ``None``; else empty.
    """

    total: int | None
    per_layer: dict[str, int] = field(default_factory=dict)
    reason: str = ""


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count the elements of a model's Parameters and those that are not zero.

    Args:
        model: Any module. A tied Parameter belongs to the first module that holds it.

    Returns:
        The counts, for the model and for each module that holds Parameters itself.

    Raises:
        ConfigurationError: If a lazy layer has no shape yet.

    >>> net = nn.Linear(3, 2)
    >>> _ = nn.init.zeros_(net.bias), nn.init.ones_(net.weight)
    >>> count_parameters(net)
    ParameterCount(total=8, nonzero=6, per_layer={'': (8, 6)})
    """
    refuse_lazy(model)
    seen: set[int] = set()
    rows: dict[str, tuple[int, int | None]] = {}
    for path, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        seen.update(map(id, own))
        held = [module] if isinstance(module, HeldWeight) else []
        if own or held:
            total = sum(p.numel() for p in own) + sum(math.prod(weight.shape) for weight in held)
            nonzero = [*map(count_nonzero, own), *(weight.count_nonzero() for weight in held)]
            rows[clean_path(path)] = (total, _sum_known(nonzero))
    return ParameterCount(
        total=sum(total for total, _ in rows.values()),
        nonzero=_sum_known([nonzero for _, nonzero in rows.values()]),
        per_layer=rows,
    )


def count_nonzero(tensor: Tensor) -> int | None:
    """Return the number of elements that are not zero, or ``None`` for a tensor without values.

    >>> count_nonzero(torch.tensor([0.0, -0.0, 2.0]))
    1
    """
    if tensor.is_meta:
        return None
    values = tensor.detach()
    if values.is_floating_point() and values.element_size() == 1:
        values = values.float()
    return int(torch.count_nonzero(values))


def count_macs(model: nn.Module, example_inputs: object) -> MacCount:
    r"""Count the multiply-accumulate operations of one forward pass in evaluation mode.

    Half of what torch's own counter finds: convolutions, matrix products and attention, functional ones too; not
    element-wise operations, normalization, or the look-ups of an embedding. For a linear layer
    :math:`\text{batch} \cdot \text{in} \cdot \text{out}`. Zeros in a weight are multiplied like other numbers.

    The pass runs on a copy on the ``meta`` device, without arithmetic. A model that needs real values (branches on
    data, constants on a device of their own) runs on a real copy, with fused kernels off because the counter does not
    see into them. The model, its buffers and modes and the random states stay as they are.

    Args:
        model: Any module, a ``LightningModule`` included; its ``forward`` is called.
        example_inputs: One batch: a tensor, a tuple of positional or a mapping of keyword arguments.

    Returns:
        The count; with ``total=None`` and a ``reason`` if neither way works.

    >>> count_macs(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)), torch.zeros(3, 8)).per_layer
    {'0': 96, '2': 24}
    """
    reasons = []
    for device in dict.fromkeys((torch.device("meta"), device_of(model))):
        try:
            copied = structure_copy(model, partial(_copy_to, device))
            return _run_counter(copied, map_tensors(partial(_copy_to, device), example_inputs))
        except Exception as error:  # user code runs here: whatever it raises is the reason, not a failure of the report
            reasons.append(f"on {device}: {type(error).__name__}: {_first_line(error)}")
    return MacCount(None, {}, "; ".join(reasons))


def _copy_to(device: torch.device, tensor: Tensor) -> Tensor:
    return tensor.to(device, copy=True)


def _run_counter(model: nn.Module, inputs: object) -> MacCount:
    counter = FlopCounterMode(display=False)
    tally = _OwnTally(counter)
    for path, module in model.named_modules():
        tally.watch(clean_path(path), module)
    with _countable_kernels(), same_randomness(), torch.no_grad(), counter:
        call(model.eval(), inputs)
    own = {path: flops // 2 for path, flops in tally.flops.items() if flops}
    return MacCount(counter.get_total_flops() // 2, own)


class _OwnTally:
    """Splits what a counter sees into what each module does itself, by reading it whenever a module starts or ends."""

    def __init__(self, counter: FlopCounterMode) -> None:
        self.counter = counter
        self.flops: dict[str, int] = {}
        self.stack: list[str] = [""]
        self.read = 0

    def watch(self, path: str, module: nn.Module) -> None:
        def enter(*_: object) -> None:
            self._settle()
            self.stack.append(path)

        def leave(*_: object) -> None:
            self._settle()
            self.stack.pop()

        module.register_forward_pre_hook(enter, prepend=True)
        module.register_forward_hook(leave)

    def _settle(self) -> None:
        total = self.counter.get_total_flops()
        top = self.stack[-1]
        self.flops[top] = self.flops.get(top, 0) + total - self.read
        self.read = total


@contextmanager
def _countable_kernels() -> Iterator[None]:
    """Switch off what hides arithmetic from the counter: compiled graphs, fused attention, fused recurrent kernels."""
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)


def _sum_known(values: list[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:300]
