"""The contract that every method passes; one row a method, one test a promise."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_rows import ROWS, Row, Task, dataset
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

import lightning_compress as lc
from lightning_compress import CompressionCallback, ExactResume, Journal, SelectionError, journal_of
from lightning_compress.core.checks import check_times
from lightning_compress.core.schedule import Horizon, Schedule

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training"),
]

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
}

rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def fit(
    row: Row, folder: Path, seed: int = 0, ckpt_path: str | None = None, extra: list[Callback] | None = None, **kw: Any
):
    """Train the row's model for two epochs of eight steps, with a checkpoint every three steps."""
    seed_everything(seed, verbose=False)
    model, callback = row.wrap(Task(row.net)), row.build()
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    trainer = Trainer(
        max_epochs=kw.pop("max_epochs", 2),
        callbacks=[ExactResume(), *row.beside(), callback, saver, *(extra or [])],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **{"accelerator": "cpu", **kw},
    )
    trainer.fit(model, ckpt_path=ckpt_path)
    return model, callback, trainer


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(dataset().tensors[0])


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Each row trained once."""
    return {row.name: (folder := tmp_path_factory.mktemp(row.name), *fit(row, folder)) for row in ROWS}


@rows
def test_trains_and_edits_what_it_says(row: Row, trained: dict[str, Any]) -> None:
    _, model, callback, _ = trained[row.name]
    assert [(edit.verb, edit.path) for edit in journal_of(model)] == list(row.prepared)
    final = callback.compressed if row.finalized else model
    assert [(edit.verb, edit.path) for edit in journal_of(final)] == [*row.prepared, *row.finalized]
    assert callback.at_target
    assert callback.history[-1]["amount"] == callback.schedule.final
    assert torch.isfinite(outputs(final)).all()


@rows
@pytest.mark.parametrize("step", [3, 9, 12])
def test_resume_equals_uninterrupted(row: Row, step: int, trained: dict[str, Any], tmp_path: Path) -> None:
    folder, model, callback, trainer = trained[row.name]
    resumed, again, second = fit(row, tmp_path, seed=1234, ckpt_path=str(folder / f"step={step}.ckpt"))
    assert same(model.state_dict(), resumed.state_dict())
    assert callback.history == again.history
    assert callback.updates == again.updates == 16
    for a, b in zip(trainer.optimizers[0].state.values(), second.optimizers[0].state.values(), strict=True):
        assert same(a, b)
    last = [torch.load(path / "step=15.ckpt", weights_only=True) for path in (folder, tmp_path)]
    values = [checkpoint["callbacks"][callback.state_key]["values"] for checkpoint in last]
    assert same(*values)


@rows
def test_second_fit_works(row: Row, trained: dict[str, Any], tmp_path: Path) -> None:
    _, model, callback = copy.deepcopy(trained[row.name][:3])
    journal = journal_of(model)
    trainer = Trainer(max_epochs=1, callbacks=[callback], **QUIET)
    trainer.fit(model)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model)
    assert journal_of(model) == journal
    assert callback.at_target


@rows
def test_reloads_on_the_bare_architecture(row: Row, trained: dict[str, Any], tmp_path: Path) -> None:
    folder, model, callback, _ = trained[row.name]
    final = callback.compressed if row.finalized else model
    lc.save_compressed(final, tmp_path / "file.safetensors")
    bare = lc.load_compressed(Task(row.net), tmp_path / "file.safetensors")
    assert torch.equal(outputs(bare), outputs(final))
    assert same(bare.state_dict(), final.state_dict())
    from_checkpoint = lc.load_from_checkpoint(Task, folder / "step=15.ckpt")
    assert type(from_checkpoint) is Task
    assert journal_of(from_checkpoint) == journal_of(model)
    if not row.prepared:
        assert same(Task.load_from_checkpoint(folder / "step=15.ckpt").state_dict(), from_checkpoint.state_dict())


@rows
def test_checkpoint_works_for_test_and_loads_weights_only(row: Row, trained: dict[str, Any]) -> None:
    folder, model, callback, _ = trained[row.name]
    trainer = Trainer(callbacks=[row.build()], **QUIET)
    fresh = Task(row.net)
    trainer.test(fresh, ckpt_path=folder / "step=15.ckpt", verbose=False)
    assert journal_of(fresh) == journal_of(model)
    assert callback.state_key in torch.load(folder / "step=15.ckpt", weights_only=True)["callbacks"]


@rows
def test_journal_round_trips_through_json(row: Row, trained: dict[str, Any]) -> None:
    _, model, callback, _ = trained[row.name]
    for module in filter(None, (model, callback.compressed)):
        assert Journal.from_json(journal_of(module).to_json()) == journal_of(module)


class Watch(Callback):
    """Records whether a Parameter object was exchanged while training, and calls ``setup`` twice."""

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.before = dict(pl_module.named_parameters())
        self.journal = journal_of(pl_module)
        for callback in trainer.callbacks:
            if isinstance(callback, CompressionCallback):
                callback.setup(trainer, pl_module, "fit")
        assert journal_of(pl_module) == self.journal

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        now = dict(pl_module.named_parameters())
        assert now.keys() == self.before.keys()
        assert all(now[name] is self.before[name] for name in now)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.seen = set(trainer.callback_metrics)


@rows
def test_setup_is_idempotent_parameters_stay_and_metrics_are_logged(row: Row, tmp_path: Path) -> None:
    watch = Watch()
    _, callback, _ = fit(row, tmp_path, extra=[watch])
    assert {row.metric, "compress/at_target"} <= watch.seen
    assert "select" in callback.plan_text or row.net == "MLP"


@rows
def test_empty_selection_is_an_error_before_anything_changes(row: Row, tmp_path: Path) -> None:
    if row.nothing is None:
        callback = row.build()
        callback.select = lc.Select(include=("net.lairs",))
    else:
        callback = row.nothing()
    model = Task(row.net)
    before = copy.deepcopy(model.state_dict())
    trainer = Trainer(max_epochs=1, callbacks=[callback], **QUIET)
    with pytest.raises(SelectionError, match=r"net\.layers|has no layer"):
        trainer.fit(model)
    assert same(before, model.state_dict())


class CopyInside(Callback):
    """Pickles and deep-copies callback and module in the middle of a fit."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 11:
            for callback in trainer.callbacks:
                if isinstance(callback, CompressionCallback):
                    clone = pickle.loads(pickle.dumps(callback))
                    assert clone.history == callback.history
                    assert copy.deepcopy(callback).updates == callback.updates
            module = copy.deepcopy(pl_module)
            assert same(module.state_dict(), pl_module.state_dict())
            assert journal_of(module) == journal_of(pl_module)


@rows
def test_pickles_and_deepcopies_inside_fit(row: Row, tmp_path: Path, trained: dict[str, Any]) -> None:
    model, _, _ = fit(row, tmp_path, extra=[CopyInside()])
    assert same(model.state_dict(), trained[row.name][1].state_dict())


def complaints(schedule: Schedule) -> list[str]:
    """Return what is said of a schedule where runs have no end, no length, or a single step."""
    trainer, found = Trainer(max_epochs=-1, **QUIET), []
    for horizon in (None, Horizon(None, None), Horizon(None, 9), Horizon(1, 1)):
        try:
            check_times(schedule, trainer) if horizon is None else schedule.resolve(horizon)
        except lc.ConfigurationError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("row", [row for row in ROWS if hasattr(lc, type(row.build()).__name__)], ids=lambda r: r.name)
def test_times_in_errors_are_arguments_that_the_callback_has(row: Row) -> None:
    given = inspect.signature(type(row.build())).parameters
    for message in [] if "schedule" in given else complaints(row.build().schedule):
        names = {name.split(".")[0] for name in re.findall(r"`([a-z_.]+)`", message.split(" is ")[0])}
        assert names, message
        assert names <= given.keys(), message
        assert "shape=" not in message


def test_every_public_callback_has_a_row() -> None:
    public = {
        value
        for value in vars(lc).values()
        if isinstance(value, type) and issubclass(value, CompressionCallback) and value is not CompressionCallback
    }
    assert public <= {type(row.build()) for row in ROWS}
