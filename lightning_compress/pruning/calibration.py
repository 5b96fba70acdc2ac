"""Running a trained model on calibration batches: what each layer sees, and the gradient of every sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.core.calibration import run_on
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.isolation import eval_mode
from lightning_compress.core.patches import layer_patches

Loss = Callable[[Any, Any], Tensor]


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


def sample_gradients(
    model: nn.Module, weights: Mapping[str, Tensor], batches: Iterable[Any], loss: Loss | None = None
) -> Iterator[dict[str, Tensor]]:
    """Yield, for one sample after the other, the gradient of its loss by each weight.

    Args:
        model: Put into eval mode meanwhile.
        weights: Parameters of it, by path, frozen ones too.
        batches: Pairs of inputs and targets, both with the samples along the first dimension.
        loss: Called with the output and the target of a batch of one; default cross entropy.

    Raises:
        ConfigurationError: If a batch is not such a pair, or the loss does not depend on any weight.

    >>> net = nn.Linear(2, 1, bias=False)
    >>> pairs = [(torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.zeros(2, 1))]
    >>> found = sample_gradients(net, {"w": net.weight}, pairs, loss=lambda y, target: y.sum())
    >>> [gradient["w"].tolist() for gradient in found]
    [[[1.0, 2.0]], [[0.0, 3.0]]]
    """
    judge = F.cross_entropy if loss is None else loss
    frozen = [weight for weight in weights.values() if not weight.requires_grad]
    with ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        for weight in frozen:
            stack.callback(weight.requires_grad_, False)
            weight.requires_grad_(True)
        for batch in batches:
            if not isinstance(batch, list | tuple) or len(batch) < 2 or not isinstance(batch[1], Tensor):
                raise ConfigurationError(
                    "`batches` must hold pairs (inputs, targets) here, because gradients of a loss are needed; got "
                    f"{type(batch).__name__}"
                )
            for index in range(len(batch[1])):
                yield _gradient(model, weights, batch, index, judge)


def _gradient(model: nn.Module, weights: Mapping[str, Tensor], batch: Any, index: int, loss: Loss) -> dict[str, Tensor]:
    inputs = batch[0]
    one = slice(index, index + 1)
    part = {key: value[one] for key, value in inputs.items()} if isinstance(inputs, Mapping) else inputs[one]
    with torch.enable_grad():
        output = run_on(model, (part,))
        target = batch[1][one].to(output.device) if isinstance(output, Tensor) else batch[1][one]
        value = loss(output, target)
        if not value.requires_grad:
            raise ConfigurationError("`loss` does not depend on the selected weights; check the loss and the selection")
        found = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
    return {
        key: torch.zeros_like(weight) if gradient is None else gradient
        for (key, weight), gradient in zip(weights.items(), found, strict=True)
    }
