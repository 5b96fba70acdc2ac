"""Metrics of a model from its own ``test_step``."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torchmetrics import Metric

from lightning_compress.core.copies import structure_copy
from lightning_compress.core.isolation import device_of, same_randomness

_PREFIXES = ("test/", "test_", "test-", "test.")


def measure_metrics(
    module: nn.Module,
    dataloaders: Any = None,
    datamodule: LightningDataModule | None = None,
    precision: Any = None,
) -> dict[str, float]:
    """Return what a module's own ``test_step`` logs, measured by a Trainer of its own on one device.

    That Trainer writes nothing: no logger, checkpoint, progress bar or summary. A module that belongs to a Trainer
    already is tested as a copy, so it keeps its Trainer, modes and metric states; under a distributed run the metrics
    are those of this process alone.

    Args:
        module: A ``LightningModule`` with a ``test_step``.
        dataloaders: What ``Trainer.test`` accepts; or
        datamodule: a datamodule with a ``test_dataloader``; else the module's own ``test_dataloader`` is used.
        precision: What ``Trainer(precision=...)`` accepts.

    Returns:
        Values by name without a leading ``test/`` or ``test_``; empty if :func:`why_untestable` names a reason.
    """
    if why_untestable(module, dataloaders, datamodule) or not isinstance(module, LightningModule):
        return {}
    subject = structure_copy(module, torch.clone)
    if not isinstance(subject, LightningModule):  # what deepcopy returned is the module's own business
        return {}
    for part in subject.modules():
        if isinstance(part, Metric):
            part.distributed_available_fn = lambda: False
            part.reset()
    source = None if datamodule is None else copy.copy(datamodule)
    with _quiet(), same_randomness():
        trainer = _trainer_for(device_of(module), precision)
        results = trainer.test(subject, dataloaders=dataloaders, datamodule=source, verbose=False)
    return _strip({name: float(value) for result in results for name, value in result.items()})


def why_untestable(module: nn.Module, dataloaders: Any = None, datamodule: LightningDataModule | None = None) -> str:
    """Return why a module's test metrics cannot be measured, or an empty string if they can.

    >>> why_untestable(nn.Linear(1, 1))
    'the model is a Linear, not a LightningModule with a test_step'
    """
    if not isinstance(module, LightningModule):
        return f"the model is a {type(module).__name__}, not a LightningModule with a test_step"
    if not is_overridden("test_step", module):
        return f"{type(module).__name__} has no test_step"
    own = is_overridden("test_dataloader", module)
    theirs = datamodule is not None and is_overridden("test_dataloader", datamodule)
    if dataloaders is None and not own and not theirs:
        lacking = "there are no test data: neither the datamodule nor the module has a test_dataloader"
        return f"{lacking}; pass `test_dataloaders`"
    return ""


def find_test_batches(module: nn.Module, datamodule: LightningDataModule | None = None) -> Any:
    """Return the test loader of a datamodule, set up for it, or of the module; ``None`` if neither has one."""
    if datamodule is not None and is_overridden("test_dataloader", datamodule):
        source = copy.copy(datamodule)
        source.prepare_data()
        source.setup("test")
        return source.test_dataloader()
    if isinstance(module, LightningModule) and is_overridden("test_dataloader", module):
        return module.test_dataloader()
    return None


def _trainer_for(device: torch.device, precision: Any) -> Trainer:
    return Trainer(
        accelerator="gpu" if device.type == "cuda" else device.type,
        devices=[device.index or 0] if device.type == "cuda" else 1,
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        inference_mode=True,
    )


def _strip(values: dict[str, float]) -> dict[str, float]:
    """Drop the leading ``test/`` of each name, unless two names would become the same."""
    short = {
        name: next((name[len(p) :] for p in _PREFIXES if name.startswith(p) and name != p), name) for name in values
    }
    if len(set(short.values())) < len(short):
        return values
    return {short[name]: value for name, value in values.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
            warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
            yield
    finally:
        logger.setLevel(level)
