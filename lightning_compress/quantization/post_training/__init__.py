"""Quantization of trained models from calibration batches, without training."""

from lightning_compress.quantization.post_training.bit_goal import BitGoal
from lightning_compress.quantization.post_training.callbacks import PostTrainingQuantization
from lightning_compress.quantization.post_training.steps import PostTrainingSteps

__all__ = ["BitGoal", "PostTrainingQuantization", "PostTrainingSteps"]
