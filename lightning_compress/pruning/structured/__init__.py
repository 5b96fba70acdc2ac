"""Removing whole channels: what is coupled, what matters, how much may go, and the slices that do it."""

from lightning_compress.core.latency import LatencyGoal
from lightning_compress.pruning.structured.batch_norm import recalibrate_batch_norm
from lightning_compress.pruning.structured.callbacks import StructuredPruning
from lightning_compress.pruning.structured.groups import ChannelGroup, Coupling, Touch
from lightning_compress.pruning.structured.importance import channel_importance
from lightning_compress.pruning.structured.limits import ChannelRule, Limits
from lightning_compress.pruning.structured.ranking import Ranking
from lightning_compress.pruning.structured.trace import coupled_groups
from lightning_compress.pruning.structured.zero_channels import ZeroChannelRemoval

__all__ = [
    "ChannelGroup",
    "ChannelRule",
    "Coupling",
    "LatencyGoal",
    "Limits",
    "Ranking",
    "StructuredPruning",
    "Touch",
    "ZeroChannelRemoval",
    "channel_importance",
    "coupled_groups",
    "recalibrate_batch_norm",
]
