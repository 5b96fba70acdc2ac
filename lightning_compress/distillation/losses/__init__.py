"""What a student is told to imitate: losses on outputs and on features."""

from lightning_compress.distillation.losses.base import DistillationLoss

__all__ = ["DistillationLoss"]
