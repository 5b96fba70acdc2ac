"""The curvature of each layer's own outputs, from what it sees on calibration batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.core.calibration import run_on
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.isolation import eval_mode
from lightning_compress.core.patches import layer_patches


def damp(hessian: Tensor, damping: float) -> Tensor:
    r"""Return :math:`H + \lambda\,\overline{\mathrm{diag} H}\, I` for each matrix of a batch.

    Args:
        hessian: (..., d, d).
        damping: The share of the mean diagonal to add, above 0; inputs that are always 0 need it.

    Raises:
        ConfigurationError: If a diagonal is all zero or not finite, so that there is nothing to go by.

    >>> damp(torch.diag(torch.tensor([1.0, 3.0])), 0.5).tolist()
    [[2.0, 0.0], [0.0, 4.0]]
    """
    mean = hessian.diagonal(dim1=-2, dim2=-1).mean(-1)
    if not bool((mean > 0).all() and mean.isfinite().all()):
        raise ConfigurationError(
            "`hessian`: the layer's inputs on the calibration batches are all zero or not finite; give other batches"
        )
    eye = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device)
    return hessian + damping * mean[..., None, None] * eye


def layer_hessian(layer: nn.Module, inputs: Tensor) -> Tensor:
    r"""Return :math:`2 X X^\top` of a layer's inputs, the Hessian of the squared error of each of its outputs.

    A bias counts as one more weight, the last, whose input is always 1: it is never pruned, but takes up the mean of
    what is removed.

    Args:
        layer: Linear or Conv1d/2d/3d.
        inputs: As in :func:`layer_patches`.

    Returns:
        (groups, d, d) in float64, d = in, or in + 1 with a bias. Sums over rows: add up batches, divide at the end.

    >>> import torch
    >>> layer_hessian(nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 2.0], [0.0, 1.0]])).tolist()
    [[[2.0, 4.0], [4.0, 10.0]]]
    """
    rows = layer_patches(layer, inputs.detach())
    if getattr(layer, "bias", None) is not None:
        rows = F.pad(rows, (0, 1), value=1.0)
    rows = rows.double()
    return 2 * rows.transpose(1, 2) @ rows


def collect_hessians(model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Any]) -> dict[str, Tensor]:
    r"""Run batches through the model and return :math:`\frac{2}{n} X X^\top` of the inputs of each layer.

    Args:
        model: Put into eval mode meanwhile; nothing of it changes.
        layers: Linear and convolution layers of it, by path.
        batches: As :func:`run_on` takes them.

    Returns:
        (groups, d, d) in float64 by path, as in :func:`layer_hessian`.

    Raises:
        ConfigurationError: If a layer is never called.

    >>> net = nn.Sequential(nn.Linear(2, 1, bias=False))
    >>> collect_hessians(net, {"0": net[0]}, [torch.eye(2)])["0"].tolist()
    [[[1.0, 0.0], [0.0, 1.0]]]
    """
    sums: dict[str, Tensor] = {}

    def watch(path: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = args[0] if args else kwargs["input"]
            count = inputs.numel() / inputs.shape[-1] if isinstance(layer, nn.Linear) else len(inputs)
            batch = layer_hessian(layer, inputs)
            if path in sums:
                sums[path] += batch
                counts[path] += count
            else:
                sums[path], counts[path] = batch, count

        return hook

    counts: dict[str, float] = {}
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(eval_mode(model))
        for path, layer in layers.items():
            handle = layer.register_forward_pre_hook(watch(path), with_kwargs=True)
            stack.callback(handle.remove)
        for batch in batches:
            run_on(model, batch)
    missing = [path for path in layers if path not in sums]
    if missing:
        raise ConfigurationError(
            f"the calibration batches never reach {', '.join(map(repr, missing[:6]))}: the model does not call it in "
            "`forward`; leave it out with select=Select(exclude=[...])"
        )
    for path in layers:
        sums[path] /= counts[path]
    return sums
