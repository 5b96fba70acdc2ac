"""From any network to one that exporters take: a copy on the CPU, in evaluation mode, in integers where quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.core.copies import full_copy, tensors_in
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.examples import own_example
from lightning_compress.core.inputs import inputs_of
from lightning_compress.core.isolation import batch_size_of, call, map_tensors
from lightning_compress.core.paths import original
from lightning_compress.quantization.convert import convert_in_place, is_quantized
from lightning_compress.quantization.fixed import FixedQuantizer
from lightning_compress.quantization.integer import integer_tensors

_RARE = {torch.bfloat16, torch.float64}


class Forward(nn.Module):
    """A network that takes positional tensors only, whatever its own arguments are.

    Args:
        model: The network.
        names: Names of its keyword arguments, for example inputs that are a mapping.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...] | None) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *inputs: Any) -> Any:
        """Return the network's output."""
        if self.names is None:
            return self.model(*inputs)
        return self.model(**dict(zip(self.names, inputs, strict=True)))


@dataclass
class Prepared:
    """A network ready for an exporter.

    Args:
        module: In evaluation mode on the CPU.
        inputs: Positional example inputs, with at least two samples.
        expected: What the module returns for them.
        quantized: Whether it rounds weights or activations to integers somewhere.
        names: Of the inputs, a mapping being as many as it holds.
        left: What stays float, and why.
    """

    module: Forward
    inputs: tuple[Any, ...]
    expected: Any
    quantized: bool
    names: tuple[str, ...]
    left: dict[str, str] = field(default_factory=dict)


def prepare(model: nn.Module, example_inputs: Any, any_type: bool = True) -> Prepared:
    """Return a copy of ``model`` that exporters take, with example inputs.

    Args:
        model: Any module; it is not changed.
        example_inputs: One batch, or ``None`` for the module's ``example_input_array``.
        any_type: Whether bfloat16 and float64 may stay; runtimes lack kernels for them, and get float32.

    Raises:
        ConfigurationError: If there are no example inputs, they hold nothing or NaN, or the model cannot run on them.
    """
    given = own_example(model) if example_inputs is None else example_inputs
    if given is None:
        raise ConfigurationError(
            "`example_inputs`: an export runs the model once; pass one batch, or set the module's `example_input_array`"
        )
    for tensor in tensors_in(given):
        empty = tensor.shape[:1] == (0,)
        if empty or tensor.isnan().any():
            held = "no samples" if empty else "NaN"
            raise ConfigurationError(
                f"`example_inputs` must hold numbers to compare the file with, got {held} in a tensor of shape "
                f"{list(tensor.shape)}; pass a batch of real inputs"
            )
    copied = full_copy(original(model)).cpu().eval()
    scales = [weight.scale for weight in integer_tensors(copied)]
    if not any_type and _RARE & {value.dtype for value in (*copied.parameters(), *scales)}:
        copied.float()
        given = map_tensors(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor, given)
    given = map_tensors(lambda tensor: _at_least_two(tensor.detach().cpu(), batch_size_of(given)), given)
    left = convert_in_place(copied, given).left if is_quantized(copied) else {}
    weights = list(integer_tensors(copied))
    for weight in weights:
        weight.unpack()
    quantizers = [part for part in copied.modules() if isinstance(part, FixedQuantizer)]
    for quantizer in quantizers:
        quantizer.freeze()
    for parameter in copied.parameters():
        parameter.requires_grad_(False)
    if isinstance(given, Mapping):
        given = inputs_of(copied, given)
    named = isinstance(given, Mapping)
    values = tuple(given.values()) if named else tuple(given) if isinstance(given, tuple | list) else (given,)
    keys = tuple(map(str, given)) if named else tuple(f"input_{i}" for i in range(len(values)))
    module = Forward(copied, keys if named else None).eval()
    names = tuple(name for key, value in zip(keys, values, strict=True) for name in _names(key, value))
    try:
        with torch.inference_mode():
            expected = call(module, values)
    except Exception as error:  # the user's own code
        raise ConfigurationError(f"`example_inputs`: the model cannot run on them ({error})") from error
    names = ("input",) if len(names) == 1 else names
    return Prepared(module, values, expected, bool(weights or quantizers), names, left)


def _names(name: str, value: Any) -> list[str]:
    """Return a name for each input that a runtime has for one argument: a mapping comes as its values."""
    if not isinstance(value, Mapping):
        return [name]
    return [one for key, item in value.items() for one in _names(str(key), item)]


def _at_least_two(tensor: Tensor, batch: int | None) -> Tensor:
    """Return a batch of one twice: exporters take a dimension of 1 for one that never changes."""
    single = batch == 1 and tensor.dim() > 0 and tensor.shape[0] == 1
    return torch.cat([tensor, tensor]) if single else tensor


def outputs_of(value: Any) -> list[Tensor]:
    """Return the tensors of a model's output, in order."""
    return list(tensors_in(value))
