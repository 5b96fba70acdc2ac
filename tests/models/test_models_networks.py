import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torchvision import models as torchvision_models

from lightning_compress import models
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.models.resnet import BasicBlock, shortcut_a

SHARED = Path(os.environ.get("LIGHTNING_COMPRESS_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


@pytest.mark.parametrize(
    ("build", "shape", "parameters"),
    [
        (models.DigitsCNN, (1, 8, 8), 151_306),
        (models.LeNet300100, (1, 28, 28), 266_610),
        (models.LeNet5, (1, 28, 28), 431_080),
        (models.Perceptron, (1, 28, 28), 2_919_434),
        (models.StagedCNN, (1, 28, 28), 82_266),
        (models.resnet20, (3, 32, 32), 269_722),
        (models.resnet32, (3, 32, 32), 464_154),
        (models.resnet44, (3, 32, 32), 658_586),
        (models.resnet56, (3, 32, 32), 853_018),
    ],
)
def test_published_sizes_and_output_shapes(build, shape, parameters):
    net = build().eval()
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters
    assert net(torch.zeros(2, *shape)).shape == (2, 10)
    assert build(num_classes=4).eval()(torch.zeros(1, *shape)).shape == (1, 4)


def test_perceptron_has_as_many_layers_as_asked_and_refuses_none():
    net = models.Perceptron(4, [3, 2], relu=False, num_classes=5)
    assert [type(layer).__name__ for layer in net.layers] == ["Linear", "BatchNorm1d"] * 2
    assert net.head(torch.zeros(1, 2)).shape == (1, 5)
    for sizes in ([], [3, 0]):
        with pytest.raises(ConfigurationError, match="`hidden`"):
            models.Perceptron(hidden=sizes)


def test_perceptron_drops_inputs_in_training_only_and_keeps_its_keys():
    net = models.Perceptron(1000, [2], dropout=0.25)
    images, seen = torch.ones(1, 10, 100), []
    net.layers.fc1.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    net.eval()(images)
    net.train()(images.expand(2, 10, 100))
    assert torch.equal(seen[0], torch.ones(1, 1000))
    assert 0.2 < (seen[1] == 0).float().mean() < 0.3
    assert net.state_dict().keys() == models.Perceptron(1000, [2]).state_dict().keys()
    for share in (-0.1, 1, "0.2"):
        with pytest.raises(ConfigurationError, match="`dropout`"):
            models.Perceptron(dropout=share)


def test_lenet5_forward_by_hand():
    net = models.LeNet5()
    image = torch.randn(1, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    first = nn.functional.max_pool2d(nn.functional.conv2d(image, net.conv1.weight, net.conv1.bias), 2)
    second = nn.functional.max_pool2d(nn.functional.conv2d(first, net.conv2.weight, net.conv2.bias), 2)
    assert second.shape == (1, 50, 4, 4)
    hidden = (second.reshape(1, -1) @ net.fc1.weight.T + net.fc1.bias).clamp(min=0)
    assert torch.allclose(net(image), hidden @ net.fc2.weight.T + net.fc2.bias, atol=1e-5)


def test_shortcut_pads_channels_evenly_and_has_no_parameters():
    features = torch.arange(16.0).view(1, 1, 4, 4)
    padded = shortcut_a(features, channels=3, stride=2)
    assert padded[0, 1].tolist() == [[0.0, 2.0], [8.0, 10.0]]
    assert not padded[0, [0, 2]].any()
    assert shortcut_a(features, 1, 1) is features
    block = BasicBlock(16, 32, stride=2)
    assert {name.split(".")[0] for name in block.state_dict()} == {"conv1", "bn1", "conv2", "bn2"}


def test_staged_networks_are_thin_or_wide_with_maps_of_the_same_size():
    teacher, student = models.StagedCNN(), models.StagedCNN((8, 8, 8), (2, 3, 3), batch_norm=False)
    image = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    for net, channels in ((teacher, 32), (student, 8)):
        assert net.stage2(net.stage1(image)).shape == (2, channels, 7, 7)
    assert sum(isinstance(module, nn.Conv2d) for module in student.modules()) == 8
    assert not any(isinstance(module, nn.BatchNorm2d) for module in student.modules())
    with pytest.raises(ConfigurationError, match=r"`depths` must be three numbers.*got \[2, 0, 2\]"):
        models.StagedCNN(depths=(2, 0, 2))


def test_resnet_depth_is_checked():
    with pytest.raises(ConfigurationError, match=r"`depth`.*got 21"):
        models.CifarResNet(21)


@pytest.mark.skipif(not (SHARED / "resnet_cifar10").exists(), reason="trained CIFAR ResNets are not here")
@pytest.mark.parametrize("depth", [20, 32, 44, 56])
def test_published_weights_load_strictly(depth):
    net = models.CifarResNet(depth)
    net.load_state_dict(load_file(SHARED / "resnet_cifar10" / f"resnet{depth}.safetensors"), strict=True)


def test_torchvision_by_name_without_download(monkeypatch):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: pytest.fail("download"))
    net = models.torchvision_model("mobilenet_v3_small", num_classes=5).eval()
    assert net(torch.zeros(1, 3, 32, 32)).shape == (1, 5)
    reference = torchvision_models.mobilenet_v3_small(num_classes=5)
    assert net.state_dict().keys() == reference.state_dict().keys()
    assert models.torchvision_model("resnet18").fc.out_features == 1000
    segmentation = models.torchvision_model("lraspp_mobilenet_v3_large", num_classes=2)
    assert sum(parameter.numel() for parameter in segmentation.parameters()) > 1_000_000


def test_torchvision_errors_name_the_nearest_word():
    with pytest.raises(ConfigurationError, match=r"`name`.*'resnet18'"):
        models.torchvision_model("resnet_18")
    with pytest.raises(ConfigurationError, match=r"`weights` of 'resnet18'.*IMAGENET1K_V1"):
        models.torchvision_model("resnet18", weights="IMAGENET_V1")
    with pytest.raises(ConfigurationError, match=r"`num_classes` is 10.*trained for 1000"):
        models.torchvision_model("resnet18", weights="DEFAULT", num_classes=10)
