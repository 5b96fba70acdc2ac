"""Binary and ternary weights: numbers worked out by hand, independent references, and layers of every kind."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from contract_rows import Mixed, Sequences, Task
from lightning.pytorch import Trainer
from sklearn.datasets import load_digits
from torch import nn

import lightning_compress as lc
from lightning_compress import Binarization, Schedule, Select, Ternarization
from lightning_compress.quantization.binary.callbacks import METHODS
from lightning_compress.quantization.binary.functions import (
    binarize_inputs,
    glorot_bound,
    input_scale,
    loss_aware_scale,
    mean_by_filter,
    random_signs,
    signs,
    ternary_levels,
    ternary_scale,
)
from lightning_compress.quantization.binary.layers import (
    BinaryInputConv2d,
    LossAwareWeight,
    ScaledSignWeight,
    SignWeight,
    TernaryWeight,
    binary_inputs,
)

QUIET = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "enable_progress_bar": False}
W = torch.tensor([[0.5, -1.0], [2.0, 0.0]])


def trainer(*callbacks, **more):
    return Trainer(max_epochs=1, accelerator="cpu", callbacks=list(callbacks), **QUIET, **more)


# --- values and gradients, by hand


def test_four_weights_by_hand():
    assert SignWeight()(W).tolist() == [[1.0, -1.0], [1.0, 1.0]]
    assert ScaledSignWeight(2)(W).tolist() == [[0.75, -0.75], [1.0, 1.0]]
    assert LossAwareWeight(torch.tensor(0.25))(W).tolist() == [[0.25, -0.25], [0.25, 0.25]]
    # the mean magnitude is 0.875, the threshold 0.6125: the scale is the mean of 1 and 2
    assert TernaryWeight()(W).tolist() == [[0.0, -1.5], [1.5, 0.0]]
    assert loss_aware_scale(W, torch.tensor([[1.0, 0.0], [3.0, 4.0]])).item() == pytest.approx(6.5 / 8)
    assert loss_aware_scale(W, torch.zeros(2, 2)).item() == W.abs().mean().item()


@pytest.mark.parametrize(
    ("part", "slope"),
    [
        (SignWeight(), [[1.0, 1.0], [1.0, 1.0]]),
        (ScaledSignWeight(2), [[0.5 + 0.75, 0.5 + 0.75], [0.5, 0.5 + 1.0]]),  # 1/n + alpha where |w| <= 1
        (LossAwareWeight(torch.tensor(2.0)), [[1.0, 1.0], [1.0, 1.0]]),
        (TernaryWeight(), [[1.0, 1.0], [1.0, 1.0]]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_gradients_reach_the_real_weights_as_the_papers_say(part, slope):
    weight = W.double().requires_grad_()
    gradient = torch.tensor([[1.0, -2.0], [3.0, 4.0]], dtype=torch.float64)
    part(weight).backward(gradient)
    assert torch.allclose(weight.grad, gradient * torch.tensor(slope, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("part", [SignWeight, lambda amount: ScaledSignWeight(2, amount=amount), TernaryWeight])
def test_an_amount_between_blends_values_and_gradients(part):
    few, half = part(amount=1.0), part(amount=0.25)
    a, b = W.clone().requires_grad_(), W.clone().requires_grad_()
    few(a).sum().backward()
    half(b).sum().backward()
    assert torch.allclose(half(W), 0.75 * W + 0.25 * few(W))
    assert torch.allclose(b.grad, 0.75 + 0.25 * a.grad)
    assert torch.equal(part(amount=0.0)(W), W)


def test_signs_are_drawn_with_the_probability_of_the_paper():
    x = torch.tensor([-2.0, -0.5, 0.0, 0.8, 1.0]).repeat(20_000, 1)
    drawn = random_signs(x, torch.Generator().manual_seed(0))
    assert set(drawn.unique().tolist()) == {-1.0, 1.0}
    up = (drawn > 0).double().mean(0)
    assert torch.allclose(up, torch.tensor([0.0, 0.25, 0.5, 0.9, 1.0]).double(), atol=0.015)


def test_glorot_counts_kernels_on_both_sides():
    assert glorot_bound(torch.zeros(10, 5, 1, 1)) == pytest.approx((1.5 / 15) ** 0.5)
    assert glorot_bound(torch.zeros(10, 5, 3, 3)) == pytest.approx((1.5 / 135) ** 0.5)
    part = SignWeight(stochastic=True, bound=0.1)
    assert torch.equal(part(torch.tensor([-0.1, 0.1]).repeat(50)), torch.tensor([-1.0, 1.0]).repeat(50))


def test_stochastic_weights_are_drawn_in_training_and_decided_in_evaluation():
    part = SignWeight(stochastic=True)
    weight = torch.full((64,), 0.1)
    assert not torch.equal(part(weight), part(weight))
    assert torch.equal(part.eval()(weight), torch.ones(64))


def test_the_scale_of_a_filter_is_the_best_one():
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    best = ScaledSignWeight(4)(weight)
    for factor in (0.9, 1.1):
        assert (weight - best).square().sum() < (weight - factor * best).square().sum()
    wanted = np.abs(weight.numpy()).mean(axis=(1, 2, 3))
    assert np.allclose(best.abs().amax((1, 2, 3)).numpy(), wanted, rtol=1e-6)


@pytest.mark.parametrize("groups", [1, 2])
def test_filters_of_transposed_convolutions_are_their_outputs(groups):
    layer = nn.ConvTranspose2d(4, 6, 3, groups=groups)
    means = mean_by_filter(layer.weight.detach(), groups, transposed=True)
    for output in range(6):
        block, inside = divmod(output, 6 // groups)
        rows = slice(block * 4 // groups, (block + 1) * 4 // groups)
        assert torch.allclose(means[rows, inside], layer.weight.detach()[rows, inside].mean())
    assert (means * torch.ones_like(layer.weight)).shape == layer.weight.shape


def test_ternary_threshold_and_scale_minimise_the_error_for_their_levels():
    weight = torch.randn(500, generator=torch.Generator().manual_seed(2))
    levels = ternary_levels(weight)
    scale = ternary_scale(weight, levels)
    error = (weight - scale * levels).square().sum()
    assert error < (weight - 1.05 * scale * levels).square().sum()
    assert ternary_levels(torch.zeros(3)).tolist() == [0, 0, 0]
    assert ternary_scale(torch.zeros(3), torch.zeros(3)).item() == 0


# --- binary inputs


def test_input_gradients_pass_within_one():
    x = torch.tensor([-1.5, -1.0, 0.3, 1.01], requires_grad=True)
    binarize_inputs(x).backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 0.0]


GEOMETRIES = [
    {},
    {"stride": 2, "padding": 1},
    {"padding": "same", "dilation": 2},
    {"groups": 2, "padding": (2, 1), "bias": False},
    {"groups": 4},
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_xnor_convolution_equals_its_definition(geometry):
    torch.manual_seed(0)
    dense = nn.Conv2d(4, 8, (3, 3), **geometry)
    layer = binary_inputs(dense, scaled=True)
    assert layer.weight is dense.weight
    x = torch.randn(2, 4, 9, 8)
    scale = input_scale(x, layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups)
    plain = F.conv2d(signs(x), dense.weight, None, dense.stride, dense.padding, dense.dilation, dense.groups)
    wanted = plain * scale.repeat_interleave(8 // dense.groups, 1)
    if dense.bias is not None:
        wanted = wanted + dense.bias[:, None, None]
    assert torch.allclose(layer(x), wanted, atol=1e-5)
    assert torch.allclose(layer(x[0]), wanted[0], atol=1e-5)
    position = x[1, : 4 // dense.groups].abs().mean(0)  # the first group, by hand at an inner position
    height, width = (1, 1) if not geometry else (None, None)
    if height is not None:
        assert scale[1, 0, height, width].item() == pytest.approx(position[1:4, 1:4].mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("dense", "shape"),
    [(nn.Conv1d(4, 4, 3), (2, 4, 9)), (nn.Conv3d(2, 4, 2), (2, 2, 4, 5, 6)), (nn.Linear(6, 3), (2, 5, 6))],
)
def test_binary_inputs_of_other_layers(dense, shape):
    x = torch.randn(shape)
    layer = binary_inputs(copy.deepcopy(dense))
    assert torch.equal(layer(x), dense(signs(x)))
    assert layer.state_dict().keys() == dense.state_dict().keys() | {"amount"}
    real = binary_inputs(copy.deepcopy(dense), scaled=True, amount=0.0)
    assert torch.allclose(real(x), dense(x), atol=1e-6)


def test_layers_that_cannot_take_signs_say_so():
    with pytest.raises(lc.ConfigurationError, match="padding_mode 'circular'"):
        binary_inputs(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"))
    with pytest.raises(lc.ConfigurationError, match="already"):
        binary_inputs(binary_inputs(nn.Linear(2, 2)))
    net = nn.Sequential(nn.ConvTranspose2d(1, 2, 3), nn.Conv2d(2, 2, 3))
    with pytest.raises(lc.SelectionError, match="ConvTranspose2d cannot be binarized"):
        lc.compress(net, Binarization("xnor", select=Select(include="0")))


# --- as a callback


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_leaves_two_values_a_filter(method, tmp_path):
    torch.manual_seed(0)
    model = Task("Mixed")
    callback = Binarization(method, select=Select(not_last=True))
    trainer(callback).fit(model)
    final = callback.compressed
    for name in ("stem", "depthwise", "grouped"):
        weight = final.get_submodule(f"net.{name}").weight
        assert all(len(row.abs().unique()) == 1 for row in weight.detach().flatten(1))
    assert len(final.net.head.weight.unique()) > 3
    lc.save_compressed(final, tmp_path / "file.safetensors")
    bare = lc.load_compressed(Task("Mixed"), tmp_path / "file.safetensors").eval()
    x = torch.rand(4, 1, 6, 6)
    assert torch.equal(bare(x), final.eval()(x))
    assert isinstance(bare.net.stem, BinaryInputConv2d) == (method in ("xnor", "binary_net"))


def test_real_weights_are_clipped_for_binary_connect_only():
    glorot = (1.5 / (16 + 12)) ** 0.5
    for callback, most in ((Binarization(), glorot), (Binarization(bound=1), 1.0), (Binarization("bwn"), 5.0)):
        model = Task("MLP")
        nn.init.constant_(model.net.layers[3].weight, 5.0)
        trainer(callback, limit_train_batches=2).fit(model)
        real = model.net.layers[3].parametrizations.weight.original
        assert real.abs().max().item() == pytest.approx(most, abs=0.1 if most == 5 else 1e-6)


def test_the_loss_aware_scale_follows_the_optimizer():
    model = Task("MLP")
    run = trainer(Binarization("loss_aware"), limit_train_batches=3)
    run.fit(model)
    part = model.net.layers[3].parametrizations.weight
    moment = run.optimizers[0].state[part.original]["exp_avg_sq"]
    assert part[0].scale.item() == pytest.approx(loss_aware_scale(part.original, moment.sqrt()).item(), rel=1e-6)
    assert part[0].scale.item() != pytest.approx(part.original.abs().mean().item(), rel=1e-3)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adamax])
def test_the_loss_aware_method_refuses_an_optimizer_without_second_moments(make):
    class Plain(Task):
        def configure_optimizers(self):
            return make(self.parameters(), lr=0.1)

    model = Plain("MLP")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(lc.ConfigurationError, match=rf"second moment.*is trained by {make.__name__}.*'bwn'"):
        trainer(Binarization("loss_aware")).fit(model)
    after = {key.replace("parametrizations.weight.original", "weight"): v for key, v in model.state_dict().items()}
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_a_rising_schedule_trains_towards_few_values():
    callback = Ternarization(schedule=Schedule(1.0, end="80%", shape="linear", every={"step": 1}))
    model = Task("MLP")
    trainer(callback).fit(model)
    strengths = [entry["strength"] for entry in callback.history]
    assert strengths == sorted(strengths)
    assert strengths[0] < 0.5 < strengths[-1] == 1.0
    assert len(callback.compressed.net.layers[3].weight.unique()) == 3
    with pytest.raises(lc.ConfigurationError, match="`final` of the schedule must be 1"):
        Ternarization(schedule=Schedule(0.5))


def test_shared_parametrized_and_frozen_weights():
    net = Sequences()
    nn.utils.parametrizations.weight_norm(net.conv)
    callback = Binarization("bwn", select=Select())
    compressed = lc.compress(net, callback)
    assert "decode" not in callback.layers(compressed)  # its weight is the embedding's
    assert "conv" not in callback.layers(compressed)
    assert torch.equal(compressed.embed.weight, net.embed.weight)
    assert len(compressed.frozen.weight[0].abs().unique()) == 1
    with pytest.raises(lc.SelectionError, match="shared with another module"):
        lc.compress(net, Binarization("bwn", select=Select(include="decode")))
    with pytest.raises(lc.SelectionError, match="parametrized by something else"):
        lc.compress(net, Binarization("bwn", select=Select(include="conv")))
    hooked = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    nn.utils.prune.l1_unstructured(hooked[1], "weight", 0.5)  # a hook computes the weight
    assert list(lc.compress(hooked, binary := Binarization("bwn", select=Select())).children())
    assert binary.selected == ("0",)


def test_compress_binarizes_a_trained_model_at_once():
    net = Mixed()
    small = lc.compress(net, Ternarization(select=Select(include=["stem", "depthwise"])))
    assert len(small.stem.weight.unique()) == 3
    assert torch.equal(small.grouped.weight, net.grouped.weight)
    assert small.state_dict().keys() - {"_compression_journal"} == net.state_dict().keys()


@pytest.mark.parametrize("callback", [Binarization(select=Select()), Ternarization(select=Select())])
def test_weights_that_are_no_numbers_are_named(callback):
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight.data[0, 0] = float("nan")
    with pytest.raises(lc.ConfigurationError, match=r"`1\.weight` holds NaN or infinity"):
        lc.compress(net, callback)


def test_half_precision_weights_keep_their_type():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(torch.bfloat16)
    for callback in (Binarization("xnor", select=Select()), Ternarization(select=Select())):
        small = lc.compress(net, callback)
        assert small[1].weight.dtype == torch.bfloat16
        assert small(torch.ones(2, 4, dtype=torch.bfloat16)).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "binaryconnect"}, "did you mean 'binary_connect'"),
        ({"method": "bwn", "stochastic": True}, "`stochastic` goes with"),
        ({"bound": 0}, "`bound` must be a finite number above 0"),
        ({"bound": float("inf")}, "`bound` must be a finite number above 0, got inf"),
        ({"stochastic": "no"}, "`stochastic` must be True or False, got 'no'"),
        ({"method": "bwn", "bound": 1.0}, "`bound` goes with 'binary_connect' and 'binary_net' only, got 'bwn'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(lc.ConfigurationError, match=message):
        Binarization(**arguments)
    with pytest.raises(lc.ConfigurationError, match="`threshold`"):
        Ternarization(threshold=0)


@pytest.mark.parametrize(("stochastic", "rate", "steps", "least"), [(False, 0.01, 60, 0.9), (True, 0.01, 60, 0.9)])
def test_real_weights_learn_digits_behind_binary_ones(stochastic, rate, steps, least):
    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    torch.manual_seed(0)
    net = nn.Sequential(*_block(64, 128), *_block(128, 128), nn.Linear(128, 10))
    few = lc.compress(net, _Keep("binary_connect", stochastic, select=Select(not_last=True)))
    optimizer = torch.optim.Adam(few.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(few.train()(x[:1400]), y[:1400]).backward()
        optimizer.step()
        for index in (0, 3):
            part = few[index].parametrizations.weight
            part.original.data.clamp_(-part[0].bound, part[0].bound)
    assert float((few.eval()(x[1400:]).argmax(1) == y[1400:]).float().mean()) > least


class _Keep(Binarization):
    """Leaves the real weights in place, to be trained further by hand."""

    def finalize(self, layers):
        return ()


def _block(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()
