"""Random numbers that every process draws alike."""

from __future__ import annotations

import torch
from torch import distributed


def common_seed(device: torch.device) -> int:
    """Return torch's initial seed, in every process that of the first one.

    Args:
        device: Where processes can talk to each other.

    >>> state = torch.manual_seed(7)
    >>> common_seed(torch.device("cpu"))
    7
    """
    drawn = torch.tensor(torch.initial_seed() & (2**63 - 1), device=device)
    if distributed.is_available() and distributed.is_initialized():
        distributed.broadcast(drawn, 0)
    return int(drawn)
