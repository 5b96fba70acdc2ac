"""Pruning: scores, masks, schedules, and the callbacks that apply them while a model trains."""

from lightning_compress.pruning.callbacks import IterativePruning
from lightning_compress.pruning.fisher import FisherPruning
from lightning_compress.pruning.merging import NeuronMerging
from lightning_compress.pruning.post_training import OptimalBrainCompression
from lightning_compress.pruning.rules import Rule

__all__ = ["FisherPruning", "IterativePruning", "NeuronMerging", "OptimalBrainCompression", "Rule"]
