"""One rank of a two-process run whose ranks read different calibration batches; writes what it holds at the end.

Usage: ``torchrun --nproc_per_node=2 ddp_calibration_script.py OUTPUT_FOLDER``
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import distributed, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import FisherPruning, OptimalBrainCompression
from lightning_compress.core.callback import CompressionCallback
from lightning_compress.models import ImageClassifier


def batches(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return one batch that depends on the seed."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(24, 1, 4, 4, generator=generator)
    return [(images, torch.randint(0, 3, (24,), generator=generator))]


def methods(seed: int) -> dict[str, CompressionCallback]:
    """Return the methods that look at batches."""
    return {
        "layer": OptimalBrainCompression(0.5, batches(seed)),
        "global": OptimalBrainCompression(0.5, batches(seed), scope="global"),
        "2:4": OptimalBrainCompression(0.5, batches(seed), granularity="2:4"),
        "fisher": FisherPruning(0.5, batches(seed), block=8, damping=1e-3),
    }


def main(output: Path) -> None:
    """Fit with each method, and save the compressed copies by rank."""
    rank = int(os.environ["RANK"])
    final = {}
    for name, method in methods(seed=rank).items():
        seed_everything(0, verbose=False)
        net = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
        trainer = Trainer(
            max_epochs=1, callbacks=[method], logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, accelerator="cpu", devices=2, strategy="ddp",
        )  # fmt: skip
        (data,) = batches(seed=7)
        trainer.fit(ImageClassifier(net, num_classes=3), DataLoader(TensorDataset(*data), batch_size=6))
        assert method.compressed is not None
        final[name] = method.compressed.state_dict()
    torch.save(final, output / f"rank{rank}.pt")
    distributed.barrier()  # a rank that leaves while another still talks to it makes that one abort
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
