"""Full-size networks, cut in one call: sliced equals masked, gradients flow, the file reloads without a tracer."""

from __future__ import annotations

import builtins
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import lightning_compress as lc
from lightning_compress import StructuredPruning
from lightning_compress.core.cost import count_macs
from lightning_compress.core.paths import named_layers
from lightning_compress.models.resnet import resnet20, resnet56
from lightning_compress.pruning.structured.groups import Zeroing, parameter_in

SMALL, LARGER = torch.zeros(2, 3, 32, 32), torch.zeros(2, 3, 64, 64)


class TextClassifier(nn.Module):
    """Two bidirectional LSTM layers over an embedding; the last states of both directions are joined."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.drop = nn.Embedding(10_000, 128), nn.Dropout(0.3)
        self.recur = nn.LSTM(128, 256, num_layers=2, bidirectional=True, batch_first=True, dropout=0.3)
        self.hidden, self.head = nn.Linear(512, 128), nn.Linear(128, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        states = self.recur(self.drop(self.embed(tokens)))[1][0]
        return self.head(torch.relu(self.hidden(torch.cat([states[-2], states[-1]], 1))))


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "resnet20": (resnet20, SMALL),
    "resnet56": (resnet56, SMALL),
    "resnet18": (torchvision.models.resnet18, LARGER),
    "resnet50": (torchvision.models.resnet50, LARGER),
    "vgg16": (torchvision.models.vgg16, SMALL),
    "googlenet": (lambda: torchvision.models.googlenet(init_weights=False, aux_logits=False), LARGER),
    "densenet121": (torchvision.models.densenet121, LARGER),
    "mobilenet_v2": (torchvision.models.mobilenet_v2, LARGER),
    "vit_b_16": (lambda: torchvision.models.vit_b_16(image_size=64), LARGER),
    "swin_t": (torchvision.models.swin_t, torch.zeros(1, 3, 224, 224)),
    "lstm_text": (TextClassifier, torch.arange(40).reshape(2, 20)),
}


def lively(net: nn.Module) -> nn.Module:
    """Give norms statistics and shifts, and the head weights, that a cut could get wrong."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, 0, 0.02)
    return net


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_half_the_operations_of(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    build, example = MODELS[name]
    net = lively(build())
    inputs = torch.rand(example.shape) if example.is_floating_point() else example
    callback = StructuredPruning(macs=0.5, limits={"floor": 0.05})
    sliced = lc.compress(net, callback, example_inputs=example)

    before, after = count_macs(net, example).total, count_macs(sliced, example).total
    assert before and after  # noqa: PT018
    assert after / before == pytest.approx(0.5, rel=0.031)  # multiples of channels may leave 3 % of the goal
    assert after / before <= 0.5

    masked = copy.deepcopy(net)
    Zeroing(callback._groups, callback._cuts)(parameter_in(named_layers(masked)))
    with torch.no_grad():
        expected, got = masked.eval()(inputs), sliced.eval()(inputs)
    del masked
    assert float(expected.abs().max()) > 0
    assert float((expected - got).abs().max()) <= 1e-5 * float(expected.abs().max())

    path = tmp_path / "cut.safetensors"
    lc.save_compressed(sliced, path)
    forbid_torch_pruning(monkeypatch)
    bare = lc.load_compressed(build(), path).eval()
    with torch.no_grad():
        assert float((bare(inputs) - got).abs().max()) <= 1e-6 * float(got.abs().max())

    bare.train()(inputs).square().sum().backward()
    assert [n for n, p in bare.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def forbid_torch_pruning(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def guarded(name: str, *args: Any, **kwargs: Any) -> Any:
        assert not name.startswith("torch_pruning"), "a reload must not need the tracer"
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", guarded)
