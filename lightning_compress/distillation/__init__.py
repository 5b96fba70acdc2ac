"""Distillation: a small student learns from a large teacher."""

from lightning_compress.distillation.losses import DistillationLoss
from lightning_compress.distillation.teacher import Answer, Question, Teacher

__all__ = ["Answer", "DistillationLoss", "Question", "Teacher"]
