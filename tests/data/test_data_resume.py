"""A run interrupted inside an epoch and resumed from its checkpoint equals the uninterrupted run bit for bit."""

import functools
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_compress.data import CropFlip, DigitsDataModule, ExactResume
from lightning_compress.data.resume import random_states, set_random_states
from lightning_compress.models import ImageClassifier

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
STEPS_PER_EPOCH = 10  # 1,197 images in batches of 128


class Recorder(Callback):
    """Keeps what each step saw: a checksum of the batch and one number of every global generator."""

    def __init__(self):
        self.seen = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        draws = float(torch.rand(())), random.random(), float(np.random.rand())  # noqa: NPY002
        self.seen[trainer.global_step] = (float(batch[0].double().sum()), batch[1].tolist(), *draws)


class Stop(Callback):
    """Stops a run dead, the way a signal would, right after a step's checkpoint was written."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


def build(seed, folder, callbacks=(), exact=True, epochs=3, settings=None, **data):
    seed_everything(seed, verbose=False)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 10))
    module = ImageClassifier(net, functools.partial(torch.optim.Adam, lr=1e-2))
    recorder = Recorder()
    resume = [ExactResume()] if exact else []
    trainer = Trainer(
        **(settings or {}),
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            *resume,
            recorder,
            ModelCheckpoint(dirpath=folder, every_n_train_steps=7, save_top_k=-1, filename="{step}"),
            *callbacks,
        ],
    )
    return trainer, module, DigitsDataModule(batch_size=128, seed=seed, **data), recorder


def run(seed, folder, ckpt_path=None, **options):
    trainer, module, data, recorder = build(seed, folder, **options)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    state = trainer.optimizers[0].state_dict()["state"]
    moments = [entry[name] for entry in state.values() for name in ("step", "exp_avg", "exp_avg_sq")]
    return [*module.state_dict().values(), *moments], recorder.seen


def same(left, right):
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("step", [7, 14, 21], ids=["first-epoch", "second-epoch", "third-epoch"])
def test_resumed_run_equals_uninterrupted_run(tmp_path, step):
    whole, seen = run(1, tmp_path / "whole")
    resumed, seen_again = run(2, tmp_path / "again", ckpt_path=tmp_path / "whole" / f"step={step}.ckpt")
    assert seen_again == {key: value for key, value in seen.items() if key > step}
    assert same(whole, resumed)


@pytest.mark.parametrize(
    "data",
    [{"num_workers": 1}, {"augment": CropFlip(padding=1)}, {"num_workers": 1, "augment": CropFlip(padding=1)}],
    ids=["worker", "augment", "worker-augment"],
)
def test_resume_is_exact_with_workers_and_augmentation(tmp_path, data):
    whole, seen = run(1, tmp_path / "whole", epochs=2, **data)
    resumed, seen_again = run(2, tmp_path / "again", tmp_path / "whole" / "step=14.ckpt", epochs=2, **data)
    assert seen_again == {key: value for key, value in seen.items() if key > 14}
    assert same(whole, resumed)


@pytest.mark.parametrize(
    "settings",
    [{"val_check_interval": 7}, {"val_check_interval": 4}, {"accumulate_grad_batches": 2}, {"limit_train_batches": 8}],
    ids=["validate-at-the-checkpoint", "validate-between", "accumulate", "limit"],
)
def test_resume_is_exact_whatever_else_happens_in_an_epoch(tmp_path, settings):
    whole, _ = run(1, tmp_path / "whole", settings=settings, epochs=4)
    resumed, _ = run(2, tmp_path / "again", tmp_path / "whole" / "step=14.ckpt", settings=settings, epochs=4)
    assert same(whole, resumed)


def test_resume_from_the_last_batch_and_from_the_end_of_an_epoch(tmp_path):
    last_batch = ModelCheckpoint(
        dirpath=tmp_path / "last", every_n_train_steps=STEPS_PER_EPOCH, save_top_k=-1, filename="{step}"
    )
    epoch_end = ModelCheckpoint(dirpath=tmp_path / "epoch", save_top_k=-1, filename="{epoch}")
    whole, _ = run(1, tmp_path / "whole", callbacks=[last_batch, epoch_end])
    for path in (tmp_path / "last" / "step=10.ckpt", tmp_path / "epoch" / "epoch=0.ckpt"):
        resumed, seen = run(2, tmp_path / f"again-{path.stem}", path)
        assert sorted(seen) == list(range(11, 31))
        assert same(whole, resumed)


def test_a_run_stopped_dead_continues_from_its_last_checkpoint(tmp_path):
    whole, _ = run(1, tmp_path / "whole")
    trainer, module, data, _ = build(1, tmp_path / "killed", callbacks=[Stop(17)])
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer.fit(module, datamodule=data)
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["step=14.ckpt", "step=7.ckpt"]
    resumed, _ = run(5, tmp_path / "again", tmp_path / "killed" / "step=14.ckpt")
    assert same(whole, resumed)


def test_without_the_callback_the_resumed_run_differs(tmp_path):
    whole, _ = run(1, tmp_path / "whole", exact=False)
    resumed, _ = run(2, tmp_path / "again", tmp_path / "whole" / "step=14.ckpt", exact=False)
    assert not same(whole, resumed)


def test_interrupted_twice(tmp_path):
    whole, _ = run(1, tmp_path / "whole")
    trainer, module, data, _ = build(2, tmp_path / "second", callbacks=[Stop(18)])
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer.fit(module, datamodule=data, ckpt_path=tmp_path / "whole" / "step=7.ckpt", weights_only=True)
    resumed, _ = run(3, tmp_path / "third", tmp_path / "second" / "step=14.ckpt")
    assert same(whole, resumed)


def test_random_states_round_trip_through_a_safe_file(tmp_path):
    random.gauss(0, 1)
    np.random.standard_normal()  # noqa: NPY002
    torch.save(random_states(), tmp_path / "states.pt")
    before = random.gauss(0, 1), random.random(), np.random.standard_normal(3).tolist(), torch.rand(3).tolist()  # noqa: NPY002
    set_random_states(torch.load(tmp_path / "states.pt", weights_only=True))
    after = random.gauss(0, 1), random.random(), np.random.standard_normal(3).tolist(), torch.rand(3).tolist()  # noqa: NPY002
    assert before == after


def test_states_may_be_rows_of_a_larger_tensor():
    first = {name: state.clone() for name, state in random_states().items()}
    torch.rand(3)
    stacked = {name: torch.stack([state, first[name]]) for name, state in random_states().items()}
    expected = torch.rand(3)
    set_random_states({name: rows[1] for name, rows in stacked.items()})
    torch.rand(3)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("forgotten", [False, True])
def test_a_state_loaded_for_testing_does_not_leak_into_a_later_fit(tmp_path, forgotten):
    trainer, module, _, _ = build(2, tmp_path)
    callback = ExactResume()
    torch.manual_seed(10)
    saved = torch.get_rng_state()
    callback.load_state_dict(callback.state_dict())
    if forgotten:
        callback.setup(trainer, module, "fit")
    torch.manual_seed(11)
    present = torch.get_rng_state()
    callback.on_train_batch_start(trainer, module, None, 0)
    assert torch.equal(torch.get_rng_state(), present if forgotten else saved)


def test_checkpoint_is_plain_and_holds_the_position(tmp_path: Path):
    run(4, tmp_path, epochs=2)
    checkpoint = torch.load(tmp_path / "step=14.ckpt", weights_only=True)
    assert checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] == [
        {"epoch": 1, "batch": 4, "samples": 1197, "batch_size": 128, "processes": 1, "seed": 4}
    ]
    assert checkpoint["hyper_parameters"] == {"interval": "epoch", "num_classes": 10, "label_smoothing": 0.0}


def test_foreign_loaders_still_train_with_the_callback(tmp_path):
    trainer, module, data, _ = build(1, tmp_path, epochs=1)
    samples = data.train_dataloader().dataset
    loader = DataLoader(samples, batch_size=128, shuffle=True, collate_fn=lambda batch: batch)
    trainer.fit(module, loader, data.val_dataloader())
    assert trainer.global_step == STEPS_PER_EPOCH
