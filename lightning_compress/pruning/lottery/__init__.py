"""Lottery tickets: train, prune a share of what is left, rewind, and again."""

from lightning_compress.pruning.lottery.callbacks import LotteryTicket
from lightning_compress.pruning.lottery.rewinding import prune_remaining, remaining_share

__all__ = ["LotteryTicket", "prune_remaining", "remaining_share"]
