"""Every file in conf/model and conf/data composes and instantiates."""

from pathlib import Path

import hydra
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from lightning_compress.data import ImageDataModule
from lightning_compress.models import ImageClassifier

CONF = Path(__file__).resolve().parents[2] / "conf"
MODELS = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
DATA = sorted(path.stem for path in (CONF / "data").glob("*.yaml"))
INPUTS = {"digits_cnn": (1, 8, 8)} | dict.fromkeys(("lenet300", "lenet5", "perceptron", "staged_cnn"), (1, 28, 28))


def compose(*overrides: str) -> DictConfig:
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose(overrides=["+seed=3", *overrides])


def test_no_config_is_forgotten():
    assert set(MODELS) == {"digits_cnn", "lenet300", "lenet5", "resnet20", "resnet56", "torchvision", "custom"} | {
        "caffenet",
        "resnet20_cifar10",
        "resnet56_cifar10",
        "perceptron",
        "staged_cnn",
        "vgg16",
    }
    shifted = {"digits_shifted", "mnist_shifted", "cifar10_few", "fake_few"}
    assert set(DATA) == {"cifar10_jpeg", "digits", "fake", "image_folder", "mnist", "custom"} | shifted


def test_custom_configs_take_a_target():
    config = compose(
        "+model=custom",
        "model.module._target_=lightning_compress.models.ImageClassifier",
        "+model.module.net={_target_: torch.nn.Identity}",
        "+data=custom",
        "data._target_=lightning_compress.data.DigitsDataModule",
        "+data.batch_size=5",
    )
    assert isinstance(hydra.utils.instantiate(config.model.module), ImageClassifier)
    assert hydra.utils.instantiate(config.data).batch_size == 5


@pytest.mark.parametrize("name", [name for name in MODELS if name != "custom"])
def test_model_config_builds_a_classifier(name):
    config = compose(f"+model={name}", "model.module.num_classes=7")
    module = hydra.utils.instantiate(config.model.module)
    assert isinstance(module, ImageClassifier)
    assert config.model.checkpoint is None
    assert module.eval()(torch.zeros(2, *INPUTS.get(name, (3, 32, 32)))).shape == (2, 7)
    optimizer = module.configure_optimizers()
    assert optimizer.defaults["lr"] == config.model.module.optimizer.lr


@pytest.mark.parametrize("name", [name for name in DATA if name != "custom"])
def test_data_config_builds_a_data_module(name):
    words = {"fake": "+model=digits_cnn", "fake_few": "+model=digits_cnn", "image_folder": "data.root=somewhere"}
    extra = [words[name]] if name in words else []
    data = hydra.utils.instantiate(compose(f"+data={name}", *extra).data)
    assert isinstance(data, ImageDataModule)
    assert data.seed == 3


def test_a_scheduler_and_an_augmentation_can_be_chosen_from_the_command_line():
    config = compose(
        "+model=lenet300",
        "model.module.scheduler={_target_: torch.optim.lr_scheduler.StepLR, _partial_: true, step_size: 2}",
        "+data=digits",
        "data.augment={_target_: lightning_compress.data.CropFlip, padding: 1, flip: false}",
    )
    assert hydra.utils.instantiate(config.data).augment.padding == 1
    settings = hydra.utils.instantiate(config.model.module).configure_optimizers()
    assert settings["lr_scheduler"]["scheduler"].step_size == 2
