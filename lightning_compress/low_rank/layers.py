"""The module that stands in for a factorized layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.low_rank.matrix import as_float
from lightning_compress.low_rank.merging import NORMS, Norm, absorb, affine_of, multiply
from lightning_compress.low_rank.method import Ranks
from lightning_compress.low_rank.methods import method_named
from lightning_compress.low_rank.shapes import LayerShape, own_tensors, shape_of, weight_of
from lightning_compress.low_rank.trains import digits


class Factorized(nn.Module):
    """A layer as a sequence of smaller ones, all of them ordinary torch layers.

    ``factors`` holds them in the order in which they run, with batch norm between them if asked for. They can be
    pruned, quantized, distilled or factorized again; :meth:`to_dense` multiplies them out.

    Args:
        shape: Of the layer it stands for.
        method: Name of the method.
        ranks: Channels between the factors, over all groups.
        batch_norm: Whether a batch norm follows each factor but the last.
        device, dtype: Of the parameters.

    >>> layer = Factorized(LayerShape("conv", 4, 8, (3, 3), (1, 1), (1, 1), (1, 1), (0, 0)), "spatial_svd", (5,))
    >>> [tuple(factor.weight.shape) for factor in layer.factors], layer(torch.zeros(1, 4, 6, 6)).shape
    ([(5, 4, 3, 1), (8, 5, 1, 3)], torch.Size([1, 8, 6, 6]))
    """

    def __init__(
        self,
        shape: LayerShape,
        method: str,
        ranks: Sequence[int],
        batch_norm: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.method, self.ranks, self.batch_norm = shape, method, tuple(ranks), batch_norm
        parts: list[nn.Module] = []
        for part in factor_shapes(shape, method, self.ranks, batch_norm):
            if parts and batch_norm:
                parts.append(NORMS[len(shape.kernel) - 1](part.inputs, device=device, dtype=dtype))
            parts.append(part.build(device, dtype))
        self.factors = nn.Sequential(*parts)

    @classmethod
    def of_parts(cls, shape: LayerShape, method: str, ranks: Ranks, parts: Sequence[nn.Module]) -> Factorized:
        """Return a factorized layer that consists of the given factors, without batch norm."""
        module = cls(shape, method, ranks, device="meta")
        module.factors = nn.Sequential(*parts)
        return module

    def forward(self, input: Tensor) -> Tensor:
        """Run the factors one after the other."""
        output: Tensor = self.factors(input)
        return output

    def take_bias(self, bias: nn.Parameter) -> None:
        """Add a bias Parameter of the layer to the outputs."""
        self.layers()[-1].bias = bias

    def own_bias(self) -> nn.Parameter | None:
        """Return the bias Parameter of the layer, if it has one."""
        last = self.layers()[-1]
        return last.own_bias() if isinstance(last, Factorized) else own_tensors(last).get("bias")

    def extra_repr(self) -> str:
        """Return method and ranks."""
        return f"{self.method}, ranks={list(self.ranks)}"

    def config(self) -> dict[str, Any]:
        """Return the JSON-able arguments of the ``low_rank`` edit that builds this structure from the layer."""
        return {"method": self.method, "ranks": list(self.ranks), "batch_norm": self.batch_norm}

    def layers(self) -> list[nn.Module]:
        """Return the factors, without the batch norm between them."""
        return [part for part in self.factors if not isinstance(part, NORMS)]

    def norms(self) -> list[Norm]:
        """Return the batch norms between the factors, if any."""
        return [part for part in self.factors if isinstance(part, Norm)]

    def parts(self) -> tuple[LayerShape, ...]:
        """Return the shapes of the factors as they are now: channels cut, factors factorized again."""
        found: list[LayerShape] = []
        for layer in self.layers():
            found += layer.parts() if isinstance(layer, Factorized) else [shape_of(layer)]
        return tuple(found)

    def whole(self) -> LayerShape:
        """Return the shape of the layer that :meth:`to_dense` gives."""
        shapes = [shape_now(layer) for layer in self.layers()]
        inputs, outputs = self.ends(shapes)
        biased = self.own_bias() is not None or bool(self.norms()) or shapes[-1].bias
        return replace(self.shape, inputs=inputs, outputs=outputs, bias=biased)

    def ends(self, shapes: Sequence[LayerShape]) -> tuple[int, int]:
        """Return inputs and outputs of the whole layer, from the shapes of its factors."""
        return shapes[0].inputs, shapes[-1].outputs

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """Return one layer that computes the same in evaluation mode, with the bias Parameter of this one.

        What became of the factors meanwhile counts: channels that were cut, factors that were factorized again. A
        batch norm between factors makes a new bias.

        Raises:
            ConfigurationError: If a factor has no weight to multiply with (it was quantized); says why.
        """
        layers = [dense_of(layer) for layer in self.layers()]
        shapes = [shape_of(layer) for layer in layers]
        weight, bias = own_tensors(layers[0])["weight"], own_tensors(layers[-1]).get("bias")
        bias = self.own_bias() if bias is None else bias
        factors = [as_float(own_tensors(layer)["weight"]) for layer in layers]
        norms = [affine_of(norm) for norm in self.norms()]
        if norms:
            factors, shift = absorb(factors, shapes, norms)
            moved = shift if bias is None else shift + bias
            bias = nn.Parameter(moved.to(weight.dtype), requires_grad=weight.requires_grad)
        whole = self.whole()
        dense = whole.build("meta")
        value = weight_of(multiply(self.method, factors, shapes, whole), whole).to(weight.dtype).contiguous()
        dense.weight = nn.Parameter(value, requires_grad=weight.requires_grad)
        if bias is not None:
            dense.bias = bias
        return dense.train(self.training)


class FactorizedTrain(Factorized):
    """A Linear as a train of small ones (:class:`~lightning_compress.low_rank.trains.MatrixTrain`), each for one digit.

    Its width cannot be cut, because inputs and outputs are numbered by digits.

    >>> layer = FactorizedTrain(LayerShape("linear", 784, 256), "tt", (8, 8))
    >>> layer(torch.zeros(2, 784)).shape, sum(weight.numel() for weight in layer.parameters())
    (torch.Size([2, 256]), 5216)
    """

    def __init__(
        self,
        shape: LayerShape,
        method: str,
        ranks: Sequence[int],
        batch_norm: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(replace(shape, bias=False), method, ranks, batch_norm, device, dtype)
        self.bias = nn.Parameter(torch.zeros(shape.outputs, device=device, dtype=dtype)) if shape.bias else None

    def forward(self, input: Tensor) -> Tensor:
        """Take one digit of the inputs after the other for one of the outputs."""
        outs, ins = digits(self.shape, len(self.factors))
        state, before = (
            input.reshape(-1, 1, 1, self.shape.inputs),
            1,
        )
        for factor, o, i in zip(self.factors, outs, ins, strict=True):
            state = state.reshape(*state.shape[:2], before, i, -1).permute(0, 1, 4, 2, 3).flatten(3)
            state = factor(state).unflatten(3, (o, -1)).permute(0, 1, 3, 4, 2).flatten(1, 2)
            before = state.shape[2]
        output = state.reshape(*input.shape[:-1], self.shape.outputs)
        return output if self.bias is None else output + self.bias

    def take_bias(self, bias: nn.Parameter) -> None:
        """Add a bias Parameter of the layer to the outputs."""
        self.bias = bias

    def own_bias(self) -> nn.Parameter | None:
        """Return the bias Parameter of the layer, if it has one."""
        return self.bias

    def parts(self) -> tuple[LayerShape, ...]:
        """Return the shapes of the factors, with how often each runs."""
        return factor_shapes(self.whole(), self.method, self.ranks)

    def ends(self, shapes: Sequence[LayerShape]) -> tuple[int, int]:
        """Return inputs and outputs of the layer, which stay what they were."""
        return self.shape.inputs, self.shape.outputs


def shape_now(layer: nn.Module) -> LayerShape:
    """Return the shape of a layer; of factors that of the layer they make.

    >>> shape_now(Factorized(LayerShape("linear", 4, 3), "svd", (2,))) == shape_now(nn.Linear(4, 3, bias=False))
    True
    """
    return layer.whole() if isinstance(layer, Factorized) else shape_of(layer)


def dense_of(layer: nn.Module) -> nn.Module:
    """Return the layer that factors stand for, or the layer itself if it is not factorized.

    >>> dense_of(Factorized(LayerShape("linear", 4, 3), "svd", (2,)))
    Linear(in_features=4, out_features=3, bias=False)
    """
    return layer.to_dense() if isinstance(layer, Factorized) else layer


def container(shape: LayerShape, method: str) -> type[Factorized]:
    """Return the module class for a method and a layer."""
    return FactorizedTrain if method == "tt" and shape.kind == "linear" else Factorized


def factor_shapes(shape: LayerShape, method: str, ranks: Ranks, batch_norm: bool = False) -> tuple[LayerShape, ...]:
    """Return the shapes of the factors, in the order in which they run.

    With batch norm between them the first factor does all the padding: the shift of the norm then reaches every
    position alike, so that it can be folded away exactly.
    """
    factors = method_named(method).factors(shape, ranks)
    if not batch_norm:
        return factors
    padding = tuple(span // 2 for span in _spans(shape)) if isinstance(shape.padding, str) else shape.padding
    none = (0,) * len(shape.kernel)
    return (replace(factors[0], padding=padding), *(replace(factor, padding=none) for factor in factors[1:]))


def norm_reason(shape: LayerShape) -> str:
    """Return why there cannot be a batch norm between the factors of a layer, or nothing."""
    if shape.kind != "conv":
        return f"`batch_norm` is for convolutions, not for {shape.kind} layers: leave it out"
    if shape.padding == "same" and any(span % 2 for span in _spans(shape)):
        return "`batch_norm` cannot follow 'same' padding of an even kernel, which differs between the two sides"
    return ""


def _spans(shape: LayerShape) -> list[int]:
    return [d * (k - 1) for k, d in zip(shape.kernel, shape.dilation, strict=True)]
