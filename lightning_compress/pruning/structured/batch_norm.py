"""Running statistics that fit a model after a cut."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.isolation import call, device_of, evaluating, map_tensors


def recalibrate_batch_norm(model: nn.Module, batches: Iterable[object]) -> int:
    """Measure the running statistics of every batch norm anew, with the weights as they are.

    Removing channels shifts the inputs of the layers behind them, while the statistics still describe the old ones. A
    pass over a few hundred samples often regains much of the accuracy before any fine-tuning. Only batch norms run in
    training mode, so dropout stays off; their momentum (also ``None``) and all modes are given back. Norms that are
    frozen or in evaluation mode are measured too: what they normalize has changed. Those without running statistics
    and those that no batch reaches stay as they are, and so do all of them if a batch fails.

    Args:
        model: Any module, changed in place.
        batches: Inputs: tensors, mappings of keywords, or tuples and lists whose first element is the input.

    Returns:
        The number of batches.

    Raises:
        ConfigurationError: If there is no batch; models without batch norm are left as they are.

    >>> norm = nn.BatchNorm1d(1)
    >>> recalibrate_batch_norm(norm, [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [7.0]])])
    2
    >>> norm.running_mean
    tensor([4.])
    """
    norms = [m for m in model.modules() if isinstance(m, _NORMS) and m.track_running_stats]
    before = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    momenta = [norm.momentum for norm in norms]
    device, count = device_of(model), 0
    with evaluating(model), torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average over all batches
            norm.train()
        done = False
        try:
            for batch in batches:
                inputs = batch[0] if isinstance(batch, tuple | list) else batch
                call(model, map_tensors(lambda tensor: tensor.to(device), inputs))
                count += 1
            done = count > 0
        finally:
            for norm, momentum, buffers in zip(norms, momenta, before, strict=True):
                norm.momentum = momentum
                if not done or not norm.num_batches_tracked:
                    _restore(norm, buffers)
    if not count:
        raise ConfigurationError("`batches` is empty: give at least one batch to measure the statistics on")
    return count


def _restore(norm: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    for name, buffer in norm.named_buffers():
        buffer.copy_(buffers[name])


_NORMS = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
