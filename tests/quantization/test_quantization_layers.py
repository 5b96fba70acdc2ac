"""Layers that become quantized ones in place: same object, same Parameter, same keys, the right axis."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import ConfigurationError, Edit, apply, journal_of, load_compressed, save_compressed
from lightning_compress.quantization import (
    ACTIVATION,
    WEIGHT,
    QuantizedLayer,
    Quantizer,
    quantize_input,
    quantize_layer,
    quantize_output,
    quantizers_of,
    update_ranges,
)
from lightning_compress.quantization.affine import fake_quantize_inside

LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (2, 6)),
    "conv1d_same": (lambda: nn.Conv1d(2, 4, 4, padding="same", dilation=2), (2, 2, 9)),
    "conv2d_grouped": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 5, 5)),
    "conv2d_depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False), (2, 4, 5, 5)),
    "conv2d_reflect": (lambda: nn.Conv2d(2, 4, (3, 5), padding=(1, 2), padding_mode="reflect"), (2, 2, 6, 6)),
    "conv2d_same_circular": (lambda: nn.Conv2d(2, 4, 4, padding="same", padding_mode="circular"), (2, 2, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2, stride=2), (2, 2, 4, 4, 4)),
    "transposed1d": (lambda: nn.ConvTranspose1d(2, 4, 3, stride=2, output_padding=1), (2, 2, 5)),
    "transposed2d_grouped": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (2, 4, 4, 4)),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 4, 2), (1, 2, 3, 3, 3)),
}


def quantized(layer: nn.Module, **weight: object) -> nn.Module:
    return quantize_layer(layer, {**WEIGHT.to_config(), **weight}, ACTIVATION.to_config())


def switch_on(module: nn.Module, x: Tensor) -> nn.Module:
    """Observe one batch, then quantize."""
    for quantizer in quantizers_of(module):
        quantizer.observing = quantizer.enabled = True
        quantizer.ready = "weight" in type(quantizer).__name__.lower()
    module.train()(x)
    update_ranges(quantizers_of(module))
    return module


@pytest.mark.parametrize("name", LAYERS)
def test_becomes_a_quantized_layer_in_place(name: str) -> None:
    build, shape = LAYERS[name]
    layer, x = build(), torch.randn(shape)
    before, weight, keys = layer(x), layer.weight, set(layer.state_dict())
    assert quantized(layer) is layer
    assert layer.weight is weight
    assert keys < set(layer.state_dict())
    assert isinstance(layer, QuantizedLayer)
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", LAYERS)
def test_equals_the_float_layer_with_quantized_operands(name: str, bits: int) -> None:
    build, shape = LAYERS[name]
    layer, x = build(), torch.randn(shape)
    dense = copy.deepcopy(layer)
    switch_on(quantized(layer, bits=bits), x)
    scale, zero = layer.weight_quantizer.affine(layer.weight)
    axis = 1 if "transposed" in name else 0
    assert layer.weight_quantizer.axis == axis
    assert scale.shape == (layer.weight.shape[axis],)
    with torch.no_grad():  # by hand: the peak of each slice along the axis of output channels
        for index in range(len(scale)):
            part = dense.weight.select(axis, index)
            part.copy_(torch.round(part / scale[index]) * scale[index])
            assert scale[index] == layer.weight.select(axis, index).abs().max() / (2 ** (bits - 1) - 1)
    q = layer.weight_quantizer
    assert torch.equal(q.dequantize(q.quantize(layer.weight), scale, zero), dense.weight)
    assert torch.allclose(layer(x), dense(layer.input_quantizer(x)), atol=1e-6)


def test_output_size_of_a_transposed_layer() -> None:
    layer, x = nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1), torch.randn(1, 2, 4, 4)
    expected = layer(x, output_size=[8, 7])
    quantized(layer)
    assert torch.equal(layer(x, output_size=[8, 7]), expected)
    with pytest.raises(ValueError, match="`output_size` asks for 9"):
        layer(x, output_size=[9, 7])


def test_embeddings() -> None:
    table, bag = nn.Embedding(5, 4, padding_idx=0), nn.EmbeddingBag(5, 4, mode="sum")
    indices = torch.tensor([[1, 4], [0, 2]])
    for layer in (table, bag):
        dense = fake_quantize_inside(
            layer.weight.detach(), layer.weight.detach().abs().amax(1).clamp_min(2**-20) / 7, 0
        )
        quantize_layer(layer, {**WEIGHT.to_config(), "bits": 4})
        switch_on(layer, indices)
        expected = dense[indices] if layer is table else dense[indices].sum(1)
        assert torch.allclose(layer(indices), expected)
    table(indices).sum().backward()
    assert torch.equal(table.weight.grad[0], torch.zeros(4))
    assert torch.equal(table.weight.grad[4], torch.ones(4))


def test_zeros_of_a_mask_stay_zero_and_gradients_reach_the_weight() -> None:
    layer = nn.Linear(8, 8)
    with torch.no_grad():
        layer.weight[layer.weight.abs() < 0.2] = 0
    zeros = layer.weight == 0
    switch_on(quantized(layer, bits=2), torch.randn(4, 8))
    assert torch.equal(layer.quantized_weight()[zeros], torch.zeros(int(zeros.sum())))
    layer(torch.randn(4, 8)).sum().backward()
    assert (layer.weight.grad[zeros] != 0).any()


def test_old_and_new_parametrizations() -> None:
    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    x = torch.randn(3, 4)
    for before in (True, False):
        layer = nn.Linear(4, 4)
        if before:
            nn.utils.parametrize.register_parametrization(layer, "weight", Double())
        quantized(layer)
        if not before:
            nn.utils.parametrize.register_parametrization(layer, "weight", Double())
        switch_on(layer, x)
        scale, _ = layer.weight_quantizer.affine(layer.weight)
        assert torch.allclose(scale, 2 * layer.parametrizations.weight.original.detach().abs().amax(1) / 127)
        nn.utils.parametrize.remove_parametrizations(layer, "weight")
        assert type(layer).__name__ == "QuantizedLinear"
    pruned = quantized(nn.utils.prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5))
    assert int((switch_on(pruned, x).quantized_weight() == 0).sum()) >= 8


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.act = nn.ReLU()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.conv(x)).mean((2, 3)))


def edited() -> tuple[Net, Tensor]:
    net, x = Net(), torch.randn(2, 1, 6, 6)
    both = {"weight": WEIGHT.to_config(), "input": ACTIVATION.to_config()}
    apply(net, Edit("replace", "conv", "quantized", both))
    apply(net, Edit("replace", "head", "quantized", {**both, "input": None}))
    apply(net, Edit("replace", "act", "quantized_output", {"bits": 4}))
    switch_on(net, x)
    return net, x


def test_replays_on_the_bare_architecture(tmp_path) -> None:
    net, x = edited()
    net.eval()
    save_compressed(net, tmp_path / "net.safetensors")
    bare = load_compressed(Net().eval(), tmp_path / "net.safetensors")
    assert torch.equal(bare(x), net(x))
    assert not torch.equal(bare(x), nn.Module.__call__(Net(), x))
    assert [q.enabled for q in quantizers_of(bare)] == [True] * 4
    assert len(bare.act._forward_hooks) == 1
    assert journal_of(bare) == journal_of(net)


def test_deepcopies_pickles_and_loads_weights_only(tmp_path) -> None:
    net, x = edited()
    net.eval()
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(x), net(x))
        other.act.output_quantizer.enabled = False
        assert not torch.equal(other(x), net(x))
    torch.save(net.state_dict(), tmp_path / "net.pt")
    again = edited()[0].eval()
    again.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
    assert torch.equal(again(x), net(x))


def test_an_edit_that_fails_or_is_taken_back_leaves_the_layer_as_it_was() -> None:
    from lightning_compress.core.verbs import _replace

    net = Net()
    config = {"weight": {"symmetric": True, "range": "pact"}}
    with pytest.raises(ConfigurationError, match="pact"):
        apply(net, Edit("replace", "conv", "quantized", config))
    assert type(net.conv) is nn.Conv2d
    keys, conv = set(net.state_dict()), net.conv
    for kind, config in (("quantized", {"weight": WEIGHT.to_config()}), ("quantized_output", {"bits": 4})):
        undo = _replace(net, net.conv, Edit("replace", "conv", kind, config))
        assert undo is not None
        undo()
        assert net.conv is conv
        assert type(conv) is nn.Conv2d
        assert set(net.state_dict()) == keys
        assert not conv._forward_hooks


def test_inputs_and_outputs_of_any_module() -> None:
    lstm = quantize_output(nn.LSTM(3, 4), bits=2)
    x = torch.randn(5, 1, 3)
    switch_on(lstm, x)
    assert len(lstm(x)[0].unique()) <= 4
    assert len(lstm(x)[1][0].unique()) == 4
    net = quantize_input(Net(), bits=2)
    switch_on(net, torch.randn(2, 1, 6, 6))
    seen: list[Tensor] = []
    net.conv.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    net(x=torch.randn(2, 1, 6, 6))
    assert len(seen[0].unique()) <= 4
    with pytest.raises(ConfigurationError, match="has `input_quantizer` already"):
        quantize_input(net)


def test_what_cannot_be_quantized_says_why() -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    for layer, why in (
        (Own(2, 2), "forward of its own"),
        (nn.Embedding(3, 2, max_norm=1.0), "max_norm"),
        (nn.Embedding(3, 2, sparse=True), "sparse"),
        (quantized(nn.Linear(2, 2)), "quantized already"),
    ):
        with pytest.raises(ConfigurationError, match=why):
            quantize_layer(layer)


def test_flags_travel_and_observers_rest_in_eval_mode() -> None:
    layer = quantized(nn.Linear(4, 4))
    x = torch.randn(8, 4)
    switch_on(layer, x)
    before = layer.input_quantizer.observer.high.clone()
    layer.eval()(x * 100)
    update_ranges(quantizers_of(layer))
    assert torch.equal(layer.input_quantizer.observer.high, before)
    other = quantized(nn.Linear(4, 4))
    other.load_state_dict(layer.state_dict())
    flags = [(q.enabled, q.observing, q.ready) for q in quantizers_of(other)]
    assert flags == [(True, True, True)] * 2
    assert isinstance(other.input_quantizer, Quantizer)
    other.input_quantizer.set_range(torch.tensor(0.5), 3)
    assert other.input_quantizer.affine()[1] == 3
    assert not other.input_quantizer.observing


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(dtype: torch.dtype) -> None:
    layer = quantized(nn.Linear(4, 4)).to(dtype)
    x = torch.randn(8, 4, dtype=dtype)
    switch_on(layer, x)
    y = layer(x)
    assert y.dtype is dtype
    y.sum().backward()
    assert torch.isfinite(layer.weight.grad).all()


def test_autocast_and_channels_last() -> None:
    layer = quantized(nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last))
    x = torch.randn(2, 2, 6, 6).to(memory_format=torch.channels_last)
    switch_on(layer, x)
    assert layer.quantized_weight().is_contiguous(memory_format=torch.channels_last)
    assert layer.input_quantizer(x).is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
