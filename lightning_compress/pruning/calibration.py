"""Running a trained model on calibration batches: what each layer sees, and the gradient of every sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.core.copies import tensors_in
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.pruning.patches import layer_hessian

Loss = Callable[[Any, Any], Tensor]


def check_batches(batches: Any, samples: int) -> None:
    """Refuse what :func:`calibration_batches` cannot read.

    Raises:
        ConfigurationError: If ``batches`` is not a collection, loader or data module, or ``samples`` is below 1.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ConfigurationError(f"`samples` must be an int >= 1, got {samples!r}")
    if isinstance(batches, Iterator | str | bytes):
        raise ConfigurationError(
            f"`batches` must be something that can be read again, got {type(batches).__name__}; give a list of "
            "batches, a loader or a data module"
        )
    if batches is not None and not (isinstance(batches, Iterable) or callable(_loader_of(batches))):
        raise ConfigurationError(
            f"`batches` must be a tensor, a list of batches, a loader or a data module, got {type(batches).__name__}"
        )


def _loader_of(batches: object) -> Any:
    return getattr(batches, "train_dataloader", None)


def require_batches(batches: Any) -> None:
    """Raise a ConfigurationError if there are no batches, as far as can be told without reading any."""
    if batches is None or (isinstance(batches, Sized) and len(batches) == 0):
        raise ConfigurationError(
            f"`batches` is {'missing' if batches is None else 'empty'}: this method looks at data; give calibration "
            "batches (a list of batches as the model takes them, a loader or a data module)"
        )


def calibration_batches(batches: Any, samples: int) -> Iterator[Any]:
    """Yield whole batches until at least ``samples`` samples have been seen.

    Args:
        batches: One tensor (a single batch), an iterable of batches such as a list or a loader, or a data module, of
            which the training data is taken.
        samples: How many samples are enough.

    Raises:
        ConfigurationError: If there is none.

    >>> [len(batch) for batch in calibration_batches([torch.zeros(3, 2)] * 4, samples=5)]
    [3, 3]
    """
    require_batches(batches)
    if isinstance(batches, Tensor):
        batches = [batches]
    elif callable(_loader_of(batches)):
        batches.prepare_data()
        batches.setup("fit")
        batches = batches.train_dataloader()
    seen = 0
    for batch in batches:
        yield batch
        first = next(tensors_in(batch), None)
        seen += 1 if first is None or first.dim() == 0 else len(first)
        if seen >= samples:
            return
    if seen == 0:
        raise ConfigurationError("`batches` is empty: give at least one calibration batch")


def run_on(model: nn.Module, batch: Any) -> Any:
    """Call ``model`` with a batch: a tensor, the first item of a list or tuple, or a mapping as keywords."""
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    inputs = batch[0] if isinstance(batch, list | tuple) else batch
    if isinstance(inputs, Mapping):
        return model(**{key: _to(value, device) for key, value in inputs.items()})
    return model(_to(inputs, device))


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode, and each back into its own afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


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
        stack.enter_context(evaluating(model))
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
        stack.enter_context(evaluating(model))
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
