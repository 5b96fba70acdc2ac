"""Whether calibration data suits a model, found out before anything depends on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_compress.core.calibration import loader_of, run_on
from lightning_compress.core.copies import tensors_in
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.inputs import inputs_of
from lightning_compress.core.isolation import evaluating

_SAMPLES = 2


def check_first_batch(model: nn.Module, batches: Any) -> None:
    """Run ``model`` on the first samples of calibration data; neither the model nor any random state changes.

    Of a loader with positions the samples are taken from its data set, so that iterators in use stay where they are.

    Raises:
        ConfigurationError: If there is no batch, or the model cannot run on it.

    >>> check_first_batch(nn.Linear(4, 2), [torch.zeros(3, 4)])
    """
    with evaluating(model), torch.no_grad():
        batch = _first_batch(batches)
        try:
            run_on(model, batch)
        except Exception as error:  # the user's own code
            raise ConfigurationError(
                f"`batches`: {type(model).__name__} cannot run on a calibration batch, which is {described(batch)} and "
                f"gives it {described(inputs_of(model, batch))} ({type(error).__name__}: {error}). Give batches as "
                "`inputs`, `(inputs, targets)`, `((first, second), targets)` for several positional inputs, or a "
                "mapping with the names of the arguments of `forward`"
            ) from error


def _first_batch(batches: Any) -> Any:
    loader: Any = batches
    if isinstance(batches, Tensor):
        return batches
    if callable(loader_of(batches)):
        if getattr(batches, "trainer", None) is None:  # else the Trainer has set it up, and splits may be random
            batches.prepare_data()
            batches.setup("fit")
        loader = batches.train_dataloader()
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        source: Any = loader.dataset
        indices = list(range(min(_SAMPLES, len(source)))) if hasattr(source, "__len__") else []
        if indices and loader.batch_size is not None:
            whole = getattr(source, "__getitems__", None)  # as torch's own fetcher does
            return loader.collate_fn([source[index] for index in indices] if whole is None else whole(indices))
    for batch in loader:
        return batch
    raise ConfigurationError("`batches` is empty: give at least one calibration batch")


def described(value: Any) -> str:
    """Return the kind of a batch and the shapes in it.

    >>> described((torch.zeros(2, 3), {"y": 1}))
    'a tuple (a tensor of shape [2, 3], a dict {y: int})'
    """
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} {{{', '.join(f'{key}: {described(item)}' for key, item in value.items())}}}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} ({', '.join(map(described, value[:6]))})"
    return type(value).__name__


def require_finite(model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Any]) -> None:
    """Run batches through a model, and refuse them if a layer sees NaN or infinity, or holds such itself.

    Args:
        model: Put into evaluation mode meanwhile; nothing of it changes.
        layers: Those of it that must not, by path. What others see (masks of minus infinity) may be anything.
        batches: As :func:`~lightning_compress.core.calibration.run_on` takes them.

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
        for number, batch in enumerate(batches):
            seen.clear()
            run_on(model, batch)
            bad = [path for path, fine in seen.items() if not bool(fine)]
            if bad:
                given = tensors_in(inputs_of(model, batch))
                own = any(x.is_floating_point() and not bool(x.isfinite().all()) for x in given)
                raise not_finite(bad[0], f"batch {number} of them holds such numbers" if own else "the batches do not")


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
