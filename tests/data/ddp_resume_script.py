"""Run by torchrun in two processes: train whole, resume from inside an epoch, and compare on every rank."""

import functools
import random
import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import distributed, nn

from lightning_compress.data import CropFlip, DigitsDataModule, ExactResume
from lightning_compress.models import ImageClassifier

warnings.simplefilter("ignore")


class Recorder(Callback):
    """Keeps this rank's labels of each step and one number of its own random stream."""

    def __init__(self):
        self.seen = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen[trainer.global_step] = (float(batch[0].sum()), batch[1].tolist(), float(torch.rand(())))


class RankSeed(Callback):
    """Gives every rank a random stream of its own."""

    def on_train_start(self, trainer, pl_module):
        torch.manual_seed(random.randrange(10**6) + trainer.global_rank)


def run(seed, folder, ckpt_path=None):
    seed_everything(seed, verbose=False)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 10))
    module, recorder = ImageClassifier(net, functools.partial(torch.optim.Adam, lr=1e-2)), Recorder()
    saving = ModelCheckpoint(dirpath=folder, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ExactResume(), RankSeed(), recorder, saving],
    )
    data = DigitsDataModule(batch_size=100, seed=seed, augment=CropFlip(padding=1))
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return [tensor.clone() for tensor in module.state_dict().values()], recorder.seen


def main(folder):
    torch.set_num_threads(1)
    whole, seen = run(1, folder / "whole")
    resumed, seen_again = run(2, folder / "again", folder / "whole" / "step=8.ckpt")
    if seen_again != {step: value for step, value in seen.items() if step > 8}:
        raise SystemExit("the steps after the resume differ")
    if not all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True)):
        raise SystemExit("the weights differ")
    everyone = [None, None]
    distributed.all_gather_object(everyone, seen)
    labels = [[label for step in range(1, 7) for label in rank[step][1]] for rank in everyone]
    if len(labels[0]) != 599 or len(labels[1]) != 599 or everyone[0][1][2] == everyone[1][1][2]:
        raise SystemExit("the ranks do not share the data, or not with random streams of their own")
    (folder / f"done-{distributed.get_rank()}").write_text("same")
    distributed.barrier()  # a rank that leaves while another still talks to it makes that one abort
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
