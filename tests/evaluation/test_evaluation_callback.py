"""Metrics and the report callback on real fits: scikit-learn's digits, a small convolutional network."""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_compress.core.callback import CompressionCallback
from lightning_compress.core.checkpoint import load_compressed
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.journal import Edit
from lightning_compress.core.schedule import Schedule
from lightning_compress.core.select import Select
from lightning_compress.evaluation import metrics
from lightning_compress.evaluation.callbacks import CompressionReport
from lightning_compress.evaluation.report import build_report
from lightning_compress.evaluation.schema import validate_report


class Net(LightningModule):
    def __init__(self, width=8):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(36 * width, 10)
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, x):
        return self.fc(self.drop(torch.relu(self.norm(self.conv(x)))).flatten(1))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        scores = self(batch[0])
        self.accuracy(scores, batch[1])
        self.log("test/accuracy", self.accuracy)
        self.log("test_loss", nn.functional.cross_entropy(scores, batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 3e-3)


class Digits(LightningDataModule):
    def setup(self, stage):
        digits = load_digits()
        images, labels = torch.tensor(digits.images / 16).float()[:, None], torch.tensor(digits.target)
        self.train, self.test = (
            TensorDataset(images[:800], labels[:800]),
            TensorDataset(images[800:1200], labels[800:1200]),
        )

    def train_dataloader(self):
        return DataLoader(self.train, 100, shuffle=True)

    def test_dataloader(self):
        return DataLoader(self.test, 150)


class Zeroing(CompressionCallback):
    """Sets a share of each weight to zero; the simplest method there is."""

    supported = (nn.Linear,)

    def __init__(self):
        super().__init__(Schedule(final=0.5, end="50%"), Select())

    def update(self, layers, amount):
        for layer in layers.values():
            layer.weight[:, : int(amount * layer.weight.shape[1])] = 0
            self.amount = amount

    def enforce(self, layers):
        if getattr(self, "amount", 0):
            self.update(layers, self.amount)

    def metrics(self, layers):
        return {"sparsity": 0.5}


class Narrowing(Zeroing):
    """Also cuts the zeros away after fit."""

    def finalize(self, layers):
        kept = list(range(144, 288))
        yield Edit("slice", "fc", config={"tensors": {"weight": {"1": kept}}})


class PreparedEdit(Zeroing):
    def prepare(self, layers):
        if layers["fc"].weight.shape[0] == 10 and layers["fc"].weight.shape[1] == 288:
            yield Edit("slice", "conv", config={"tensors": {"weight": {"0": list(range(8))}}})


@pytest.fixture(autouse=True)
def _quick():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def trainer(folder, *callbacks, epochs=1, **settings):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    settings = {"enable_checkpointing": False, **settings}
    return Trainer(default_root_dir=folder, max_epochs=epochs, callbacks=list(callbacks), **quiet, **settings)


def reference_accuracy(model, data):
    images, labels = data.test.tensors
    with torch.no_grad():
        return (copy.deepcopy(model).eval()(images).argmax(1) == labels).float().mean().item()


def read(folder):
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    validate_report(report)
    return report


def test_metrics_are_those_of_the_test_step():
    model, data = Net(), Digits()
    data.setup("test")
    found = metrics.measure_metrics(model, datamodule=data)
    assert found.keys() == {"accuracy", "loss"}
    assert found["accuracy"] == pytest.approx(reference_accuracy(model, data))
    assert metrics.measure_metrics(model, DataLoader(data.test, 7))["accuracy"] == pytest.approx(found["accuracy"])


def test_metrics_leave_module_and_datamodule_alone(tmp_path):
    model, data = Net(), Digits()
    model.trainer, data.trainer = trainer(tmp_path), None
    attached = model.trainer
    model.drop.eval()
    model.accuracy.update(torch.eye(10), torch.arange(10))
    statistics, state = copy.deepcopy(model.norm.state_dict()), torch.random.get_rng_state()
    metrics.measure_metrics(model, datamodule=data)
    assert model.trainer is attached
    assert data.trainer is None
    assert model.training
    assert not model.drop.training
    assert float(model.accuracy.compute()) == 1.0
    assert all(torch.equal(value, model.norm.state_dict()[key]) for key, value in statistics.items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert list(tmp_path.iterdir()) == []


def test_reasons_for_no_metrics():
    class NoTest(LightningModule):
        pass

    assert "not a LightningModule" in metrics.why_untestable(nn.ReLU())
    assert "has no test_step" in metrics.why_untestable(NoTest())
    assert "no test data" in metrics.why_untestable(Net())
    assert metrics.why_untestable(Net(), [1]) == metrics.why_untestable(Net(), datamodule=Digits()) == ""
    assert metrics.measure_metrics(Net()) == {}


def test_names_lose_their_prefix_unless_they_collide():
    assert metrics._strip({"test/acc": 1.0, "test_loss": 2.0, "f1": 3.0}) == {"acc": 1.0, "loss": 2.0, "f1": 3.0}
    assert metrics._strip({"test/acc": 1.0, "acc": 2.0}) == {"test/acc": 1.0, "acc": 2.0}


def test_report_after_a_real_fit(tmp_path, capsys):
    model, data, callback = Net(), Digits(), CompressionReport(recipe="digits", seed=1)
    trainer(tmp_path, callback, Zeroing(), epochs=3).fit(model, datamodule=data)
    folder = tmp_path / "compression"
    assert sorted(path.name for path in folder.iterdir()) == [
        "compressed.safetensors",
        "report.html",
        "report.json",
        "report.md",
    ]
    report = read(folder)
    assert report == callback.report
    after = report["compressed"]
    assert report["baseline"]["metrics"] is None
    assert report["baseline"]["macs"] == after["macs"] == 36 * 72 + 2880
    assert after["metrics"]["accuracy"] == pytest.approx(reference_accuracy(model, data))
    assert after["artifact_bytes"] == (folder / "compressed.safetensors").stat().st_size
    assert report["layers"][-1]["name"] == "fc"
    assert report["layers"][-1]["nonzero"][1] <= 2890 - 1440
    assert report["history"][-1]["sparsity"] == 0.5
    assert (report["recipe"], report["seed"]) == ("digits", 1)
    assert any("no baseline was given" in note for note in report["notes"])
    assert "non-zero parameters" in capsys.readouterr().out
    bare = load_compressed(Net(), folder / "compressed.safetensors")
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in bare.state_dict().items())


def test_the_model_after_finalize_is_reported(tmp_path):
    report_callback, method = CompressionReport(latency=False, gzip=False), Narrowing()
    trainer(tmp_path, report_callback, method).fit(Net(), datamodule=Digits())
    report = read(tmp_path / "compression")
    assert report["edits"][0]["verb"] == "slice"
    assert {row["name"]: row["parameters"] for row in report["layers"]}["fc"] == [2890, 1450]
    assert report["compressed"]["latency_ms"] is None
    assert report["compressed"]["gzip_bytes"] is None


@pytest.mark.parametrize("kind", ["initial", "path", "module"])
def test_baselines(tmp_path, kind):
    model, data = Net(), Digits()
    trainer(tmp_path, epochs=2).fit(model, datamodule=data)
    dense, accuracy = copy.deepcopy(model), reference_accuracy(model, data)
    baseline = {"initial": "initial", "path": tmp_path / "dense.ckpt", "module": dense}[kind]
    torch.save({"state_dict": dense.state_dict()}, tmp_path / "dense.ckpt")
    callback = CompressionReport(baseline=baseline)
    trainer(tmp_path, callback, Zeroing()).fit(model, datamodule=data)
    report = read(tmp_path / "compression")
    assert report["baseline"]["metrics"]["accuracy"] == pytest.approx(accuracy)
    expected = reference_accuracy(model, data) - accuracy
    assert report["metric_deltas"]["accuracy"] == pytest.approx(expected, abs=1e-6)
    assert report["baseline"]["nonzero_parameters"] == sum(int((p != 0).sum()) for p in dense.parameters())
    assert report["baseline"]["latency_ms"] is not None
    assert (report["prediction_flip_rate"] is None) == (kind == "initial")


def test_baseline_figures_survive_a_resume(tmp_path):
    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "last.ckpt")

    first = CompressionReport(tmp_path / "a", baseline="initial", latency=False)
    trainer(tmp_path, first, Zeroing(), Stop(), epochs=1).fit(Net(), datamodule=Digits())
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["CompressionReport"]
    assert state["baseline"]["parameters"] == 2986
    torch.manual_seed(7)
    second = CompressionReport(tmp_path / "b", baseline="initial", latency=False)
    resumed = trainer(tmp_path, second, Zeroing(), epochs=2)
    resumed.fit(Net(), datamodule=Digits(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    keys = ("metrics", "nonzero_parameters", "gzip_bytes", "macs", "dense_bytes")
    assert [second.report["baseline"][key] for key in keys] == [first.report["baseline"][key] for key in keys]
    assert second.report["history"][0] == first.report["history"][0]


def test_the_order_of_callbacks_matters_only_for_edits_before_fit(tmp_path):
    last = CompressionReport(latency=False, gzip=False)
    trainer(tmp_path, Narrowing(), last).fit(Net(), datamodule=Digits())
    assert last.report["layers"][-1]["parameters"] == [2890, 1450]
    late = CompressionReport(latency=False, gzip=False)
    trainer(tmp_path, PreparedEdit(), late).fit(Net(), datamodule=Digits())
    assert late.report["baseline"]["parameters"] is None
    assert any("put CompressionReport first" in note for note in late.report["notes"])
    early = CompressionReport(latency=False, gzip=False)
    trainer(tmp_path, early, PreparedEdit()).fit(Net(), datamodule=Digits())
    assert early.report["baseline"]["parameters"] == 2986
    assert early.report["baseline"]["nonzero_parameters"] is None
    assert early.report["baseline"]["macs"] == 36 * 72 + 2880


def test_training_is_the_same_with_and_without_the_report(tmp_path):
    results = []
    for callbacks in ([], [CompressionReport(baseline="initial")]):
        torch.manual_seed(0)
        model = Net()
        trainer(tmp_path, *callbacks).fit(model, datamodule=Digits())
        results.append(model.state_dict())
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_a_failure_is_a_warning_and_the_rest_is_written(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("disk on fire")

    monkeypatch.setattr("lightning_compress.evaluation.callbacks.save_compressed", fail)
    callback = CompressionReport(latency=False, gzip=False)
    with pytest.warns(UserWarning, match="Saving the compressed model failed .*disk on fire"):
        trainer(tmp_path, callback, Zeroing()).fit(Net(), datamodule=Digits())
    report = read(tmp_path / "compression")
    assert report["compressed"]["artifact_bytes"] is report["compression_rate"] is None
    monkeypatch.setattr("lightning_compress.evaluation.callbacks.assemble_report", fail)
    with pytest.warns(UserWarning, match="The compression report failed"), pytest.warns(UserWarning, match="Saving"):
        trainer(tmp_path, CompressionReport(latency=False, gzip=False)).fit(Net(), datamodule=Digits())


def test_example_inputs_come_from_a_loader_and_bad_batches_are_a_note(tmp_path):
    class Odd(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch["x"], batch["y"]) if isinstance(batch, dict) else batch[1:], batch_idx)

    class AsDict(Digits):
        def train_dataloader(self):
            return DataLoader([{"x": image, "y": label} for image, label in self.train], 100)

    class Named(Digits):
        def train_dataloader(self):
            return DataLoader([("name", image, label) for image, label in self.train], 100)

    callback = CompressionReport(gzip=False)
    trainer(tmp_path, callback).fit(Odd(), datamodule=AsDict())
    assert callback.report["compressed"]["macs"] == 36 * 72 + 2880
    callback = CompressionReport(gzip=False)
    trainer(tmp_path, callback).fit(Odd(), datamodule=Named())
    assert callback.report["compressed"]["macs"] is None
    notes = callback.report["notes"]
    assert any("does not start with a tensor" in note and "pass `example_inputs`" in note for note in notes)
    given = CompressionReport(example_inputs=torch.zeros(1, 1, 8, 8), gzip=False)
    trainer(tmp_path, given).fit(Odd(), datamodule=Named())
    assert given.report["compressed"]["macs"] == 36 * 72 + 2880


def test_nothing_happens_in_a_trial_run_or_in_other_stages(tmp_path):
    callback = CompressionReport()
    trainer(tmp_path, callback, fast_dev_run=True).fit(Net(), datamodule=Digits())
    trainer(tmp_path, callback).test(Net(), datamodule=Digits(), verbose=False)
    assert callback.report is None
    assert not (tmp_path / "compression").exists()


def test_bad_baselines_are_refused_before_training(tmp_path):
    with pytest.raises(ConfigurationError, match="`baseline`: expected None, 'initial'"):
        CompressionReport(baseline=3)
    with pytest.raises(ConfigurationError, match=r"no checkpoint file '.*nowhere.ckpt'"):
        trainer(tmp_path, CompressionReport(baseline=str(tmp_path / "nowhere.ckpt"))).fit(Net(), datamodule=Digits())


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"junk", "it is damaged"),
        ({"state_dict": {"other": torch.zeros(1)}}, "do not fit Net"),
        ({"state_dict": nn.Linear(1, 1)}, "pickled code is never loaded"),
    ],
)
def test_a_baseline_file_that_does_not_fit_is_refused_before_training(tmp_path, content, match):
    if isinstance(content, bytes):
        (tmp_path / "bad.ckpt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "bad.ckpt")
    net, callback = Net(), CompressionReport(baseline=tmp_path / "bad.ckpt", latency=False, gzip=False)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ConfigurationError, match=match) as error:
        trainer(tmp_path, callback).fit(net, datamodule=Digits())
    assert "weights_only" not in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_pickles_and_deepcopies_inside_a_fit(tmp_path):
    copies = []

    class Copy(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            report = trainer.callbacks[0]
            copies.extend([copy.deepcopy(report), pickle.loads(pickle.dumps(report))])

    trainer(tmp_path, CompressionReport(latency=False), Copy()).fit(Net(), datamodule=Digits())
    assert [clone._before.parameters for clone in copies] == [2986, 2986]


def test_a_second_fit_on_another_model_measures_anew(tmp_path):
    callback = CompressionReport(latency=False, gzip=False)
    trainer(tmp_path, callback).fit(Net(), datamodule=Digits())
    trainer(tmp_path, callback).fit(Net(width=4), datamodule=Digits())
    assert callback.report["baseline"]["parameters"] == 36 + 4 + 8 + 1440 + 10


def test_build_report_on_lightning_modules_with_a_datamodule():
    data = Digits()
    report = build_report(Net(), Net(), datamodule=data, example_inputs=torch.zeros(1, 1, 8, 8), latency=False)
    validate_report(report)
    assert report["metric_deltas"].keys() == {"accuracy", "loss"}
    assert 0 < report["prediction_flip_rate"] <= 1


def test_loaders_without_a_datamodule(tmp_path):
    data = Digits()
    data.setup("fit")
    callback = CompressionReport(baseline="initial", test_dataloaders=[data.test_dataloader()], latency=False)
    model = Net()
    trainer(tmp_path, callback).fit(model, data.train_dataloader())
    report = read(tmp_path / "compression")
    assert report["metric_deltas"].keys() == {"accuracy", "loss"}
    assert report["compressed"]["metrics"]["accuracy"] == pytest.approx(reference_accuracy(model, data))
    assert report["compressed"]["macs"] == 36 * 72 + 2880


def test_the_seed_of_the_run_is_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "11")
    callback = CompressionReport(latency=False, gzip=False)
    trainer(tmp_path, callback).fit(Net(), datamodule=Digits())
    assert callback.report["seed"] == 11


DISTRIBUTED = """
import sys
sys.path.insert(0, {tests!r})
from torch import distributed
from test_evaluation_callback import CompressionReport, Digits, Net, Trainer, Zeroing

callback = CompressionReport({folder!r}, baseline="initial", latency=False)
trainer = Trainer(
    max_epochs=1, callbacks=[callback, Zeroing()], accelerator="cpu", devices=2, strategy="ddp", logger=False,
    enable_checkpointing=False, enable_progress_bar=False, default_root_dir={folder!r},
)
trainer.fit(Net(), datamodule=Digits())
assert (callback.report is not None) == (trainer.global_rank == 0)
distributed.barrier()  # a rank that leaves while another still talks to it makes that one abort
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_write_one_report(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(DISTRIBUTED.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "out")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = read(tmp_path / "out")
    assert report["metric_deltas"].keys() == {"accuracy", "loss"}
    assert report["compressed"]["nonzero_parameters"] < 0.6 * report["baseline"]["nonzero_parameters"]


def test_a_folder_that_cannot_be_one_is_refused_before_training(tmp_path):
    with pytest.raises(ConfigurationError, match="`dirpath`: expected the name of a folder, got 3"):
        CompressionReport(3)
    (tmp_path / "taken").write_text("")
    net = Net()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ConfigurationError, match=r"`dirpath`: .*taken' is a file"):
        trainer(tmp_path, CompressionReport(tmp_path / "taken")).fit(net, datamodule=Digits())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_a_baseline_that_does_not_load_is_not_called_missing(tmp_path):
    class Overwrite(Callback):
        def on_train_end(self, trainer, pl_module):
            torch.save({"other": torch.zeros(1)}, tmp_path / "other.ckpt")

    torch.save(Net().state_dict(), tmp_path / "other.ckpt")
    reporter = CompressionReport(tmp_path / "out", baseline=tmp_path / "other.ckpt", latency=False, gzip=False)
    with pytest.warns(UserWarning, match="do not fit Net"):
        trainer(tmp_path, reporter, Overwrite()).fit(Net(), datamodule=Digits())
    notes = " ".join(reporter.report["notes"])
    assert notes.count("the given baseline could not be loaded") == 2, "for the metrics and for the flip rate"
    assert "no baseline was given" not in notes


class Stop(Callback):
    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step >= 2


def test_a_target_that_was_missed_is_the_first_note(tmp_path):
    method = Zeroing()
    reporter = CompressionReport(tmp_path / "out", latency=False, gzip=False)
    with pytest.warns(UserWarning, match="training ended after"):
        trainer(tmp_path, reporter, method, Stop()).fit(Net(), datamodule=Digits())
    reached = method.history[-1]["amount"]
    assert 0 < reached < 0.5
    assert reporter.report["notes"][0].endswith(f"it reached {reached:.4g} of 0.5.")
