"""Dynamic sparse training: constant sparsity, with connections that move."""

from lightning_compress.pruning.dynamic.callbacks import DynamicSparseTraining
from lightning_compress.pruning.dynamic.regrowth import cosine_fraction, drop_and_grow

__all__ = ["DynamicSparseTraining", "cosine_fraction", "drop_and_grow"]
