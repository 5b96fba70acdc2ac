"""A stage's own optimizer in place of the module's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import nn

from lightning_compress.run.build import build
from lightning_compress.run.settings import Stage


@contextmanager
def own_optimizer(module: nn.Module, stage: Stage) -> Iterator[None]:
    """Give the module the stage's optimizer instead of its own for as long as the stage lasts."""
    if stage.optimizer is None:
        yield
        return
    make = build(f"stages.{stage.key}.optimizer", {**stage.optimizer, "_partial_": True})
    plan = dict(stage.scheduler or {})
    interval = plan.pop("interval", "epoch")
    make_scheduler = build(f"stages.{stage.key}.scheduler", {**plan, "_partial_": True}) if plan else None

    def configure_optimizers(self: nn.Module) -> Any:
        optimizer = make([parameter for parameter in self.parameters() if parameter.requires_grad])
        if make_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make_scheduler(optimizer), "interval": interval}}

    # on the instance, as LightningCLI does it
    vars(module)["configure_optimizers"] = MethodType(configure_optimizers, module)
    try:
        yield
    finally:
        del vars(module)["configure_optimizers"]
