"""One rank of a two-process run of three rounds of a lottery ticket; writes what it holds at the end.

Usage: ``torchrun --nproc_per_node=2 lottery_ddp_worker.py OUTPUT_FOLDER``
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import distributed

sys.path.insert(0, str(Path(__file__).parent.parent / "contract"))
from contract_rows import Task

from lightning_compress import LotteryTicket


def rounds(reset: str) -> dict[str, object]:
    """Return the tensors and masks of this rank after three rounds."""
    seed_everything(0, verbose=False)
    model, ticket = Task("Mixed"), LotteryTicket(0.4, rewind={"step": 2} if reset == "rewind" else 0, reset=reset)
    for _ in range(3):
        trainer = Trainer(
            max_epochs=1, callbacks=[ticket], logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, accelerator="cpu", devices=2, strategy="ddp_find_unused_parameters_true",
        )  # fmt: skip
        torch.manual_seed(distributed.get_rank() if distributed.is_initialized() else 0)
        trainer.fit(model)
    return {"state": model.state_dict(), "values": ticket.values(), "history": ticket.history}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    results = {reset: rounds(reset) for reset in ("rewind", "random", "none")}
    torch.save(results, Path(sys.argv[1]) / f"rank{distributed.get_rank()}.pt")
    distributed.barrier()  # a rank that leaves while another still talks to it makes that one abort
    distributed.destroy_process_group()
