"""Training code that knows nothing of this package adopts it by one callback, and is otherwise unchanged."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos import Transformer
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel, ManualOptimBoringModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_compress import IterativePruning, Schedule, compress, load_compressed, save_compressed

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
}


class Words(Dataset):
    """A language of 33 words in which the next one follows from the last two."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        words = [index % 33, (index * 7) % 33]
        while len(words) < 13:
            words.append((words[-1] + 2 * words[-2] + 1) % 33)
        return torch.tensor(words[:-1]), torch.tensor(words[1:])


class LanguageModel(LightningModule):
    """As in Lightning's own demo: its Transformer, with the target fed to the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Transformer(vocab_size=33, ninp=32, nhead=2, nhid=32, nlayers=2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, target = batch
        return F.nll_loss(self.model(inputs, target), target.view(-1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.filterwarnings("ignore:.*nested_tensor")
def test_lightnings_transformer(tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    model, callback = LanguageModel(), IterativePruning(0.8)
    trainer = Trainer(max_epochs=3, callbacks=[callback], default_root_dir=tmp_path, gradient_clip_val=0.25, **QUIET)
    trainer.fit(model, DataLoader(Words(), batch_size=8))
    assert callback.history[-1]["sparsity"] == pytest.approx(0.8, abs=1e-3)
    masked = [target.key for target in callback._targets]
    assert "model.transformer.encoder.layers.0.self_attn.in_proj_weight" in masked
    assert not any("embed" in key or "norm" in key for key in masked)
    save_compressed(model, tmp_path / "file.safetensors")
    bare = load_compressed(LanguageModel(), tmp_path / "file.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), bare.state_dict().values(), strict=True))


class Net(nn.Module):
    """The hidden layer that Lightning's one-layer demos lack."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(32, 24), nn.Linear(24, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.body(x)))


@pytest.mark.parametrize("demo", [BoringModel, ManualOptimBoringModel])
def test_lightnings_boring_models(demo: type[BoringModel], tmp_path: Path) -> None:
    model, callback = demo(), IterativePruning(Schedule(0.5, end="50%"))
    model.layer = Net()
    trainer = Trainer(max_epochs=2, limit_train_batches=6, limit_val_batches=2, callbacks=[callback],
                      default_root_dir=tmp_path, **QUIET)  # fmt: skip
    trainer.fit(model, datamodule=BoringDataModule())
    assert float((model.layer.body.weight == 0).float().mean()) == 0.5
    plain = demo.load_from_checkpoint
    model_file = trainer.checkpoint_callback.best_model_path
    assert isinstance(trainer.checkpoint_callback, ModelCheckpoint)
    with pytest.raises(RuntimeError, match="state_dict"):  # the class as it is has another layer, and says so
        plain(model_file)


def test_a_trained_module_without_a_trainer() -> None:
    model = compress(LanguageModel(), IterativePruning(0.9))
    assert isinstance(model, LanguageModel)
    kept = model.model.transformer.decoder.layers[1].linear1.weight
    assert 0.5 < float((kept == 0).float().mean()) < 1


SCRIPT = """
import torch
from lightning.pytorch import Trainer, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
{import_line}

class Gan(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.g = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 16))
        self.d = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 1))

    def training_step(self, batch, batch_idx):
        opt_g, opt_d = self.optimizers()
        real = batch[0]
        loss_d = nn.functional.softplus(-self.d(real)).mean()
        loss_d = loss_d + nn.functional.softplus(self.d(self.g(torch.randn(len(real), 8)).detach())).mean()
        opt_d.zero_grad(); self.manual_backward(loss_d); opt_d.step()
        loss_g = nn.functional.softplus(-self.d(self.g(torch.randn(len(real), 8)))).mean()
        opt_g.zero_grad(); self.manual_backward(loss_g); opt_g.step()

    def configure_optimizers(self):
        return torch.optim.Adam(self.g.parameters(), 1e-3), torch.optim.AdamW(self.d.parameters(), 1e-3)

torch.manual_seed(0)
data = DataLoader(TensorDataset(torch.randn(64, 16)), batch_size=8)
model = Gan()
quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
trainer = Trainer(max_epochs=3, **quiet{callback})
trainer.fit(model, data)
print("zeros", int((model.g[0].weight == 0).sum() + (model.d[0].weight == 0).sum() + (model.g[2].weight == 0).sum()))
"""


@pytest.mark.slow
def test_a_plain_script_with_manual_optimization_and_two_optimizers(tmp_path: Path) -> None:
    def run(**parts: str) -> str:
        script = tmp_path / "train.py"
        script.write_text(SCRIPT.format(**parts))
        done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1]

    assert run(import_line="", callback="") == "zeros 0"
    adopted = run(
        import_line="from lightning_compress import IterativePruning", callback=", callbacks=[IterativePruning(0.75)]"
    )
    assert adopted == f"zeros {round(0.75 * (8 * 64 + 64 * 16 + 16 * 64))}"


CLI_APP = """
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
import torch

class Model(BoringModel):
    def __init__(self, width: int = 16):
        super().__init__()
        self.layer = torch.nn.Sequential(torch.nn.Linear(32, width), torch.nn.Linear(width, 2))

if __name__ == "__main__":
    cli = LightningCLI(Model, BoringDataModule, seed_everything_default=0)
    print("zeros", int((cli.model.layer[0].weight == 0).sum()))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "zeros"),
    [
        ([], 0),
        (["--trainer.callbacks+=lightning_compress.IterativePruning", "--trainer.callbacks.schedule=0.75"], 384),
        (
            [
                "--trainer.callbacks+=lightning_compress.IterativePruning",
                "--trainer.callbacks.schedule=lightning_compress.Schedule",
                "--trainer.callbacks.schedule.final=0.5",
                "--trainer.callbacks.schedule.end=1",
            ],
            256,
        ),
    ],
    ids=["without", "number", "schedule"],
)
def test_a_lightning_cli_app(options: list[str], zeros: int, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(CLI_APP)
    base = [sys.executable, "app.py", "fit", "--trainer.max_epochs=2", "--trainer.limit_train_batches=5",
            "--trainer.limit_val_batches=1", "--trainer.logger=false", "--trainer.accelerator=cpu"]  # fmt: skip
    done = subprocess.run([*base, *options], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == f"zeros {zeros}"


@pytest.mark.slow
def test_a_lightning_cli_app_refuses_a_time_it_would_misread(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(CLI_APP)
    command = [sys.executable, "app.py", "fit", "--trainer.callbacks+=lightning_compress.IterativePruning",
               "--trainer.callbacks.schedule=lightning_compress.Schedule", "--trainer.callbacks.schedule.final=0.5",
               "--trainer.callbacks.schedule.end={step:5}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0
    assert "`end` must be an epoch" in done.stderr
