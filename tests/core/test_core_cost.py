import copy
import warnings

import pytest
import torch
import torchvision
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.compile import from_compiled
from torch import nn
from torch.nn.utils import parametrize, prune

from lightning_compress.core.copies import structure_copy
from lightning_compress.core.cost import count_macs, count_nonzero, count_parameters
from lightning_compress.core.errors import ConfigurationError


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.head = nn.Linear(3, 7)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.embed(tokens))


class Functional(nn.Module):
    """No layers: a parameter, a matrix product and attention called as functions."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))

    def forward(self, x):
        y = x @ self.weight.T
        return nn.functional.scaled_dot_product_attention(y, y, y)


class Masked(nn.Module):
    """Branches on data, which no meta tensor can answer."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.lstm = nn.LSTM(4, 8, batch_first=True)

    def forward(self, x):
        return self.lstm(self.fc(x))[0] if float(x.sum()) > 0 else x


class Lit(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        self.example_input_array = torch.randn(2, 4)

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize(
    ("name", "millions"), [("resnet18", 1814.07), ("mobilenet_v2", 300.77), ("vit_b_16", 17563.83)]
)
def test_known_networks(name, millions):
    with torch.device("meta"):
        model = getattr(torchvision.models, name)().eval()
    counted = count_macs(model, torch.zeros(1, 3, 224, 224))
    assert counted.total / 1e6 == pytest.approx(millions, abs=0.01)
    assert sum(counted.per_layer.values()) == counted.total


def test_attention_in_evaluation_mode_is_not_lost_to_fused_kernels():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    projections, feed_forward, attention = 16 * 48 + 16 * 16, 2 * 16 * 32, 2 * 5 * 5 * 16
    assert count_macs(layer, torch.randn(3, 5, 16)).total == 3 * (5 * (projections + feed_forward) + attention)


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_layers(kind, gates):
    layer = kind(8, 16, 2, batch_first=True, bidirectional=True).eval()
    first, second = gates * 16 * (8 + 16), gates * 16 * (32 + 16)
    assert count_macs(layer, torch.randn(3, 5, 8)).total == 3 * 5 * 2 * (first + second)


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (nn.Linear(8, 4), (3, 8), 3 * 8 * 4),
        (nn.Conv1d(4, 8, 3), (2, 4, 10), 2 * 8 * 8 * 4 * 3),
        (nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), (1, 4, 8, 8), 16 * 8 * 2 * 9),
        (nn.Conv3d(2, 3, 3), (1, 2, 5, 5, 5), 27 * 3 * 2 * 27),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (1, 4, 5, 5), 25 * 4 * 3 * 9),
        (nn.LSTMCell(3, 4), (2, 3), 2 * 16 * 7),
        (nn.ReLU(), (2, 3), 0),
    ],
)
def test_hand_counted_layers(layer, shape, macs):
    assert count_macs(layer, torch.randn(shape)).total == macs


def test_functional_operations_belong_to_the_module_that_calls_them():
    counted = count_macs(nn.Sequential(nn.Linear(4, 4), Functional()), torch.randn(2, 5, 4))
    assert counted.per_layer == {"0": 2 * 5 * 16, "1": 2 * (5 * 24 + 2 * 25 * 6)}


def test_a_shared_module_is_counted_at_each_call():
    shared = nn.Linear(4, 4)
    counted = count_macs(nn.Sequential(shared, nn.ReLU(), shared), torch.randn(1, 4))
    assert counted.total == 32
    assert counted.per_layer == {"0": 32}


def test_a_model_that_branches_on_data_is_counted_on_a_real_copy():
    model = Masked()
    counted = count_macs(model, torch.ones(2, 3, 4))
    assert counted.per_layer == {"fc": 2 * 3 * 16, "lstm": 2 * 3 * 4 * 8 * 12}
    assert counted.reason == ""


def test_a_failing_forward_gives_a_reason():
    counted = count_macs(nn.Linear(3, 2), torch.zeros(1, 4))
    assert counted.total is None
    assert "on meta" in counted.reason
    assert "on cpu" in counted.reason


def test_keyword_and_several_inputs():
    class Two(nn.Module):
        def forward(self, a, b):
            return a @ b

    a, b = torch.zeros(2, 3), torch.zeros(3, 4)
    assert count_macs(Two(), (a, b)).total == count_macs(Two(), {"b": b, "a": a}).total == 24


@pytest.mark.parametrize(
    "build", [Masked, Lit, lambda: nn.Sequential(nn.Linear(4, 3), nn.Dropout(), nn.BatchNorm1d(3))]
)
def test_counting_changes_nothing(build):
    model = build().train()
    next(model.children()).eval()
    before = copy.deepcopy(model.state_dict())
    modes = [part.training for part in model.modules()]
    parts, hooks = list(model.modules()), [len(part.state_dict()) for part in model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    inputs = torch.ones(2, 3, 4) if isinstance(model, Masked) else torch.ones(2, 4)
    assert count_macs(model, inputs).total
    assert torch.equal(torch.rand(2), expected)
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    assert list(model.modules()) == parts
    assert [len(part.state_dict()) for part in model.modules()] == hooks
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_lightning_module_does_not_drag_its_trainer_along(tmp_path):
    model = Lit()
    model.trainer = Trainer(default_root_dir=tmp_path, logger=False, accelerator="cpu", enable_model_summary=False)
    model.keeper = model.trainer

    def refuse(_memo):
        raise AssertionError("the trainer was copied")

    vars(model.trainer)["__deepcopy__"] = refuse
    assert count_macs(model, model.example_input_array).total == 24
    assert model.trainer is model.keeper


def test_non_leaf_weights_of_old_style_pruning_are_no_obstacle():
    layer = nn.Linear(4, 4)
    prune.l1_unstructured(layer, "weight", amount=0.5)
    layer(torch.ones(1, 4))
    assert count_macs(nn.Sequential(layer), torch.ones(2, 4)).per_layer == {"0": 32}


def test_compiled_modules_count_under_their_own_paths():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    compiled = nn.Sequential(torch.compile(model, backend="eager"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        counted = count_macs(compiled, torch.zeros(1, 4))
    assert counted.per_layer == {"0.0": 16, "0.1": 8}
    assert set(count_parameters(compiled).per_layer) == {"0.0", "0.1"}


def test_a_copy_of_a_compiled_module_runs_itself():
    model = Lit()
    model.compile(backend="eager")
    copied = structure_copy(model, torch.zeros_like)
    assert not copied(model.example_input_array).any()
    assert model(model.example_input_array).any()
    assert count_macs(model, model.example_input_array).per_layer == {"net.0": 24}


def test_a_copy_of_a_module_that_lightning_took_out_of_compile_runs_itself():
    model = Lit()
    from_compiled(torch.compile(model, backend="eager"))  # as Trainer.fit(torch.compile(model)) does
    copied = structure_copy(model, torch.zeros_like)
    assert not copied(model.example_input_array).any()
    assert model(model.example_input_array).any()
    assert "forward" in vars(model)
    assert count_macs(model, model.example_input_array).per_layer == {"net.0": 24}


def test_parameters_tied_frozen_and_zero():
    model = Tied()
    nn.init.ones_(model.embed.weight)
    nn.init.zeros_(model.head.bias)
    model.embed.weight.requires_grad_(False)
    counted = count_parameters(model)
    assert (counted.total, counted.nonzero) == (28, 21)
    assert counted.per_layer == {"embed": (21, 21), "head": (7, 0)}


def test_parameters_against_torch():
    model = torchvision.models.resnet18()
    counted = count_parameters(model)
    assert counted.total == sum(p.numel() for p in model.parameters()) == 11_689_512
    assert counted.nonzero == sum(int((p != 0).sum()) for p in model.parameters())
    assert sum(total for total, _ in counted.per_layer.values()) == counted.total


def test_parametrized_weights_count_where_they_live():
    layer = nn.Linear(3, 2)
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    assert count_parameters(layer).per_layer == {"": (2, 2), "parametrizations.weight": (6, 6)}


def test_nonzero_of_unusual_tensors():
    assert count_nonzero(torch.zeros(3, device="meta")) is None
    assert count_nonzero(torch.tensor([0.0, 1.0]).to(torch.float8_e4m3fn)) == 1
    assert count_nonzero(torch.tensor([0j, 1j])) == 1
    assert count_parameters(nn.Linear(2, 2, device="meta")).nonzero is None


def test_a_lazy_layer_is_named():
    with pytest.raises(ConfigurationError, match=r"'0.weight' is uninitialized"):
        count_parameters(nn.Sequential(nn.LazyLinear(3)))
    assert "lazy" in count_macs(nn.LazyLinear(3), torch.zeros(1, 2)).reason
