"""What each output of a layer sees of its inputs (im2col)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.core.errors import ConfigurationError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def layer_patches(layer: nn.Module, inputs: Tensor) -> Tensor:
    r"""Return what each output of a Linear or convolution layer sees: its inputs as rows (im2col).

    Args:
        layer: Linear, or Conv1d/2d/3d with any stride, padding, dilation and groups.
        inputs: What the layer was called with: (..., in) or (n, c, \*spatial), for convolutions also unbatched.

    Returns:
        (groups, rows, in) with in = in_features, or in_channels / groups times the kernel's size, in the order of
        ``weight.flatten(1)``.

    Raises:
        ConfigurationError: For another layer.

    >>> import torch
    >>> layer_patches(nn.Conv1d(1, 1, 2), torch.tensor([[[1.0, 2.0, 3.0]]])).tolist()
    [[[1.0, 2.0], [2.0, 3.0]]]
    """
    if isinstance(layer, nn.Linear):
        return inputs.reshape(1, -1, layer.in_features)
    if not isinstance(layer, CONVOLUTIONS):
        raise ConfigurationError(f"`layer` must be Linear or Conv1d/2d/3d, got {type(layer).__name__}")
    spatial = len(layer.kernel_size)
    windows = padded(layer, inputs if inputs.dim() == spatial + 2 else inputs.unsqueeze(0))
    for axis, (kernel, stride, dilation) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), start=2
    ):
        windows = windows.unfold(axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    batch, groups = windows.shape[0], layer.groups
    windows = windows.reshape(batch, groups, layer.in_channels // groups, *windows.shape[2:])
    places, kernels = range(3, 3 + spatial), range(3 + spatial, 3 + 2 * spatial)
    rows = windows.permute(1, 0, *places, 2, *kernels)
    return rows.reshape(groups, batch * rows.shape[2 : 2 + spatial].numel(), -1)


def padded(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, inputs: Tensor) -> Tensor:
    """Return (n, c, *spatial) inputs with the padding of a convolution around them."""
    sides: list[int] = []
    for axis in reversed(range(len(layer.kernel_size))):
        if layer.padding == "same":
            total = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
            sides += [total // 2, total - total // 2]
        else:
            both = 0 if isinstance(layer.padding, str) else layer.padding[axis]
            sides += [both, both]
    return F.pad(inputs, sides, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
