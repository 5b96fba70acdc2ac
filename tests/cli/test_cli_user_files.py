"""Files and code that users bring: checkpoints as Lightning names them, their own module and data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lightning_compress.models import DigitsCNN, ImageClassifier
from lightning_compress.run.shipped import recipe_files
from lightning_compress.stages import UNKNOWN

CODE = """
import torch
from lightning import LightningDataModule
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset

class Net(BoringModel):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Sequential(torch.nn.Linear(32, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))

class Data(LightningDataModule):
    def train_dataloader(self):
        return torch.utils.data.DataLoader(RandomDataset(32, 8))
    val_dataloader = test_dataloader = train_dataloader
"""


@pytest.mark.parametrize("wrapped", [True, False])
def test_evaluate_measures_what_torch_saved(wrapped: bool, tiny: Callable[..., Any]) -> None:
    module = ImageClassifier(DigitsCNN())
    with torch.no_grad():
        module.net.conv1.weight.zero_()
    state = module.state_dict()
    torch.save({"state_dict": state} if wrapped else state, "weights.ckpt")
    result = tiny("task=evaluate", "model.checkpoint=weights.ckpt")
    assert result.code == 0, result.err
    rows = {row["name"]: row for row in json.loads(Path("run/report.json").read_text())["layers"]}
    assert rows["net.conv1"]["nonzero"][1] == int((module.net.conv1.bias != 0).sum())


def test_an_equals_sign_in_a_file_name(tiny: Callable[..., Any]) -> None:
    torch.save(ImageClassifier(DigitsCNN()).state_dict(), "epoch=1.ckpt")
    refused = tiny("task=evaluate", "model.checkpoint=epoch=1.ckpt")
    assert refused.code == 2
    assert "write 'model.checkpoint=\"epoch=1.ckpt\"'" in refused.err
    assert tiny("task=evaluate", 'model.checkpoint="epoch=1.ckpt"').code == 0


def test_pickled_code_is_refused_without_advice_to_load_it(tiny: Callable[..., Any]) -> None:
    torch.save({"state_dict": torch.nn.Linear(1, 1)}, "code.ckpt")
    result = tiny("task=evaluate", "model.checkpoint=code.ckpt")
    assert result.code == 2
    assert "pickled code is never loaded" in result.err
    assert "weights_only" not in result.err


def test_training_starts_from_given_weights_without_counters(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10), torch.nn.BatchNorm1d(10))
    Path("weights").mkdir()
    save_file(
        {key: value for key, value in net.state_dict().items() if "batches" not in key}, "weights/net.safetensors"
    )
    monkeypatch.setenv("LIGHTNING_COMPRESS_DATA", "weights")
    Path("own_net.py").write_text(
        "from torch.nn import BatchNorm1d, Flatten, Linear, Sequential\n\n"
        "def make(num_classes):\n    return Sequential(Flatten(), Linear(64, num_classes), BatchNorm1d(num_classes))\n"
    )
    frozen = ("++stages.train.optimizer={_target_:torch.optim.SGD,lr:0.0}", "model.module.net._target_=own_net.make")
    everything = "callbacks.prune.select.not_last=false"
    result = tiny("model.pretrained=net.safetensors", *frozen, everything)
    assert result.code == 0, result.err
    trained = torch.load("run/checkpoints/train.pt", weights_only=True)["module"]
    assert torch.equal(trained["net.1.weight"], net[1].weight)
    assert trained["net.2.num_batches_tracked"] == 2


_ONE_LINEAR = [
    "select@callbacks.low_rank.select=all",
    "~callbacks.low_rank.factors",
    "+callbacks.low_rank.factors={rank: 2}",
]
OF_ITS_NETWORK = {
    "caffenet_tai": _ONE_LINEAR,
    "vgg16_tai": _ONE_LINEAR,
    "resnet20_structured": ['callbacks.structured.select.include=["*"]'],
    "resnet56_structured": ['callbacks.structured.select.include=["*"]'],
    "distill_resnet20": ["model.checkpoint=null"],
    "mnist_ssl_lenet5": ["~callbacks.group_lasso.rules", "select@callbacks.group_lasso.select=all"],
    "fitnets_mnist": [
        "~callbacks.hints.losses.hint.pairs",
        "+callbacks.hints.losses.hint.pairs={layer.0: layer.0}",
        "~stages.hints.student",
        "+stages.hints.student={_target_: MODULE.Net}",
    ],
    "prune_distill": ["callbacks.prune.schedule.every=2%"],
}
"""What a recipe says of its own network and the length of its epochs."""


@pytest.mark.parametrize("recipe", sorted(recipe_files()))
def test_every_recipe_takes_a_module_and_data_by_target(
    recipe: str, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"own_code_{recipe}"
    Path(f"{name}.py").write_text(CODE)
    own = ("model=custom", f"model.module._target_={name}.Net", "data=custom", f"data._target_={name}.Data")
    layers = [word.replace("MODULE", name) for word in OF_ITS_NETWORK.get(recipe, [])]
    result = run(f"recipes={recipe}", *own, *layers, "task=plan", "hydra.run.dir=run")
    assert result.code == 0, result.err
    planned = ("layer.0", "KnowledgeDistillation", UNKNOWN)  # the last where an earlier stage decides on the layers
    assert any(word in result.out for word in planned)


def test_a_mapping_with_new_entries_says_how_to_add_them(tiny: Callable[..., Any]) -> None:
    result = tiny("model=custom", "model.module={_target_: torch.nn.Linear, in_features: 8}")
    assert result.code == 2
    assert "'in_features' is not in struct" in result.err
    assert "+model.module.NAME=VALUE" in result.err
