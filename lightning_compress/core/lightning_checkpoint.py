"""Read Lightning checkpoints of models with edits."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.hooks import install_hooks

ModuleT = TypeVar("ModuleT", bound=nn.Module)
_CLASS_LOCK = threading.RLock()


def load_from_checkpoint(
    cls: type[ModuleT],
    checkpoint_path: Any,
    map_location: Any = None,
    hparams_file: str | Path | None = None,
    strict: bool | None = None,
    **kwargs: Any,
) -> ModuleT:
    """Do what ``cls.load_from_checkpoint`` does, also for checkpoints of a model with edits.

    The classmethod alone knows nothing of the journal in the checkpoint and stops at unexpected keys.

    Args:
        cls: A LightningModule class.
        checkpoint_path: File, URL or file object; read with ``weights_only=True``.
        map_location: Where the tensors go, as in ``torch.load``.
        hparams_file: Hyperparameters that replace the checkpoint's.
        strict: Whether keys must match; by default what the module says.
        **kwargs: Arguments of the constructor that replace the saved hyperparameters.

    Returns:
        An instance of ``cls`` with the edits replayed and the tensors loaded.

    Raises:
        ConfigurationError: If ``cls`` is no LightningModule class.
        JournalMismatchError: If the checkpoint's journal does not fit.
    """
    lightning_class: Any = cls
    if not (isinstance(cls, type) and hasattr(cls, "load_from_checkpoint") and hasattr(cls, "on_load_checkpoint")):
        raise ConfigurationError(
            f"`cls` must be a LightningModule class, got {cls!r}; "
            "use `load_compressed(model, path)` for the compressed file of a plain module"
        )
    with _hooked(lightning_class):
        loaded: ModuleT = lightning_class.load_from_checkpoint(
            checkpoint_path, map_location, hparams_file, strict, weights_only=True, **kwargs
        )
    return loaded


@contextmanager
def _hooked(cls: Any) -> Iterator[None]:
    """Let instances of ``cls`` install the journal's hooks when a checkpoint reaches them, before its tensors do.

    The class itself is lent the hook, as Lightning may build a subclass that the checkpoint names.
    """

    def on_load_checkpoint(self: Any, checkpoint: Any) -> None:
        install_hooks(self)
        inherited(self, checkpoint)

    with _CLASS_LOCK:
        own, inherited = vars(cls).get("on_load_checkpoint"), cls.on_load_checkpoint
        cls.on_load_checkpoint = on_load_checkpoint
        try:
            yield
        finally:
            if own is None:
                del cls.on_load_checkpoint
            else:
                cls.on_load_checkpoint = own
