"""Pruning trained models in one call, on real architectures, to the file and back."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn
from torchvision.models import VisionTransformer, mobilenet_v2, resnet18
from torchvision.models.densenet import DenseNet

from lightning_compress.core.checkpoint import load_compressed, save_compressed
from lightning_compress.core.compress import compress
from lightning_compress.core.errors import CompressionError, ConfigurationError, SelectionError
from lightning_compress.core.select import Select
from lightning_compress.pruning.callbacks import IterativePruning


class TiedText(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.rnn = nn.LSTM(16, 16, num_layers=2)
        self.mix = nn.Linear(16, 16)
        self.decode = nn.Linear(16, 50)
        self.decode.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decode(self.mix(self.rnn(self.embed(tokens))[0]))


def conv_net(dims: int) -> nn.Module:
    conv = {1: nn.Conv1d, 3: nn.Conv3d}[dims]
    pool = {1: nn.AdaptiveAvgPool1d, 3: nn.AdaptiveAvgPool3d}[dims]
    return nn.Sequential(conv(3, 8, 3), nn.ReLU(), conv(8, 8, 3, groups=2), pool(1), nn.Flatten(), nn.Linear(8, 4))


def vit() -> nn.Module:
    return VisionTransformer(image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


IMAGE = torch.zeros(2, 3, 32, 32)
NETWORKS: dict[str, tuple[Any, Tensor]] = {
    "resnet18": (lambda: resnet18(num_classes=10), IMAGE),
    "densenet": (lambda: DenseNet(growth_rate=8, block_config=(2, 2), num_init_features=8, num_classes=10), IMAGE),
    "mobilenet": (lambda: mobilenet_v2(num_classes=10, width_mult=0.25), IMAGE),
    "vit": (vit, torch.zeros(2, 3, 16, 16)),
    "text": (TiedText, torch.arange(12).reshape(6, 2)),
    "conv1d": (lambda: conv_net(1), torch.zeros(2, 3, 9)),
    "conv3d": (lambda: conv_net(3), torch.zeros(2, 3, 6, 6, 6)),
    "linear": (lambda: nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 5)), torch.zeros(2, 20)),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = NETWORKS[name][0]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_pruned_exactly_and_comes_back_from_its_file(name: str, tmp_path: Path) -> None:
    model = build(name)
    before = copy.deepcopy(model.state_dict())
    method = IterativePruning(0.9)
    pruned = compress(model, method)

    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert type(pruned) is type(model)
    prunable = {target.key for target in method._targets}
    after = dict(pruned.named_parameters())
    total = sum(after[key].numel() for key in prunable)
    zeros = sum(int((after[key] == 0).sum()) for key in prunable)
    assert zeros == round(0.9 * total)
    assert method.history[-1]["sparsity"] == pytest.approx(zeros / total)
    for key, value in pruned.state_dict().items():
        if key in prunable:
            kept = value != 0
            assert torch.equal(value[kept], before[key][kept])
            assert bool(kept.any())
        else:
            assert torch.equal(value, before[key])
    assert not any("bias" in key or "norm" in key or "bn" in key or "embed" in key for key in prunable)
    assert pruned(NETWORKS[name][1]).isfinite().all()
    assert list(pruned.state_dict()) == list(before)

    info = save_compressed(pruned, tmp_path / "model.safetensors")
    dense = save_compressed(model, tmp_path / "dense.safetensors")
    assert info.bytes < dense.bytes
    torch.manual_seed(9)
    again = load_compressed(NETWORKS[name][0]().eval(), tmp_path / "model.safetensors")
    assert all(torch.equal(value, pruned.state_dict()[key]) for key, value in again.state_dict().items())
    assert torch.equal(again(NETWORKS[name][1]), pruned(NETWORKS[name][1]))


def test_the_smallest_weights_of_the_whole_model_go() -> None:
    model = build("linear")
    pruned = compress(model, IterativePruning(0.5, Select()))
    both = torch.cat([model[0].weight.flatten(), model[2].weight.flatten()]).abs()
    cut = both.sort().values[both.numel() // 2]
    for layer in (0, 2):
        assert torch.equal(pruned[layer].weight == 0, model[layer].weight.abs() < cut)


def test_tied_weights_stay_tied() -> None:
    pruned = compress(build("text"), IterativePruning(0.5))
    assert pruned.decode.weight is pruned.embed.weight
    assert not (pruned.embed.weight == 0).any()


def test_in_place() -> None:
    model = build("linear")
    weight = model[0].weight
    assert compress(model, IterativePruning(0.5), inplace=True) is model
    assert model[0].weight is weight
    assert int((weight == 0).sum()) == 300


def test_a_lightning_module() -> None:
    model = BoringModel()
    pruned = compress(model, IterativePruning(0.5, Select()))
    assert type(pruned) is BoringModel
    assert int((pruned.layer.weight == 0).sum()) == 32
    assert not (model.layer.weight == 0).any()


def test_a_second_method_and_a_second_call_go_on_from_there() -> None:
    once = compress(build("linear"), IterativePruning(0.5))
    twice = compress(once, IterativePruning(0.8))
    assert int((once[0].weight == 0).sum()) == 300
    assert int((twice[0].weight == 0).sum()) == 480
    assert bool((twice[0].weight == 0)[once[0].weight == 0].all())
    both = compress(build("linear"), IterativePruning(0.5), IterativePruning(0.8))
    assert torch.equal(both[0].weight, twice[0].weight)


def test_one_callback_serves_several_models() -> None:
    method = IterativePruning(0.5)
    first, second = compress(build("linear"), method), compress(build("conv1d"), method)
    assert int((first[0].weight == 0).sum()) == 300
    assert sum(int((second[i].weight == 0).sum()) for i in (0, 2)) == round(0.5 * (72 + 96))
    assert len(method.history) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(dtype: torch.dtype) -> None:
    pruned = compress(build("linear").to(dtype), IterativePruning(0.5))
    assert int((pruned[0].weight == 0).sum()) == 300
    assert pruned[0].weight.dtype == dtype


def test_nothing_to_prune_and_an_amount_of_zero() -> None:
    model = build("linear")
    same = compress(model, IterativePruning(0.0))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    with pytest.raises(SelectionError, match="last layer"):
        compress(nn.Sequential(nn.Linear(3, 3)), IterativePruning(0.5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((build("linear"),), "`methods` is empty"),
        ((build("linear"), 0.9), r"`methods` must be.*got 0\.9"),
        ((build("linear"), IterativePruning), r"`methods` must be.*got <class"),
        (("model.pt", IterativePruning(0.5)), "`model` must be a torch.nn.Module, got str"),
    ],
)
def test_wrong_arguments(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        compress(*arguments)


@pytest.mark.parametrize("options", [{}, {"scope": "layer"}, {"granularity": "row"}, {"scope": "lamp"}])
def test_the_layer_whose_weights_are_no_numbers_is_named(options: dict[str, Any]) -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    nn.init.constant_(net[1].weight[0, :1], float("nan"))
    with pytest.raises(CompressionError, match=r"weights of '1.weight': .*NaN.*diverged"):
        compress(net, IterativePruning(0.5, Select(), **options))


def test_a_model_without_values_is_refused() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    with pytest.raises(ConfigurationError, match=r"`model` has no values yet: '0.weight' is on the meta device"):
        compress(net, IterativePruning(0.5))
