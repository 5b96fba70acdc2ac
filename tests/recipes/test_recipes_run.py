"""Every recipe composes, runs end to end on a few batches, and says in its header what it reached."""

from __future__ import annotations

import io
import itertools
import json
import shlex
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig
from PIL import Image
from safetensors.torch import save_file

from lightning_compress.cli import main
from lightning_compress.models import resnet20, resnet56
from lightning_compress.run.shipped import config_folder, header, recipe_files, register_recipes

RECIPES = recipe_files()
FACTS = ("Command:", "Seed:", "Machine:", "Baseline:", "Result:", "Wall time:")
RATES = {"digits_2to4": 1.7, "digits_optimal_brain": 4, "mnist_lenet300_merge": 1.9, "resnet20_structured": 1.6} | {
    "distill_resnet20": 2.9,
    "digits_ptq": 5,
    "qat_int8_digits": 3.5,
    "mnist_lottery": 3.5,
    "mnist_ssl_lenet5": 2,
    "deep_compression_lenet300": 40,
    "deep_compression_lenet5": 40,
    "digits_deep_compression": 30,
    "caffenet_tai": 4.5,
    "digits_low_rank": 3,
    "mnist_lenet5_low_rank": 4,
    "qat_resnet20": 5,
    "resnet20_low_rank": 1.6,
    "resnet56_structured": 1.8,
    "vgg16_tai": 2.5,
}
"""How many times smaller the file must get at least; structured recipes 2, all others 6 times."""
SMALLER = {"digits_optimal_brain": ["+model.module.net.width=16"], "resnet20_structured": ["data.batch_size=8"]} | {
    "qat_resnet20": ["data.batch_size=8"],
    "resnet20_low_rank": ["data.batch_size=8"],
    "resnet56_structured": ["data.batch_size=8"],
    "distill_resnet20": ["data.per_class=1", "data.data.batch_size=4"],
    "mnist_ssl_lenet5": ["callbacks.group_lasso.threshold=0.99"],
    "prune_distill": ["data.batch_size=8", "callbacks.prune.schedule.every=2%"],
}
FEW = [f"trainer.limit_{part}_batches=2" for part in ("train", "val", "test")]


def test_no_recipe_is_forgotten() -> None:
    assert set(RECIPES) == {
        "binary_mnist",
        "caffenet_tai",
        "digits_low_rank",
        "mnist_lenet5_low_rank",
        "resnet20_low_rank",
        "vgg16_tai",
        "deep_compression_lenet300",
        "deep_compression_lenet5",
        "digits_2to4",
        "digits_ptq",
        "qat_int8_digits",
        "qat_resnet20",
        "digits_deep_compression",
        "digits_mixed_precision",
        "digits_optimal_brain",
        "digits_soft_sharing",
        "mnist_lenet300_merge",
        "resnet20_structured",
        "resnet56_structured",
        "digits_prune",
        "digits_structured",
        "distill_resnet20",
        "fitnets_mnist",
        "prune_distill",
        "mnist_lenet300_prune",
        "mnist_lenet5_prune",
        "mnist_lottery",
        "mnist_rigl",
        "mnist_ssl_lenet5",
    }


@pytest.fixture
def small_mnist(tmp_path: Path) -> Path:
    """Files in MNIST's format with random images, as many as the fixed split needs and a few more."""
    raw = tmp_path / "mnist" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    _small_cifar(tmp_path, random)
    for prefix, count in (("train", 5300), ("t10k", 300)):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = random.integers(0, 10, count, dtype=np.uint8)
        shape = np.array([0x803, count, 28, 28], dtype=">i4").tobytes()
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(shape + images.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(
            np.array([0x801, count], dtype=">i4").tobytes() + labels.tobytes()
        )
    return tmp_path


def _small_cifar(folder: Path, random: np.random.Generator) -> None:
    """Write an archive of random images in class folders, and weights of ResNets that are not trained."""
    with tarfile.open(folder / "cifar10_jpeg.tar.gz", "w:gz") as archive:
        for split, kind, number in itertools.product(("train", "test"), range(10), range(4)):
            content = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(content, "JPEG")
            entry = tarfile.TarInfo(f"cifar10_jpeg/{split}/class{kind}/{number}.jpg")
            entry.size = content.tell()
            content.seek(0)
            archive.addfile(entry, content)
    (folder / "resnet_cifar10").mkdir()
    for depth, build in ((20, resnet20), (56, resnet56)):
        save_file(build().state_dict(), folder / "resnet_cifar10" / f"resnet{depth}.safetensors")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs(name: str, small_mnist: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(small_mnist)
    monkeypatch.setenv("LIGHTNING_COMPRESS_DATA", str(small_mnist))
    stages = compose_recipe([f"recipes={name}"]).stages
    fits = [stage for stage, content in stages.items() if not (content and content.get("apply"))]
    short = [f"++stages.{stage}.trainer.max_epochs=1" for stage in fits] + SMALLER.get(name, [])
    assert main([f"recipes={name}", "hydra.run.dir=run", "trainer=quiet", "report.latency=false", *FEW, *short]) == 0
    report = json.loads(Path("run/report.json").read_text())
    assert report["recipe"] == name
    assert report["compression_rate"] > RATES.get(name, 2 if name.endswith("structured") else 6)
    assert Path("run/compressed.safetensors").stat().st_size == report["compressed"]["artifact_bytes"]


def compose_recipe(words: list[str]) -> DictConfig:
    register_recipes()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return compose("config", overrides=words)


@pytest.mark.parametrize("name", RECIPES)
def test_the_header_says_what_was_reached(name: str) -> None:
    lines = header(RECIPES[name])
    assert 20 < len(lines[0]) <= 110
    for fact in FACTS:
        (found,) = [line for line in lines if line.startswith(fact)]
        assert len(found.removeprefix(fact).strip()) > 0


@pytest.mark.parametrize("name", RECIPES)
def test_the_commands_of_the_header_parse(name: str) -> None:
    commands = [
        line.partition("lightning-compress ")[2] for line in header(RECIPES[name]) if "lightning-compress " in line
    ]
    assert commands
    for command in commands:
        words = shlex.split(command, comments=True)
        overrides = OverridesParser.create().parse_overrides([word for word in words if word != "-m"])
        assert any(override.is_sweep_override() for override in overrides) == ("-m" in words)
        for index, override in enumerate(overrides):
            values = override.sweep_string_iterator() if override.is_sweep_override() else ()
            for value in values:
                rest = [other.input_line for place, other in enumerate(overrides) if place != index]
                assert list(compose_recipe([*rest, f"{override.key_or_group}={value}"]).stages)
        plain = [override.input_line for override in overrides if not override.is_sweep_override()]
        assert list(compose_recipe(plain).stages)
