"""The four verbs, their registry, and what a failing edit leaves behind: nothing."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.hooks import journal_of
from lightning_compress.core.journal import Edit
from lightning_compress.core.verbs import apply, compact_ranges, expand_ranges, register_kind, registered_kinds


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, value: Tensor) -> Tensor:
        return value * self.factor


class Factors(nn.Module):
    def __init__(self, inputs: int, rank: int, outputs: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))

    def to_dense(self) -> nn.Linear:
        dense = nn.Linear(self.a.in_features, self.b.out_features)
        dense.weight = nn.Parameter(self.b.weight.detach() @ self.a.weight.detach())
        dense.bias = self.b.bias
        return dense


@register_kind("replace", "verbs-test-factors")
def build_factors(layer: nn.Module, rank: int) -> nn.Module:
    return Factors(layer.in_features, rank, layer.out_features)


@register_kind("parametrize", "verbs-test-scale")
def build_scale(layer: nn.Module, factor: float) -> nn.Module:
    return Scale(factor)


@register_kind("replace", "verbs-test-broken")
def build_broken(layer: nn.Module) -> nn.Module:
    raise RuntimeError("no such luck")


@register_kind("replace", "verbs-test-nothing")
def build_nothing(layer: nn.Module) -> nn.Module:
    return None


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def test_replace_keeps_the_mode_and_records_itself() -> None:
    net = mlp().eval()
    edit = Edit("replace", "0", "verbs-test-factors", {"rank": 2})
    apply(net, edit)
    assert isinstance(net[0], Factors)
    assert not net[0].training
    assert journal_of(net).edits == (edit,)
    assert net(torch.ones(1, 4)).shape == (1, 3)


def test_replace_reaches_shared_modules_under_every_name() -> None:
    net = nn.ModuleDict({"a": nn.Linear(4, 4)})
    net["b"], net["c"] = net["a"], nn.Sequential(net["a"])
    apply(net, Edit("replace", "b", "verbs-test-factors", {"rank": 2}))
    assert isinstance(net["a"], Factors)
    assert net["a"] is net["b"] is net["c"][0]


def test_bake_puts_the_dense_layer_back() -> None:
    net, x = mlp(), torch.randn(5, 4)
    apply(net, Edit("replace", "0", "verbs-test-factors", {"rank": 2}))
    before = net(x)
    apply(net, Edit("bake", "0"))
    assert type(net[0]) is nn.Linear
    torch.testing.assert_close(net(x), before)


def test_parametrize_and_bake_the_tensor() -> None:
    net = mlp()
    weight = net[0].weight.detach().clone()
    apply(net, Edit("parametrize", "0", "verbs-test-scale", {"tensor": "weight", "factor": 2.0}))
    assert torch.equal(net[0].weight, 2 * weight)
    apply(net, Edit("bake", "0", config={"tensor": "weight"}))
    assert not parametrize.is_parametrized(net[0])
    assert torch.equal(net[0].weight, 2 * weight)
    assert len(journal_of(net)) == 2


def slice_edit(path: str, tensors: dict[str, Any], **attributes: int) -> Edit:
    return Edit("slice", path, config={"tensors": tensors, "attributes": attributes})


def test_slice_linears_computes_with_the_kept_units() -> None:
    net, x = mlp(), torch.randn(5, 4)
    weight0, bias0, weight2, bias2 = (p.detach().clone() for p in net.parameters())
    keep = [0, 2, 3, 5]
    apply(net, slice_edit("0", {"weight": {"0": [0, [2, 3], 5]}, "bias": {"0": [0, [2, 3], 5]}}, out_features=4))
    apply(net, slice_edit("2", {"weight": {"1": [0, [2, 3], 5]}}, in_features=4))
    expected = torch.relu(x @ weight0[keep].T + bias0[keep]) @ weight2[:, keep].T + bias2
    torch.testing.assert_close(net(x), expected)
    assert (net[0].out_features, net[2].in_features) == (4, 4)
    assert net[0].weight.is_contiguous()
    assert isinstance(net[0].weight, nn.Parameter)


def test_slice_keeps_requires_grad_dtype_and_buffers_as_buffers() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).double()
    net[0].weight.requires_grad_(False)
    net[1].running_mean.copy_(torch.arange(8))
    apply(net, slice_edit("0", {"weight": {"0": [1, 7]}, "bias": {"0": [1, 7]}}, out_channels=2))
    kept = {"0": [1, 7]}
    names = ("weight", "bias", "running_mean", "running_var")
    apply(net, slice_edit("1", dict.fromkeys(names, kept), num_features=2))
    assert (net[0].weight.requires_grad, net[0].bias.requires_grad, net[0].weight.dtype) == (False, True, torch.float64)
    assert net[1].running_mean.tolist() == [1.0, 7.0]
    assert set(dict(net[1].named_buffers())) == {"running_mean", "running_var", "num_batches_tracked"}
    assert net(torch.ones(2, 3, 4, 4, dtype=torch.float64)).shape == (2, 2, 2, 2)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_slice_keeps_the_memory_layout(layout: torch.memory_format) -> None:
    net = nn.Sequential(nn.Conv2d(4, 6, 3)).to(memory_format=layout)
    apply(net, Edit("slice", "0", config={"tensors": {"weight": {"0": [0, 2, 5], "1": [1, 3]}}}))
    assert net[0].weight.shape == (3, 2, 3, 3)
    assert net[0].weight.is_contiguous(memory_format=layout)


def test_slice_two_dimensions_at_once() -> None:
    net = mlp()
    weight = net[0].weight.detach().clone()
    apply(net, slice_edit("0", {"weight": {"0": [1, 4], "1": [[0, 2]]}}))
    assert torch.equal(net[0].weight, weight[[1, 4]][:, :3])


def test_slice_the_inputs_of_an_lstm() -> None:
    net = nn.Sequential(nn.LSTM(4, 3))
    reference = copy.deepcopy(net[0])
    apply(net, slice_edit("0", {"weight_ih_l0": {"1": [0, 2]}}, input_size=2))
    x = torch.randn(5, 1, 2)
    padded = torch.zeros(5, 1, 4)
    padded[..., [0, 2]] = x
    torch.testing.assert_close(net[0](x)[0], reference(padded)[0])


HOSTILE: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"weight": {"0": [6]}}, {}),
    ({"weight": {"0": [-1]}}, {}),
    ({"weight": {"0": []}}, {}),
    ({"weight": {"0": [[0, 10**12]]}}, {}),
    ({"weight": {"0": [[0, 5]] * 6}}, {}),
    ({"weight": {"0": [0, 0]}}, {}),
    ({"weight": {"0": [3, 1]}}, {}),
    ({"weight": {"0": [[4, 2]]}}, {}),
    ({"weight": {"0": [[0, 1, 5]]}}, {}),
    ({"weight": {"0": [[]]}}, {}),
    ({"weight": {"0": ["a"]}}, {}),
    ({"weight": {"0": [0.0]}}, {}),
    ({"weight": {"0": None}}, {}),
    ({"weight": {"9": [0]}}, {}),
    ({"weight": {"x": [0]}}, {}),
    ({"weight": [0]}, {}),
    ({"weightt": {"0": [0]}}, {}),
    ({"bias": {"0": [0]}, "weight": {"0": [9]}}, {}),
    ({}, {"forward": 3}),
    ({}, {"training": 1}),
    ({}, {"out_features": True}),
    ({}, {"out_features": 2.0}),
    ({}, {"out_features": "3"}),
    ({}, {"no_such": 3}),
    ({}, {"weight": 3}),
]


@pytest.mark.parametrize(("tensors", "attributes"), HOSTILE)
def test_a_hostile_slice_is_bounded_and_changes_nothing(tensors: Any, attributes: Any) -> None:
    check_unchanged(Edit("slice", "0", config={"tensors": tensors, "attributes": attributes}), "0")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Edit("replace", "0", "verbs-test-broken"), "RuntimeError: no such luck"),
        (Edit("replace", "0", "verbs-test-nothing"), "failed"),
        (Edit("replace", "0", "verbs-test-factors", {"rnk": 2}), "rnk"),
        (Edit("replace", "0", "verbs-test-factor"), "did you mean 'verbs-test-factors'"),
        (Edit("replace", "9", "verbs-test-factors", {"rank": 1}), "no module at '9'"),
        (Edit("replace", "", "verbs-test-factors", {"rank": 1}), "root|failed"),
        (Edit("parametrize", "0", "verbs-test-scale", {"tensor": "w", "factor": 1.0}), "failed"),
        (Edit("parametrize", "0", "verbs-test-factors", {"rank": 2}), "unknown parametrize kind"),
        (Edit("bake", "0"), "no `to_dense"),
        (Edit("bake", "0", config={"tensor": "weight"}), "nothing is parametrized"),
    ],
)
def test_a_failing_edit_changes_nothing(edit: Edit, message: str) -> None:
    check_unchanged(edit, message)


def check_unchanged(edit: Edit, message: str) -> None:
    net = mlp()
    apply(net, slice_edit("2", {"weight": {"1": [[0, 5]]}}, in_features=6))
    state, journal, modules = copy.deepcopy(net.state_dict()), journal_of(net), list(net.modules())
    with pytest.raises(ConfigurationError, match=message):
        apply(net, edit)
    assert journal_of(net) == journal
    assert list(net.modules()) == modules
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert set(net.state_dict()) == set(state)
    assert (net[0].in_features, net[0].out_features, net[0].training) == (4, 6, True)


def test_registry_refuses_duplicates_and_other_verbs() -> None:
    assert register_kind("replace", "verbs-test-factors")(build_factors) is build_factors
    with pytest.raises(ConfigurationError, match="registered already"):
        register_kind("replace", "verbs-test-factors")(build_broken)
    with pytest.raises(ConfigurationError, match="`verb` is 'slice'"):
        register_kind("slice", "x")
    assert "verbs-test-scale" in registered_kinds("parametrize")
    assert "verbs-test-scale" not in registered_kinds("replace")


@pytest.mark.parametrize("indices", [[], [4], [0, 1, 2], [0, 2, 4], [0, 1, 5, 6, 7, 9]])
def test_ranges_round_trip(indices: list[int]) -> None:
    assert expand_ranges(compact_ranges(indices)) == indices


def test_edits_on_compiled_models() -> None:
    net = mlp()
    root = torch.compile(net, backend="eager")
    apply(root, slice_edit("0", {"weight": {"0": [[0, 3]]}, "bias": {"0": [[0, 3]]}}, out_features=4))
    apply(root, slice_edit("2", {"weight": {"1": [[0, 3]]}}, in_features=4))
    assert len(journal_of(root)) == len(journal_of(net)) == 2
    x = torch.randn(2, 4)
    torch.testing.assert_close(root(x), net(x))


def test_a_replaced_layer_leaves_its_compiled_wrapper() -> None:
    net = mlp()
    net[0] = torch.compile(net[0], backend="eager")
    net(torch.randn(2, 4))
    apply(net, Edit("replace", "0", "verbs-test-factors", {"rank": 2}))
    assert isinstance(net[0], Factors)
    assert "0.a.weight" in net.state_dict()
