"""The gradient of every sample, on a trained model and calibration batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.core.calibration import run_on
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.first_look import described
from lightning_compress.core.isolation import eval_mode, map_tensors

Loss = Callable[[Any, Any], Tensor]


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
        ConfigurationError: If a batch is not such a pair, or the loss fails or does not depend on any weight.

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
    one = slice(index, index + 1)
    part = map_tensors(lambda tensor: tensor[one] if tensor.dim() else tensor, batch[0])
    with torch.enable_grad():
        output = run_on(model, (part,))
        target = batch[1][one].to(output.device) if isinstance(output, Tensor) else batch[1][one]
        try:
            value = loss(output, target)
        except Exception as error:  # the user's own code
            raise ConfigurationError(
                f"`loss` cannot judge what {type(model).__name__} returns, {described(output)}, by a target, "
                f"{described(target)} ({type(error).__name__}: {error}); give a function of both that returns a scalar"
            ) from error
        if not value.requires_grad:
            raise ConfigurationError("`loss` does not depend on the selected weights; check the loss and the selection")
        found = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
    return {
        key: torch.zeros_like(weight) if gradient is None else gradient
        for (key, weight), gradient in zip(weights.items(), found, strict=True)
    }
