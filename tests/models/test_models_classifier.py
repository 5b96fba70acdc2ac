import functools

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.data import DigitsDataModule, FakeDataModule
from lightning_compress.models import ImageClassifier


def tiny(classes=3, inputs=16):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, classes))


def trainer(tmp_path, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", default_root_dir=tmp_path, **quiet, **options)


def test_metrics_equal_the_plain_computation(tmp_path):
    data = DigitsDataModule(batch_size=77)
    module = ImageClassifier(tiny(10, 64))
    (logged,) = trainer(tmp_path).test(module, datamodule=data, verbose=False)
    images, labels = (torch.cat(parts) for parts in zip(*data.test_dataloader(), strict=True))
    logits = module(images)
    assert logged["test/accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert logged["test/loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


def test_fit_logs_and_saves_a_plain_checkpoint(tmp_path):
    data = FakeDataModule(size=16, shape=(1, 4, 4), num_classes=3, batch_size=8)
    module = ImageClassifier(
        tiny(), functools.partial(torch.optim.SGD, lr=0.5), functools.partial(StepLR, step_size=1), num_classes=3
    )
    run = trainer(tmp_path, max_epochs=2)
    run.fit(module, datamodule=data)
    assert {"train/loss", "val/loss", "val/accuracy"} <= set(run.callback_metrics)
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.005)
    run.save_checkpoint(tmp_path / "model.ckpt")
    checkpoint = torch.load(tmp_path / "model.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == {"net.1.weight", "net.1.bias"}
    again = ImageClassifier.load_from_checkpoint(tmp_path / "model.ckpt", net=tiny(), weights_only=True)
    assert again.hparams.num_classes == 3
    assert torch.equal(again.net[1].weight, module.net[1].weight)


def test_scheduler_can_advance_every_step_and_plateaus_watch_the_validation_loss(tmp_path):
    data = FakeDataModule(size=16, shape=(1, 4, 4), num_classes=3, batch_size=8)
    optimizer = functools.partial(torch.optim.SGD, lr=1.0)
    module = ImageClassifier(tiny(), optimizer, functools.partial(StepLR, step_size=1), interval="step", num_classes=3)
    run = trainer(tmp_path, max_steps=2)
    run.fit(module, datamodule=data)
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01)
    settings = ImageClassifier(tiny(), optimizer, ReduceLROnPlateau).configure_optimizers()
    assert settings["lr_scheduler"]["monitor"] == "val/loss"


def test_frozen_parameters_stay_out_of_the_optimizer():
    module = ImageClassifier(tiny())
    module.net[1].bias.requires_grad_(False)
    (group,) = module.configure_optimizers().param_groups
    assert [parameter.shape for parameter in group["params"]] == [(3, 16)]


def test_label_smoothing_applies_while_training_only(monkeypatch):
    module = ImageClassifier(tiny(), label_smoothing=0.2, num_classes=3)
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    images, labels = torch.randn(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])
    log_p = module(images).log_softmax(1)
    target = 0.8 * nn.functional.one_hot(labels, 3) + 0.2 / 3
    assert module.training_step((images, labels), 0).item() == pytest.approx(-(target * log_p).sum(1).mean().item())


def test_wrong_arguments_are_named():
    for name, value in (
        ("optimizer", {"lr": 0.1}),
        ("scheduler", "cosine"),
        ("interval", "epochs"),
        ("num_classes", 1),
        ("label_smoothing", 1.0),
    ):
        with pytest.raises(ConfigurationError, match=f"`{name}`"):
            ImageClassifier(tiny(), **{name: value})
