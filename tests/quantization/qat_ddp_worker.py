"""One rank of a two-process run of quantization-aware training on data of its own; writes what it holds at the end.

Usage: ``torchrun --nproc_per_node=2 qat_ddp_worker.py OUTPUT_FOLDER``
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import distributed
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parent.parent / "contract"))
from contract_rows import Task, dataset

from lightning_compress import QuantizationAwareTraining

SPECS = {
    "minmax": (8, {"range": "minmax"}),
    "percentile": (8, {"range": "percentile"}),
    "learned": ({"bits": 4, "range": "lsq"}, {"bits": 4, "range": "lsq+"}),
}


def train(name: str, rank: int) -> dict[str, object]:
    """Return the tensors of this rank, and the extremes of the images that it alone has seen."""
    seed_everything(0, verbose=False)
    images, labels = dataset().tensors
    mine = images * (rank + 1) - rank  # in [0, 1] for the first, in [-1, 1] for the second
    module = Task("Mixed")
    callback = QuantizationAwareTraining(*SPECS[name], start={"step": 2}, freeze={"batch_norm": {"step": 10}})
    trainer = Trainer(
        max_epochs=2, callbacks=[callback], logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, accelerator="cpu", devices=2, strategy="ddp", use_distributed_sampler=False,
        limit_val_batches=0, gradient_clip_val=1.0,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(mine, labels), batch_size=6))
    return {"state": module.state_dict(), "extremes": torch.stack([mine.min(), mine.max()])}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    own = int(os.environ["RANK"])
    torch.save({name: train(name, own) for name in SPECS}, Path(sys.argv[1]) / f"rank{distributed.get_rank()}.pt")
    distributed.barrier()  # a rank that leaves while another still talks to it makes that one abort
    distributed.destroy_process_group()
