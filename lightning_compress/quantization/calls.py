"""What each layer computes, as a function of its input and of a weight that is not its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.core.errors import ConfigurationError

CONVOLUTIONS: dict[type[nn.Module], Any] = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
TRANSPOSED: dict[type[nn.Module], Any] = {
    nn.ConvTranspose1d: F.conv_transpose1d,
    nn.ConvTranspose2d: F.conv_transpose2d,
    nn.ConvTranspose3d: F.conv_transpose3d,
}


def linear(layer: nn.Linear, x: Tensor, weight: Tensor) -> Tensor:
    """Return ``layer(x)`` with another weight."""
    return F.linear(x, weight, layer.bias)


def convolve(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    """Return ``layer(x)`` with another weight, for Conv1d, Conv2d and Conv3d with any padding.

    >>> import torch
    >>> layer, x = nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), torch.randn(1, 1, 5, 5)
    >>> torch.equal(convolve(layer, x, layer.weight), layer(x))
    True
    """
    function = _of(CONVOLUTIONS, layer)
    padding = layer.padding
    if layer.padding_mode != "zeros":
        x = F.pad(x, padded_by(layer), mode=layer.padding_mode)
        padding = 0
    return cast(Tensor, function(x, weight, layer.bias, layer.stride, padding, layer.dilation, layer.groups))


def padded_by(layer: Any) -> list[int]:
    """Return the padding of a convolution as ``F.pad`` wants it: last dimension first, before and after."""
    sides: list[int] = []
    for dim in reversed(range(len(layer.kernel_size))):
        if layer.padding == "valid":
            before = after = 0
        elif layer.padding == "same":
            total = layer.dilation[dim] * (layer.kernel_size[dim] - 1)
            before = total // 2
            after = total - before
        else:
            before = after = layer.padding[dim]
        sides += [before, after]
    return sides


def convolve_transposed(layer: Any, x: Tensor, weight: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
    """Return ``layer(x, output_size)`` with another weight, for ConvTranspose1d, 2d and 3d.

    >>> import torch
    >>> layer, x = nn.ConvTranspose1d(1, 2, 3, stride=2), torch.randn(1, 1, 5)
    >>> torch.equal(convolve_transposed(layer, x, layer.weight, [12]), layer(x, [12]))
    True
    """
    function = _of(TRANSPOSED, layer)
    extra = layer.output_padding if output_size is None else _output_padding(layer, x, output_size)
    return cast(
        Tensor, function(x, weight, layer.bias, layer.stride, layer.padding, extra, layer.groups, layer.dilation)
    )


def embed(layer: nn.Embedding, indices: Tensor, weight: Tensor) -> Tensor:
    """Return ``layer(indices)`` with another weight; it renormalizes none, as that would change the layer's own."""
    return F.embedding(indices, weight, layer.padding_idx, None, layer.norm_type, layer.scale_grad_by_freq)


def embed_bag(
    layer: nn.EmbeddingBag,
    indices: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
) -> Tensor:
    """Return ``layer(indices, offsets, per_sample_weights)`` with another weight."""
    return F.embedding_bag(
        indices,
        weight,
        offsets,
        None,
        layer.norm_type,
        layer.scale_grad_by_freq,
        layer.mode,
        False,
        per_sample_weights,
        layer.include_last_offset,
        layer.padding_idx,
    )


def _of(functions: dict[type[nn.Module], Any], layer: nn.Module) -> Any:
    for kind, function in functions.items():
        if isinstance(layer, kind):
            return function
    raise ConfigurationError(f"`layer` must be one of {', '.join(k.__name__ for k in functions)}, got {layer!r}")


def _output_padding(layer: Any, x: Tensor, output_size: Sequence[int]) -> list[int]:
    dims = len(layer.kernel_size)
    wanted, inputs = list(output_size)[-dims:], list(x.shape)[-dims:]
    extra = []
    for dim in range(dims):
        least = (
            (inputs[dim] - 1) * layer.stride[dim]
            - 2 * layer.padding[dim]
            + layer.dilation[dim] * (layer.kernel_size[dim] - 1)
            + 1
        )
        if not least <= wanted[dim] < least + layer.stride[dim]:
            raise ValueError(
                f"`output_size` asks for {wanted[dim]} along spatial dimension {dim}, which a stride of "
                f"{layer.stride[dim]} over {inputs[dim]} inputs cannot give: {least} to {least + layer.stride[dim] - 1}"
            )
        extra.append(wanted[dim] - least)
    return extra
