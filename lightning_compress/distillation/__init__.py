"""Distillation: a small student learns from a large teacher."""

from lightning_compress.distillation.losses import DistillationLoss

__all__ = ["DistillationLoss"]
