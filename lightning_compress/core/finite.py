"""Whether weights, and what layers see on calibration data, are numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.core.calibration import run_on
from lightning_compress.core.copies import tensors_in
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.inputs import inputs_of
from lightning_compress.core.isolation import evaluating


def require_finite(model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Any], first: int = 0) -> None:
    """Run batches through a model, and refuse them if a layer sees NaN or infinity, or holds such itself.

    Args:
        model: Put into evaluation mode meanwhile; nothing of it changes.
        layers: Those of it that must not, by path. What others see (masks of minus infinity) may be anything.
        batches: As :func:`~lightning_compress.core.calibration.run_on` takes them.
        first: Number of the first of them.

    Raises:
        ConfigurationError: Names the layer, and the batch if that holds such numbers itself.

    >>> net = nn.Sequential(nn.Linear(1, 1))
    >>> require_finite(net, {"0": net[0]}, [torch.zeros(2, 1)])
    """
    for path, layer in layers.items():
        require_finite_weights(path, layer)
    seen: dict[str, Tensor] = {}

    def watch(path: str) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = args[0] if args else next(tensors_in(kwargs), None)
            if isinstance(given, Tensor) and given.is_floating_point():
                fine = given.isfinite().all()
                seen[path] = seen[path] & fine if path in seen else fine

        return hook

    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(evaluating(model))
        for path, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(watch(path), with_kwargs=True).remove)
        for number, batch in enumerate(batches, first):
            seen.clear()
            run_on(model, batch)
            bad = [path for path, fine in seen.items() if not bool(fine)]
            if bad:
                own = f"batch {number} of them holds such numbers"
                raise not_finite(bad[0], "the batches do not" if holds_finite(model, batch) else own)


def holds_finite(model: nn.Module, batch: Any) -> bool:
    """Return whether all inputs in a batch are numbers; masks of minus infinity are none.

    >>> holds_finite(nn.Linear(1, 1), (torch.zeros(2, 1), torch.tensor(float("nan"))))
    True
    """
    given = tensors_in(inputs_of(model, batch))
    return all(bool(x.isfinite().all()) for x in given if x.is_floating_point())


def require_finite_weights(path: str, layer: nn.Module) -> None:
    """Raise a ConfigurationError that names the first parameter of a layer which holds NaN or infinity."""
    bad = [name for name, tensor in layer.named_parameters() if not bool(tensor.isfinite().all())]
    if bad:
        raise ConfigurationError(
            f"`{path}.{bad[0]}` holds NaN or infinity, which nothing can be made of; load a checkpoint from before "
            "that, or leave the layer out with `select`"
        )


def not_finite(path: str, where: str = "") -> ConfigurationError:
    """Return the error for a layer that calibration data gives NaN or infinity."""
    said = f" ({where})" if where else ""
    return ConfigurationError(
        f"`batches`: what {path!r} sees on them holds NaN or infinity{said}; give calibration batches without"
    )
