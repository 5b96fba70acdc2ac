"""Fixed point: numbers worked out by hand, the expectation of stochastic rounding, and training with it."""

import pytest
import torch
import torch.nn.functional as F
from contract_rows import Sequences, Task, dataset
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from sklearn.datasets import load_digits
from torch import nn

import lightning_compress as lc
from lightning_compress import FixedPointTraining, Select
from lightning_compress.core.hooks import forget_undo, keep_undo
from lightning_compress.quantization.fixed_point.functions import FixedPoint, round_to
from lightning_compress.quantization.fixed_point.layers import fixed_point_output

QUIET = {"logger": False, "enable_model_summary": False, "enable_progress_bar": False, "accelerator": "cpu"}


def on_grid(x, form):
    x = x.detach().double()
    return torch.equal(x, (x / form.step).round().mul(form.step).clamp(form.least, form.most))


def test_numbers_by_hand():
    form = FixedPoint(3, 2)  # multiples of 1/4 from -4 to 3.75
    assert (form.step, form.least, form.most, str(form)) == (0.25, -4.0, 3.75, "<3,2>")
    x = torch.tensor([0.1, 0.125, 0.126, -0.125, -0.1, 3.9, 100.0, -4.1, -100.0, 1.25])
    assert round_to(x, form).tolist() == [0.0, 0.0, 0.25, -0.25, 0.0, 3.75, 3.75, -4.0, -4.0, 1.25]
    strange = round_to(torch.tensor([float("inf"), -float("inf"), float("nan")]), form)
    assert strange[:2].tolist() == [3.75, -4.0]
    assert strange[2].isnan()


def test_stochastic_rounding_is_right_on_average_and_keeps_what_is_rounded():
    form = FixedPoint(2, 4)
    x = torch.linspace(-1.9, 1.8, 41)
    draws = round_to(x.repeat(20_000, 1), form, "stochastic", torch.Generator().manual_seed(0))
    assert on_grid(draws, form)
    assert (draws - x).abs().max() < form.step
    assert torch.allclose(draws.mean(0), x, atol=4 * form.step / 2 / 20_000**0.5 + 1e-4)
    assert torch.equal(round_to(draws, form, "stochastic"), draws)


@pytest.mark.parametrize("bits", [(1, 23), (8, 16), (2, 14)])
def test_every_number_of_the_format_is_exact(bits):
    form = FixedPoint(*bits)
    x = (torch.randint(-(2**23), 2**23, (1000,)).double() / 2**23 * -form.least).float()
    once = round_to(x, form)
    assert on_grid(once, form)
    for rounding in ("nearest", "stochastic"):
        assert torch.equal(round_to(once, form, rounding), once)


def test_activations_and_errors_are_rounded_each_in_its_format():
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, 1.0)
    fixed_point_output(layer, [3, 1], [2, 3], "nearest")
    x = torch.tensor([[0.8], [-2.9]], requires_grad=True)
    y = layer(x)
    assert y.flatten().tolist() == [1.0, -3.0]
    y.backward(torch.tensor([[0.3], [9.0]]))
    assert x.grad.flatten().tolist() == [0.25, 1.875]
    with pytest.raises(lc.ConfigurationError, match="already"):
        fixed_point_output(layer)


def test_evaluation_rounds_to_the_nearest():
    layer = fixed_point_output(nn.Identity(), [2, 1], None, "stochastic")
    x = torch.full((100,), 0.3)
    assert len(layer(x).unique()) == 2
    assert layer.eval()(x).unique().tolist() == [0.5]
    assert fixed_point_output(nn.LSTM(2, 2), [2, 2])(torch.randn(3, 1, 2))[0].mul(4).frac().abs().max() == 0


class Grid(Callback):
    """Checks weights after every batch, and gradients before every step."""

    def __init__(self, form):
        self.form, self.seen = form, 0

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        for parameter in pl_module.net.layers[1].parameters():
            if parameter.grad is not None:
                assert on_grid(parameter.grad, self.form)
                self.seen += 1

    def on_train_batch_end(self, trainer, pl_module, *_):
        assert on_grid(pl_module.net.layers[1].weight, self.form)


def test_weights_and_gradients_stay_in_the_format_throughout():
    form = FixedPoint(4, 10)
    bits = [form.integer_bits, form.fraction_bits]
    watch = Grid(form)
    model = Task("MLP")
    trainer = Trainer(
        max_epochs=2,
        callbacks=[FixedPointTraining(bits, bits, bits), watch],
        enable_checkpointing=False,
        accumulate_grad_batches=2,
        **QUIET,
    )
    trainer.fit(model)
    assert watch.seen > 0


@pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training")
def test_averaged_weights_are_saved_in_the_format(tmp_path):
    callback = FixedPointTraining([2, 6], None, None)
    saver = ModelCheckpoint(tmp_path, save_last=True)
    trainer = Trainer(max_epochs=2, callbacks=[EMAWeightAveraging(decay=0.7), callback, saver], **QUIET)
    trainer.fit(Task("MLP"))
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert on_grid(state["net.layers.1.weight"], FixedPoint(2, 6))


def _digits(callback, epochs=10):
    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    torch.manual_seed(0)

    class Digits(Task):
        def __init__(self):
            super().__init__("MLP")
            self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.02)

        def train_dataloader(self):
            return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x[:1400], y[:1400]), batch_size=100)

    model = Digits()
    callbacks = [] if callback is None else [callback]
    Trainer(max_epochs=epochs, callbacks=callbacks, limit_val_batches=0, enable_checkpointing=False, **QUIET).fit(model)
    return float((model.eval()(x[1400:]).argmax(1) == y[1400:]).float().mean())


def test_stochastic_rounding_learns_where_nearest_stalls():
    real = _digits(None)
    forms = ([4, 8], [6, 8], [4, 10])
    random = _digits(FixedPointTraining(*forms))
    nearest = _digits(FixedPointTraining(*forms, rounding="nearest"))
    assert random > real - 0.05
    assert nearest < 0.3 < 0.6 < real


def test_compress_rounds_a_trained_model_to_the_nearest(tmp_path):
    net = Sequences()
    nn.utils.parametrizations.weight_norm(net.conv)
    callback = FixedPointTraining([3, 5], [4, 4], None)
    small = lc.compress(net.eval(), callback)
    assert torch.equal(small.head.weight, round_to(net.head.weight, FixedPoint(3, 5)))
    assert torch.equal(small.conv.weight, net.conv.weight)
    x = dataset().tensors[0]
    assert on_grid(small(x), FixedPoint(4, 4))
    lc.save_compressed(small, tmp_path / "file.safetensors")
    bare = Sequences().eval()
    nn.utils.parametrizations.weight_norm(bare.conv)
    assert torch.equal(lc.load_compressed(bare, tmp_path / "file.safetensors")(x), small(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": (0, 8)}, "`weights`: `integer_bits` must be an int >= 1"),
        ({"weights": (8, 17)}, "at most 24"),
        ({"activations": 8}, r"`activations` must be \[integer bits, fraction bits\]"),
        ({"gradients": (2, 4, 1)}, "`gradients` must be"),
        ({"rounding": "neer_est"}, "did you mean 'nearest'"),
        ({"seed": 1.5}, "`seed` must be an int"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(lc.ConfigurationError, match=message):
        FixedPointTraining(**arguments)


def test_weights_that_are_no_numbers_are_named():
    net = nn.Sequential(nn.Linear(2, 2))
    net[0].weight.data[0, 0] = float("inf")  # it would become the largest number of the format
    with pytest.raises(lc.ConfigurationError, match=r"`0\.weight` holds NaN or infinity"):
        lc.compress(net, FixedPointTraining(activations=None, gradients=None))


def test_a_model_of_parametrized_weights_alone_is_refused():
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    with pytest.raises(lc.SelectionError, match="no layer is left to round"):
        lc.compress(net, FixedPointTraining(select=Select()))


def test_gradients_under_a_loss_scale_are_rounded_as_they_are():
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.grad = torch.tensor([[0.3, -0.3]]) * 1024
    FixedPointTraining(gradients=[2, 2], rounding="nearest").before_step({"fc": layer}, None, 1024.0)
    assert layer.weight.grad.div(1024).tolist() == [[0.25, -0.25]]
    assert F.linear(torch.ones(1, 2), layer.weight.grad).item() == 0.0


def test_a_checkpoint_of_another_format_takes_the_first_edit_back():
    saved = lc.compress(nn.Sequential(nn.Linear(2, 2)), FixedPointTraining([2, 6], [4, 1]))
    net = nn.Sequential(nn.Linear(2, 2))
    keep_undo(net)
    lc.compress(net, FixedPointTraining([2, 6], [4, 4]), inplace=True)
    net.load_state_dict(saved.state_dict())
    forget_undo(net)
    x = torch.randn(5, 2)
    assert torch.equal(net.eval()(x), saved.eval()(x))
    assert on_grid(net(x), FixedPoint(4, 1))
