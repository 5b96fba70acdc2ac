"""Fake-quantized networks against their integers: by hand, exactly, on every kind of layer, and through a file."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from networks import VISION, Audio, Branching, Small, Words, calibrate, quantize, randomize
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils import weight_norm as weight_norm_hook
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from lightning_compress import ConfigurationError, journal_of, load_compressed, save_compressed
from lightning_compress.evaluation.measurement import layer_table, measure
from lightning_compress.quantization import IntegerLayer, convert, convert_in_place
from lightning_compress.quantization.convert import fold_batch_norm
from lightning_compress.quantization.fixed import FixedQuantizer
from lightning_compress.quantization.fixed_point.layers import fixed_point_output
from lightning_compress.quantization.integer import integer_layer, integer_tensors
from lightning_compress.quantization.layers import quantize_layer, why_not
from lightning_compress.quantization.nibbles import pack_integers, unpack_integers


def inputs_of(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    if isinstance(model, Words):
        return torch.randint(0, 20, (4, 7), generator=generator)
    return torch.randn(4, 1, *((64,) if isinstance(model, Audio) else (16, 16)), generator=generator)


def ready(net: type[nn.Module], weights: int = 8, activations: int = 8) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = randomize(net()).eval()
    x = inputs_of(model)
    quantize(model, weights, activations)
    return calibrate(model, x), x


def integer(weight: Tensor, *, symmetric: bool = True, per_channel: bool = True, bits: int = 8) -> IntegerLayer:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data.copy_(weight)
    spec = {"bits": bits, "symmetric": symmetric, "per_channel": per_channel, "range": "minmax"}
    quantize_layer(layer, spec)
    layer.weight_quantizer.take_range(layer.weight)
    return integer_layer(layer, {"weight": {"bits": bits, "symmetric": symmetric, "axis": 0}}, bias=True)


def norm_of(gamma: list[float], beta: list[float], mean: list[float], variance: list[float]) -> nn.BatchNorm1d:
    norm = nn.BatchNorm1d(len(gamma), eps=1e-30).eval()  # nothing, but above 0, as older torch wants it
    for tensor, values in zip(
        (norm.weight, norm.bias, norm.running_mean, norm.running_var), (gamma, beta, mean, variance), strict=True
    ):
        tensor.data.copy_(torch.tensor(values))
    return norm


def test_a_fold_by_hand() -> None:
    # scales 2/127 and 1/127; gamma/sigma = 3/2 and -4; the integers of the second row change their sign
    layer = integer(torch.tensor([[2.0, -1.0], [0.5, 1.0]]))
    layer.bias.data.copy_(torch.tensor([1.0, 2.0]))
    with torch.no_grad():
        fold_batch_norm(layer, norm_of([3.0, -4.0], [0.5, 1.0], [2.0, -1.0], [4.0, 1.0]))
    held = layer.integer_weight
    assert held.values.tolist() == [[127, -64], [-64, -127]]  # 63.5 rounds to the even 64
    assert torch.allclose(held.scale, torch.tensor([3.0, 4.0]) / 127)
    assert layer.bias.tolist() == [-1.0, -11.0]  # 0.5 + (1 - 2) 1.5 and 1 + (2 + 1) (-4)


@pytest.mark.parametrize(
    ("symmetric", "per_channel", "bits"), list(itertools.product((True, False), (True, False), (8, 3)))
)
def test_a_fold_is_exact_on_every_grid(symmetric: bool, per_channel: bool, bits: int) -> None:
    torch.manual_seed(1)
    layer = integer(torch.randn(6, 4) + 0.3, symmetric=symmetric, per_channel=per_channel, bits=bits)
    layer.bias.data.normal_()
    norm = norm_of([1.5, -2.0, 0.0, 0.3, -0.1, 1.0], [0.1] * 6, [0.2] * 6, [0.5, 2.0, 1.0, 1.0, 3.0, 0.1])
    x = torch.randn(5, 4)
    expected = norm.double()(layer(x).double())
    norm.float()
    before = layer.integer_weight.integers().clone()
    with torch.no_grad():
        fold_batch_norm(layer, norm)
    assert torch.allclose(layer(x).double(), expected, atol=1e-5)
    after = layer.integer_weight.integers()
    if symmetric:
        signs = torch.tensor([1, -1, 0, 1, -1, 1], dtype=torch.int8)[:, None]
        assert torch.equal(after, before * signs)
    else:
        assert torch.equal(after[[0, 3, 5]], before[[0, 3, 5]])
        assert int(after.max()) <= 2**bits - 1


@pytest.mark.parametrize("net", [Small, Audio, Words])
@pytest.mark.parametrize(("weights", "activations"), [(8, 8), (4, 8), (2, 4)])
def test_integers_equal_the_fake_quantized_network(net: type[nn.Module], weights: int, activations: int) -> None:
    model, x = ready(net, weights, activations)
    with torch.no_grad():
        fake, whole = model(x), copy.deepcopy(model)
        converted = convert(model)
        assert torch.equal(model(x), fake)  # it was a copy
        assert torch.allclose(converted(x), fake, atol=2e-2 * float(fake.abs().max()))
        assert torch.equal(whole(x), fake)
    assert not any(isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d) for part in converted.modules())
    assert all(p.dim() == 1 for p in converted.parameters())  # biases are all that is left in float
    assert {held.bits for held in integer_tensors(converted)} == {weights}


def test_most_elements_do_not_move_at_all() -> None:
    model, x = ready(Small)
    with torch.no_grad():
        fake, found = model(x), convert(model)(x)
    step = [part for part in convert(model).modules() if isinstance(part, FixedQuantizer)][-1].scale
    assert float((fake - found).abs().max()) <= float(step)


def test_what_was_done_is_said() -> None:
    model, _ = ready(Branching)
    done = convert_in_place(model)
    assert done.integers == {"part.0": 8, "head": 8}
    assert done.folded == {"part.1": "part.0"}
    assert done.left == {}
    loose = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2)).eval()
    quantize(loose)
    calibrate(loose, torch.randn(4, 1, 3, 3))
    loose[2].output_quantizer.enabled = False
    done = convert_in_place(loose)
    assert done.left == {
        "2": "no convolution or linear layer stands alone before it",
        "2.output_quantizer": "it saw no data, or is switched off",
    }


def test_batch_norms_that_cannot_fold_stay() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.ConvTranspose2d(4, 4, 3, groups=2), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten(),
    ).eval()  # fmt: skip
    wide = {"symmetric": True, "per_channel": True, "range": "minmax", "narrow": False}
    quantize_layer(net[0], {**wide, "narrow": True})
    quantize_layer(net[2], wide)
    quantize_layer(net[4], wide)
    net[3].weight.data[1] = -1.0
    x = torch.randn(2, 4, 4, 4)
    calibrate(net, x)
    with torch.no_grad():
        fake = net(x)
        converted = convert(net)
        assert torch.allclose(converted(x), fake, atol=1e-5)
    left = convert_in_place(net).left
    assert left["1"].startswith("a grouped transposed convolution")
    assert left["3"].startswith("a negative gamma would mirror")
    assert left["5"] == "it has no running statistics"


def test_a_batch_norm_stays_behind_outputs_in_fixed_point() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).eval()
    net[0].weight.data.mul_(20.0)  # outputs beyond the format's ends, which a fold would not clip
    net[1].running_var.fill_(30.0)
    fixed_point_output(net[0], [2, 6])
    x = torch.randn(8, 1, 4, 4)
    quantize(net)
    calibrate(net, x)
    with torch.no_grad():
        fake, found = net(x), convert(net)(x)
    assert torch.equal(found, fake)
    assert convert_in_place(net).left["1"] == "the output of the layer before it is rounded to fixed point"


def test_the_file_holds_integers_and_loads_on_the_bare_architecture(tmp_path) -> None:
    model, x = ready(Small, 4)
    converted = convert(model)
    info = save_compressed(converted, tmp_path / "small.safetensors")
    dtypes = {key: entry["dtype"] for key, entry in info.tensors.items()}
    assert dtypes["head.integer_weight.values"] == "uint8"
    values = sum(entry["shape"][0] for key, entry in info.tensors.items() if key.endswith("integer_weight.values"))
    assert values == sum((p.numel() + 1) // 2 for p in Small().parameters() if p.dim() > 1)
    loaded = load_compressed(Small(), tmp_path / "small.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(loaded(x), converted(x))
    assert journal_of(loaded) == journal_of(converted)
    again = load_compressed(convert(ready(Small, 4)[0]), tmp_path / "small.safetensors")
    assert torch.equal(again.eval()(x), converted(x))


def test_copies_half_precision_and_gradients() -> None:
    model, x = ready(Small)
    converted = convert(model)
    assert torch.equal(copy.deepcopy(converted)(x), converted(x))
    y = converted(x.requires_grad_())
    y.sum().backward()
    assert x.grad is not None
    assert float(x.grad.abs().sum()) > 0
    half = copy.deepcopy(converted).to(torch.bfloat16)
    assert half(x.detach().bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("net", [Small, Words])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_networks_of_other_types_keep_them(net: type[nn.Module], dtype: torch.dtype, tmp_path) -> None:
    model, x = ready(net)
    model.to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    converted = convert(model)
    with torch.no_grad():
        expected, got = model(x), converted(x)
    assert got.dtype == dtype
    assert (got - expected).square().mean().sqrt() <= (0.1 if dtype == torch.bfloat16 else 1e-6) * expected.std()
    save_compressed(converted, tmp_path / "small.safetensors")
    again = load_compressed(net().to(dtype), tmp_path / "small.safetensors").eval()
    assert torch.equal(again(x), got)


def test_tied_parametrized_and_masked_weights() -> None:
    class Half(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * 0.5

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6), nn.Linear(6, 6)).eval()
    net[1].weight = net[0].weight
    net[0].weight.data[:, ::2] = 0.0
    parametrize.register_parametrization(net[2], "weight", Half())
    x = torch.randn(8, 6)
    quantize(net)
    calibrate(net, x)
    with torch.no_grad():
        fake = net(x)
        converted = convert(net)
        assert torch.allclose(converted(x), fake, atol=1e-6)
    assert converted[0].integer_weight.values is converted[1].integer_weight.values
    assert (converted[0].integer_weight.values[:, ::2] == 0).all()
    assert not parametrize.is_parametrized(converted[2])


@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
@pytest.mark.parametrize("duplicate", [convert, copy.deepcopy])
def test_converting_a_copy_leaves_the_original_normalized(norm, duplicate) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(norm(nn.Conv2d(1, 3, 3)), nn.Flatten(), norm(nn.Linear(12, 2))).eval()
    x = torch.randn(8, 1, 4, 4)
    quantize(net)
    calibrate(net, x)
    net.eval()
    with torch.no_grad():
        fake = net(x)
        converted = duplicate(net)
        if duplicate is copy.deepcopy:
            convert_in_place(converted)
        assert torch.allclose(converted(x), fake, atol=1e-6)
        assert torch.equal(net(x), fake)
        assert parametrize.is_parametrized(net[0])
        assert torch.equal(convert(net)(x), converted(x))


def test_attention_keeps_its_masks() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True).eval()
    x, mask = torch.randn(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool)
    mask[:, 3:] = True
    quantize(encoder)
    calibrate(encoder, x)
    with torch.no_grad():
        fake = encoder(x, src_key_padding_mask=mask)
        found = convert(encoder)(x, src_key_padding_mask=mask)
    assert torch.allclose(found, fake, atol=1e-5)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [True, False])
def test_packing_is_exact(bits: int, signed: bool) -> None:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    q = torch.arange(low, high + 1).repeat(3)[: 3 * (high - low)].to(torch.int8 if signed else torch.uint8)
    packed = pack_integers(q, bits)
    assert packed.numel() == -(-q.numel() // (4 if bits == 2 else 2 if bits < 5 else 1))
    assert torch.equal(unpack_integers(packed, bits, q.numel(), signed), q)


def test_bad_input_is_named() -> None:
    with pytest.raises(ConfigurationError, match="`model` has no quantized layer"):
        convert(Small())
    with pytest.raises(ConfigurationError, match="got NoneType"):
        convert(None)
    with pytest.raises(ConfigurationError, match="Linear has quantizers for no weight, not for"):
        integer_layer(nn.Linear(2, 2), {"weight": {"bits": 8}})


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(VISION))
def test_large_networks(name: str) -> None:
    torch.manual_seed(0)
    size = 224 if name.startswith("vit") else 64
    x = torch.randn(2, 3, size, size)
    model = VISION[name]().train()
    if name.startswith("vit"):
        nn.init.normal_(model.heads.head.weight, std=0.02)
    with torch.no_grad():
        model(x)  # running statistics that fit
    model.eval()
    quantize(model)
    calibrate(model, x)
    with torch.no_grad():
        fake = model(x)
        done = convert_in_place(model)
        found = model(x)
    assert len(done.integers) >= 16
    rms = float(fake.square().mean().sqrt())
    assert float((found - fake).square().mean().sqrt()) < 0.05 * rms
    if name != "densenet121":  # its norms stand before convolutions
        assert not any(isinstance(part, nn.BatchNorm2d) for part in model.modules())


@pytest.mark.parametrize("bits", [8, 4])
def test_the_report_counts_integers_as_the_weights_they_stand_for(bits: int) -> None:
    model, _ = ready(Small, weights=bits)
    model.get_submodule("head").weight.data[0].zero_()
    dense = measure(model, gzip=False)
    integers = measure(convert(model), gzip=False)
    rows = {row["name"]: row for row in layer_table(dense, integers)}
    assert rows["head"]["parameters"][0] == rows["head"]["parameters"][1]
    assert rows["head"]["bits"] == [32, bits]
    zeros = int((dequantized(convert(model).get_submodule("head")) == 0).sum())
    assert rows["head"]["parameters"][1] - rows["head"]["nonzero"][1] == zeros
    assert zeros >= model.get_submodule("head").in_features
    assert sum(row["parameters"][1] for row in rows.values()) == integers.parameters


def dequantized(layer: nn.Module) -> Tensor:
    (tensor,) = integer_tensors(layer)
    return tensor()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_that_hooks_compute_become_integers(tmp_path) -> None:
    """As ``torch.nn.utils.prune`` and the old weight norm leave them: set before each pass."""

    def built() -> nn.Module:
        torch.manual_seed(0)
        pruned = prune.l1_unstructured(nn.Conv2d(1, 4, 3, bias=False), "weight", 0.5)
        return nn.Sequential(pruned, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), weight_norm_hook(nn.Linear(16, 2)))

    x = torch.randn(8, 1, 4, 4)
    model = calibrate(quantize(built().eval()), x)
    converted = convert(model)
    save_compressed(converted, tmp_path / "model.safetensors")
    again = load_compressed(built(), tmp_path / "model.safetensors").eval()
    with torch.no_grad():
        assert torch.allclose(converted(x), model(x), atol=1e-5)
        assert torch.equal(again(x), converted(x))
    assert (converted[0].integer_weight.values == 0).float().mean() >= 0.5


def test_the_old_spectral_norm_stays_float() -> None:
    assert "parametrizations" in why_not(nn.utils.spectral_norm(nn.Linear(2, 2)))
    assert not why_not(spectral_norm(nn.Linear(2, 2)))
