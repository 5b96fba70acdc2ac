"""Which channels are coupled, what cannot be cut, and how the numbers of channels are found: by hand."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import ConfigurationError, SelectionError, StructuredPruning, compress, coupled_groups
from lightning_compress.pruning.structured import channel_importance, recalibrate_batch_norm
from lightning_compress.pruning.structured.budget import costs_of
from lightning_compress.pruning.structured.groups import Zeroing, parameter_in
from lightning_compress.pruning.structured.limits import Limit
from lightning_compress.pruning.structured.widths import choose_widths, lowest


class Joined(nn.Module):
    """Two branches, one of them added to a third, concatenated; a convolution, flattened into a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(1, width, 1) for width in (2, 3, 3))
        self.mix, self.fc = nn.Conv2d(5, 4, 1), nn.Linear(4 * 4, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([self.a(x), self.b(x) + self.c(x)], 1)
        return self.head(torch.relu(self.fc(self.mix(joined).flatten(1))))


def test_concatenated_added_and_flattened_channels_are_found_by_index() -> None:
    found = coupled_groups(Joined(), torch.zeros(1, 1, 2, 2))
    groups = {group.name: group for group in found.groups}
    assert list(groups) == ["a", "b", "mix", "fc"]
    assert groups["b"].producers == ("b", "c")
    taken = {touch.path: touch for touch in groups["b"].touches if not touch.produces}["mix"]
    assert taken.tensors == (("weight", 1),)
    assert taken.cut([0, 1]) == [2, 3]  # after two of a
    flat = {touch.path: touch for touch in groups["mix"].touches if not touch.produces}["fc"]
    assert flat.cut([1]) == [4, 5, 6, 7]
    assert dict(found.left) == {"head": "its outputs are the model's outputs"}


def test_the_plan_names_the_other_layers_of_a_group_only() -> None:
    class Added(Joined):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.fc(self.mix(torch.cat([self.a(x), self.c(x) + self.b(x)], 1)).flatten(1))))

    callback = StructuredPruning(0.3)
    compress(Added(), callback, example_inputs=torch.zeros(1, 1, 2, 2))
    assert {row.layer: row.action for row in callback.plan({})}["b"].endswith("more, with c")


def test_the_model_is_left_as_it_was() -> None:
    net = Joined()
    net.c.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    state = torch.get_rng_state()
    coupled_groups(net, torch.zeros(1, 1, 2, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert net.training
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["c.weight", "c.bias"]
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not net.fc._forward_hooks


def test_frozen_and_tied_layers_are_named() -> None:
    net = Joined()
    net.c.requires_grad_(False)
    left = coupled_groups(net, torch.zeros(1, 1, 2, 2)).left
    assert left["b"] == "it is coupled to 'c': 'weight' is frozen"
    assert left["c"] == "'weight' is frozen"
    whole = coupled_groups(Joined().requires_grad_(False), torch.zeros(1, 1, 2, 2))
    assert len(whole.groups) == 4  # a model that is only run
    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    tied[2].weight = tied[0].weight
    assert "is tied to" in coupled_groups(tied, torch.zeros(1, 4)).left["0"]


class FlatJoin(Joined):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5 * 4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc(torch.cat([self.a(x), self.b(x)], 1).flatten(1)))


def test_what_the_tracer_gets_wrong_is_found_by_the_trial_and_kept() -> None:
    found = coupled_groups(FlatJoin(), torch.zeros(1, 1, 2, 2))
    assert "does not run without some of its channels" in found.left["a"]
    assert [group.name for group in found.groups] == ["fc"]


class Unread(nn.Module):
    """The last sum of a residual stream is not read, so that a trace of the outputs lacks it (as in WaveNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Linear(4, 8), nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.skips, self.head = nn.ModuleList(nn.Linear(8, 6) for _ in range(2)), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x, out = self.stem(x), torch.zeros(())
        for block, skip in zip(self.blocks, self.skips, strict=True):
            hidden = torch.tanh(block(x))
            out, x = out + skip(hidden), x + hidden
        return self.head(torch.relu(out))


def test_channels_that_meet_where_nobody_reads_are_kept_or_cut_alike() -> None:
    found = coupled_groups(Unread(), torch.zeros(2, 4))
    assert [group.name for group in found.groups] == ["skips.0"]
    assert all("does not run without some" in found.left[path] for path in ("stem", "blocks.0", "blocks.1"))
    cut = compress(Unread(), StructuredPruning(0.5), example_inputs=torch.zeros(2, 4))
    assert cut(torch.zeros(3, 4)).shape == (3, 2)


class Awkward(nn.Module):
    """A parameter of its own, a LayerNorm, a split by constants, and a layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale = nn.Linear(4, 6), nn.Parameter(torch.ones(6))
        self.second, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)
        self.third, self.head, self.idle = nn.Linear(6, 8), nn.Linear(4, 2), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.second(torch.relu(self.first(x) * self.scale)))
        one, other = self.third(x).split([4, 4], 1)
        return self.head(one * other.sigmoid())


def test_zeros_are_put_back_with_indices_that_were_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Joined()
    zeros = Zeroing(coupled_groups(net, torch.zeros(1, 1, 2, 2)).groups, {"b": [0, 1], "fc": []})
    layers = dict(net.named_modules())
    for _ in range(2):
        for parameter in net.parameters():
            nn.init.ones_(parameter)
        zeros(parameter_in(layers))
        assert net.b.weight.flatten().tolist() == net.c.bias.tolist() == [0, 0, 1]
        assert net.mix.weight[0].flatten().tolist() == [1, 1, 0, 0, 1]  # a is whole
        assert all(bool((layer.weight == 1).all()) for layer in (net.a, net.fc, net.head))
        # a tensor from a list makes a GPU wait for the processor, and this runs after every step
        monkeypatch.setattr(torch, "tensor", lambda *_, **__: pytest.fail("indices are made anew"))


def test_everything_that_stays_has_its_reason() -> None:
    found = coupled_groups(Awkward(), torch.zeros(2, 4))
    assert not found.groups
    assert set(found.left) == {"first", "second", "third", "head", "idle"}
    assert "parameter 'scale'" in found.left["first"]
    assert "LayerNorm" in found.left["second"]
    assert found.left["head"] == "its outputs are the model's outputs"
    assert "does not call it" in found.left["idle"]
    with pytest.raises(SelectionError, match="no channels of Awkward can be cut"):
        compress(Awkward(), StructuredPruning(0.5), example_inputs=torch.zeros(2, 4))


def test_importance_is_the_mean_norm_of_all_coupled_slices() -> None:
    net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    net[0].weight.data = torch.tensor([[1.0], [3.0]])
    net[2].weight.data = torch.tensor([[2.0, 0.0]])
    group = coupled_groups(net, torch.zeros(1, 1)).groups[0]
    layers = {"0": net[0], "2": net[2]}
    # squares: out (1, 9), in (4, 0): means (2.5, 4.5); over their mean 3.5
    assert channel_importance(group, layers).tolist() == pytest.approx([2.5 / 3.5, 4.5 / 3.5])
    assert channel_importance(group, layers, "l1").tolist() == pytest.approx([1.0, 1.0])
    with pytest.raises(ConfigurationError, match="needs gradients"):
        channel_importance(group, layers, "taylor")
    net[0].weight.grad, net[2].weight.grad = torch.tensor([[1.0], [1.0]]), torch.tensor([[0.5, 9.0]])
    # |w g|: out (1, 3), in (1, 0)
    assert channel_importance(group, layers, "taylor").tolist() == pytest.approx([2 / 2.5, 3 / 2.5])


def test_costs_fall_with_the_product_of_both_sides() -> None:
    net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(8, 6, bias=False), nn.Linear(6, 2, bias=False))
    groups = coupled_groups(net, torch.zeros(1, 4)).groups
    layers = {str(index): layer for index, layer in enumerate(net)}
    costs = costs_of("parameters", groups, layers, 32 + 48 + 12, {})
    assert costs.share({"0": 8, "1": 6}) == 1.0
    assert costs.share({"0": 4, "1": 3}) == pytest.approx((16 + 12 + 6) / 92)
    macs = costs_of("macs", groups, layers, 92, {"0": 32, "1": 48, "2": 12})
    assert macs.share({"0": 2, "1": 6}) == pytest.approx((8 + 12 + 12) / 92)


def test_limits_and_scopes() -> None:
    scores = {"a": torch.tensor([0.1, 0.2, 0.3, 0.4]), "b": torch.tensor([5.0, 6.0, 7.0, 8.0])}
    net = nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 4), nn.Linear(4, 1))
    groups = coupled_groups(net, torch.zeros(1, 1)).groups
    costs = costs_of("channels", groups, dict(net.named_children()), 1, {})
    costs = type(costs)(
        costs.total,
        tuple((c, ((s, {n: 1.0}),)) for n, (c, ((s, _),)) in zip("ab", costs.parts, strict=True)),
        {"a": 4, "b": 4},
    )

    def choose_cuts(
        scores: Any, target: float, costs: Any, scope: str = "global", gone: Any = None, **more: Any
    ) -> Any:
        return lowest(scores, choose_widths(scores, target, costs, scope, gone=gone, **more), gone)

    assert choose_cuts(scores, 0.75, costs) == {"a": [0, 1]}
    assert choose_cuts(scores, 0.75, costs, "layer") == {"a": [0], "b": [0]}
    assert choose_cuts(scores, 0.5, costs, limits=dict.fromkeys("ab", Limit(floor=0.5))) == {"a": [0, 1], "b": [0, 1]}
    assert choose_cuts(scores, 1.0, costs) == {}
    for scope in ("global", "layer"):  # what is gone stays so, also where the last step went further than asked
        assert choose_cuts(scores, 0.8, costs, scope, gone={"b": [1, 3]}) == {"b": [1, 3]}
    assert choose_cuts(scores, 0.625, costs, gone={"b": [1, 3]}) == {"a": [0], "b": [1, 3]}
    with pytest.raises(ConfigurationError, match=r"at least 0.5 stays"):
        choose_cuts(scores, 0.4, costs, limits=dict.fromkeys("ab", Limit(floor=0.5)))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({}, "give one of"),
        ({"macs": 0.5, "parameters": 0.5}, "give one of"),
        ({"schedule": 0.5, "macs": 0.5}, "give one of"),
        ({"macs": 0.0}, "`macs`"),
        ({"parameters": 1.5}, "`parameters`"),
        ({"macs": 0.5, "ranking": {"scope": "locl"}}, "`scope`"),
        ({"macs": 0.5, "limits": {"round_to": 0}}, "`round_to`"),
        ({"macs": 0.5, "limits": {"floor": 1.0}}, "`floor`"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        StructuredPruning(**arguments)


def test_unreachable_goals_and_missing_inputs_are_errors_that_say_what_to_do() -> None:
    with pytest.raises(ConfigurationError, match=r"at least .* stay with `limits`"):
        compress(Joined(), StructuredPruning(macs=0.5, limits={"floor": 0.9}), example_inputs=torch.zeros(1, 1, 2, 2))
    with pytest.raises(ConfigurationError, match="`example_inputs`"):
        compress(Joined(), StructuredPruning(macs=0.5))
    with pytest.raises(ConfigurationError, match="could not be traced"):
        compress(Joined(), StructuredPruning(macs=0.5), example_inputs=torch.zeros(1, 7))


def test_without_torch_pruning_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ConfigurationError, match=r"lightning-compress\[structured\]"):
        coupled_groups(Joined(), torch.zeros(1, 1, 2, 2))


def test_recalibration_measures_plain_averages_and_gives_modes_back() -> None:
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5)).train()
    net[0].weight.requires_grad_(False)
    batches = [(torch.tensor([[1.0, 0.0], [3.0, 0.0]]), "label"), torch.tensor([[5.0, 2.0], [7.0, 2.0]])]
    assert recalibrate_batch_norm(net, batches) == 2
    assert net[0].running_mean.tolist() == [4.0, 1.0]
    assert net[0].running_var.tolist() == [2.0, 0.0]
    assert net[0].momentum == 0.1
    assert net[0].training
    with pytest.raises(ConfigurationError, match="`batches` is empty"):
        recalibrate_batch_norm(net, [])


def test_recalibration_of_frozen_unused_and_unmeasured_norms_and_of_a_failure() -> None:
    net = nn.Sequential(
        nn.BatchNorm1d(1, momentum=None),
        nn.BatchNorm1d(1).eval().requires_grad_(False),
        nn.BatchNorm1d(1, track_running_stats=False),
        nn.ModuleDict({"unused": nn.BatchNorm1d(1)}),
    )
    net[3].forward = lambda x: x
    net[3]["unused"].running_mean.fill_(7.0)
    assert recalibrate_batch_norm(net, [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [7.0]])]) == 2
    assert net[0].running_mean.item() == 4.0
    assert net[0].momentum is None
    assert net[1].running_mean.item() == pytest.approx(0.0, abs=1e-6)
    assert net[1].running_var.item() != 1.0
    assert [net[i].training for i in (0, 1)] == [True, False]
    assert net[3]["unused"].running_mean.item() == 7.0

    kept = copy.deepcopy(net.state_dict())
    for batches in ([], [torch.tensor([[9.0], [9.5]]), torch.zeros(2, 5)]):
        with pytest.raises((ConfigurationError, RuntimeError, ValueError)):
            recalibrate_batch_norm(net, batches)
        assert all(torch.equal(value, kept[key]) for key, value in net.state_dict().items())
