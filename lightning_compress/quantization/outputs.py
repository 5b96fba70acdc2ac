"""Quantizers at the output or the input of any module, by hooks: block outputs, additions, pools, the model's input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.verbs import register_kind
from lightning_compress.quantization.build import build_quantizer
from lightning_compress.quantization.spec import QuantizerSpec

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def quantize_output(module: ModuleT, **spec: Any) -> ModuleT:
    """Quantize what ``module`` returns, in place: a child ``output_quantizer``, and a hook that calls it.

    Of a tuple the first tensor is quantized, as recurrent and attention layers return their output first.

    Args:
        module: Any module.
        spec: Arguments of the :class:`QuantizerSpec`.

    Returns:
        The same object.

    >>> pool = quantize_output(nn.MaxPool2d(2), bits=4)
    >>> [name for name, _ in pool.named_children()]
    ['output_quantizer']
    """
    _add(module, "output_quantizer", spec)
    module.register_forward_hook(_quantize_result)
    return module


def quantize_input(module: ModuleT, **spec: Any) -> ModuleT:
    """Quantize the first tensor that ``module`` is called with, in place: a child ``input_quantizer``, and a hook.

    >>> net = quantize_input(nn.Sequential(nn.Flatten()), bits=8)
    >>> net(torch.ones(1, 2))
    tensor([[1., 1.]])
    """
    _add(module, "input_quantizer", spec)
    module.register_forward_pre_hook(_quantize_argument, with_kwargs=True)
    return module


def _add(module: nn.Module, name: str, spec: Mapping[str, Any]) -> None:
    if name in dict(module.named_children()):
        raise ConfigurationError(f"{type(module).__name__} has `{name}` already")
    like = next((t for t in (*module.parameters(), *module.buffers())), None)
    with torch.device(like.device if like is not None else torch.get_default_device()):
        quantizer = build_quantizer(QuantizerSpec.from_config(spec), "input")
    module.add_module(name, quantizer.train(module.training))


def _quantize_result(module: nn.Module, args: Any, output: Any) -> Any:
    quantizer = module.get_submodule("output_quantizer")
    if isinstance(output, Tensor):
        return quantizer(output)
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return (quantizer(output[0]), *output[1:])
    return output


def _quantize_argument(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    quantizer = module.get_submodule("input_quantizer")
    for place, value in enumerate(args):
        if isinstance(value, Tensor):
            return (*args[:place], quantizer(value), *args[place + 1 :]), kwargs
    for name, value in kwargs.items():
        if isinstance(value, Tensor):
            return args, {**kwargs, name: quantizer(value)}
    return None


register_kind("replace", "quantized_output")(quantize_output)
register_kind("replace", "quantized_input")(quantize_input)
