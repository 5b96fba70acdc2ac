"""One rank of a two-process run: trains every row of the contract table and writes what it holds at the end.

Usage: ``torchrun --nproc_per_node=2 ddp_worker.py OUTPUT_FOLDER``
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import distributed

sys.path.insert(0, str(Path(__file__).parent))
from contract_rows import ROWS, Row, Task

from lightning_compress import ExactResume


def train(row: Row, folder: Path, seed: int, ckpt_path: str | None = None) -> dict[str, object]:
    """Return the final tensors, masks and history of this rank."""
    seed_everything(seed, verbose=False)
    model, callback = row.wrap(Task(row.net)), row.build()
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    trainer = Trainer(
        max_epochs=2, callbacks=[ExactResume(), *row.beside(), callback, saver], logger=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", devices=2,
        strategy="ddp_find_unused_parameters_true",
    )  # fmt: skip
    torch.manual_seed(seed + distributed.get_rank() if distributed.is_initialized() else seed)
    trainer.fit(model, ckpt_path=ckpt_path)
    final = callback.compressed or model
    teachers = [other for other in (model, *trainer.callbacks) if hasattr(other, "distiller")]
    learnt = {
        f"{name}.{key}": value
        for teacher in teachers
        for name, part in teacher.distiller.state_dict()["learnt"].items()
        for key, value in part.items()
    }
    return {
        "state": {**final.state_dict(), **learnt},
        "history": callback.history,
        "callback": callback.state_dict()["values"],
    }


def main(output: Path) -> None:
    """Train, then resume from a checkpoint inside the first epoch with other random states."""
    warnings.simplefilter("ignore")
    results = {}
    for row in ROWS:
        whole = train(row, output / row.name, seed=0)
        resumed = train(row, output / f"{row.name}-resumed", 99, str(output / row.name / "step=3.ckpt"))
        results[row.name] = {"whole": whole, "resumed": resumed}
    torch.save(results, output / f"rank{distributed.get_rank()}.pt")
    distributed.barrier()  # a rank that leaves while another still talks to it makes that one abort
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
