"""What makes a channel matter, how groups are compared, and limits for single layers: by hand."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import nn

import lightning_compress as lc
from lightning_compress import (
    CompressionError,
    ConfigurationError,
    Schedule,
    SelectionError,
    StructuredPruning,
    coupled_groups,
)
from lightning_compress.core.plan import PlanRow
from lightning_compress.pruning.structured import ChannelRule, Limits, Ranking, channel_importance
from lightning_compress.pruning.structured.importance import KINDS, channel_scores, lamp


def chain(*widths: int, norm: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths[:-1]):
        layers += [nn.Linear(before, after, bias=False), *([nn.BatchNorm1d(after)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1], bias=False))


class Task(LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


def only_group(net: nn.Sequential) -> tuple[Any, dict[str, nn.Module]]:
    group = coupled_groups(net, torch.zeros(2, net[0].in_features)).groups[0]
    return group, dict(net.named_children())


def test_distances_to_the_other_filters() -> None:
    net = chain(2, 3, 1)
    net[0].weight.data = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 8.0]])
    group, layers = only_group(net)
    rows = net[0].weight.detach().numpy()
    expected = np.linalg.norm(rows[:, None] - rows[None], axis=-1).sum(1)  # 13, 10, 13
    assert expected.tolist() == [13.0, 10.0, 13.0]
    assert channel_scores(group, layers, "fpgm").tolist() == pytest.approx(expected)
    assert channel_importance(group, layers, "fpgm").tolist() == pytest.approx(expected / 12)


def test_scales_of_batch_norms_and_random_numbers() -> None:
    net = chain(2, 3, 2, norm=True)
    net[1].weight.data = torch.tensor([0.5, -2.0, 0.1])
    group, layers = only_group(net)
    assert channel_scores(group, layers, "bn_scale").tolist() == pytest.approx([0.5, 2.0, 0.1])
    first, again = (channel_scores(group, layers, "random") for _ in range(2))
    assert torch.equal(first, again)
    with pytest.raises(ConfigurationError, match=r"did you mean 'fpgm'"):
        channel_scores(group, layers, "fpmg")


def test_lamp_divides_by_what_is_left() -> None:
    # sorted 1, 2, 5: 1/8, 2/7, 5/5
    assert lamp(torch.tensor([5.0, 1.0, 2.0], dtype=torch.float64)).tolist() == pytest.approx([1.0, 1 / 8, 2 / 7])
    assert lamp(torch.zeros(2)).tolist() == [0.0, 0.0]


def test_scopes_compare_groups_in_their_own_way() -> None:
    net = chain(1, 4, 4, 1)
    net[0].weight.data = torch.tensor([[10.0], [10.0], [10.0], [10.0]])
    net[2].weight.data = torch.eye(4)
    net[4].weight.data = torch.ones(1, 4)
    x = torch.zeros(1, 1)
    cuts = {}
    for scope in ("global", "lamp", "global_raw", "layer"):
        callback = StructuredPruning(0.5, ranking=Ranking("l1", scope))
        lc.compress(net, callback, example_inputs=x)
        cuts[scope] = {name: len(channels) for name, channels in callback._cuts.items()}
    # group 0 scores (10 + 1) / 2 each, group 2 (1 + 1) / 2 each
    assert cuts["global_raw"] == {"2": 3, "0": 1}  # the floor keeps one of the smaller group
    assert cuts["layer"] == cuts["lamp"] == {"0": 2, "2": 2}
    assert sum(cuts["global"].values()) == 4


def test_gradients_seen_in_fit_decide() -> None:
    """One input is always zero: what is read from it has no gradient, however large its weight."""
    torch.manual_seed(0)
    net = chain(2, 4, 2)
    net[0].weight.data = torch.tensor([[0.3, 0.0], [0.0, 9.0], [0.4, 0.0], [0.0, 9.0]])
    net[2].weight.data = torch.tensor([[1.0, 1.0, -1.0, 1.0], [-1.0, 1.0, 1.0, 1.0]])
    inputs = torch.stack([torch.rand(32) + 0.5, torch.zeros(32)], 1)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(inputs, torch.randint(2, (32,))), batch_size=8, shuffle=False
    )
    callback = StructuredPruning(Schedule(0.5, start="50%", shape="once"), ranking="taylor")
    module = Task(net)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(max_epochs=1, callbacks=[callback], enable_checkpointing=False, accelerator="cpu", **quiet).fit(
        module, loader
    )
    (cut,) = callback._cuts.values()
    assert cut == [1, 3]
    with pytest.raises(ConfigurationError, match=r"'taylor' importance needs gradients"):
        lc.compress(net, StructuredPruning(0.5, ranking="taylor"), example_inputs=torch.zeros(1, 2))
    net.zero_grad()
    net(inputs).square().sum().backward()
    taken = StructuredPruning(0.5, ranking="taylor")
    lc.compress(net, taken, example_inputs=torch.zeros(1, 2), inplace=True)
    assert taken._cuts["0"] == [1, 3]


def test_gradients_of_a_step_that_is_skipped_are_not_seen_and_diverged_weights_are_named() -> None:
    net = chain(2, 4, 2)
    groups, layers = coupled_groups(net, torch.rand(2, 2)).groups, dict(net.named_modules())
    net(torch.rand(8, 2)).sum().backward()
    ranking, seen = Ranking("taylor"), {}
    ranking.look(groups, layers, seen)
    once = seen["0"].clone()
    net[0].weight.grad[0, 0] = torch.inf
    ranking.look(groups, layers, seen)
    assert torch.equal(seen["0"], once)
    net[2].weight.data[1, 2] = torch.nan
    with pytest.raises(CompressionError, match="'l2' importance of the channels of '0' is NaN or infinite"):
        lc.compress(net, StructuredPruning(0.5), example_inputs=torch.rand(2, 2))


def test_small_weights_in_half_precision_are_told_apart() -> None:
    net = chain(2, 3, 2).half()
    net[0].weight.data = torch.tensor([[2.0], [3.0], [1.0]]).expand(3, 2).half() * 1e-5  # their squares are zero in it
    net[2].weight.data.zero_()
    group, layers = only_group(net.float())
    net.half()
    assert channel_scores(group, layers, "l2").argsort().tolist() == [2, 0, 1]


def test_layers_that_the_loss_does_not_reach_go_first() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(chain(2, 8, 2), chain(2, 8, 2), nn.Linear(2, 2))
    groups = coupled_groups(net, torch.rand(2, 2)).groups
    assert [group.name for group in groups] == ["0.0", "0.2", "1.0", "1.2"]
    net[2](net[0](torch.rand(8, 2))).square().sum().backward()  # as if a branch had been skipped
    layers = dict(net.named_modules())
    ranking, seen = Ranking("taylor", "global_raw"), {}
    ranking.look(groups, layers, seen)
    scores = ranking.score(groups, layers, seen)
    assert "1.0" not in seen
    assert not scores["1.0"].any()
    assert scores["0.0"].any()
    twice = dict(seen)
    ranking.look(groups, layers, twice)
    assert torch.equal(twice["0.0"], 2 * seen["0.0"])


def test_groups_without_what_the_ranking_reads_are_named() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*chain(4, 8, 8, norm=True), nn.ReLU(), nn.Linear(8, 2))
    callback = StructuredPruning(0.5, ranking="bn_scale")
    lc.compress(net, callback, example_inputs=torch.zeros(2, 4))
    assert list(callback._cuts) == ["0"]
    assert "no batch norm" in callback._left["3"]
    with pytest.raises(SelectionError, match="no batch norm"):
        lc.compress(chain(4, 8, 2), StructuredPruning(0.5, ranking="bn_scale"), example_inputs=torch.zeros(2, 4))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "taylor"])
@pytest.mark.parametrize("scope", ["global", "layer", "lamp", "global_raw"])
def test_every_importance_in_every_scope_meets_the_goal(kind: str, scope: str) -> None:
    torch.manual_seed(0)
    callback = StructuredPruning(macs=0.5, ranking={"importance": kind, "scope": scope})
    lc.compress(chain(4, 16, 16, 2, norm=True), callback, example_inputs=torch.zeros(2, 4))
    assert 0.4 < callback.history[0]["macs"] <= 0.5


def test_rules_set_amounts_floors_and_multiples() -> None:
    torch.manual_seed(0)
    rules = {
        "first": {"include": "0", "amount": 0.25},
        "second": ChannelRule("2", floor=0.75),
        "third": ChannelRule("4", round_to=8),
        "none": {"include": "6", "amount": 0.0},
    }
    net = chain(4, 16, 16, 32, 16, 2)
    callback = StructuredPruning(0.4, limits={"floor": 0.05, "rules": rules})
    cut = lc.compress(net, callback, example_inputs=torch.zeros(2, 4))
    assert cut[0].out_features == 12
    assert cut[2].out_features >= 12
    assert cut[4].out_features % 8 == 0
    assert cut[6].out_features == 16
    assert 0.55 <= callback.history[0]["channels"] <= 0.6
    actions = {row.layer: row.action for row in callback.plan({})}
    assert actions["0"] == "cut to 12"
    assert actions["6"] == "keep"
    assert actions["2"] == "cut to 12 or more"
    assert isinstance(callback.plan({})[0], PlanRow)


def test_the_last_rule_wins_and_a_rule_for_nothing_is_an_error() -> None:
    net, x = chain(4, 16, 16, 2), torch.zeros(2, 4)
    groups = coupled_groups(net, x).groups
    limits = Limits(rules={"all": ChannelRule("*", floor=0.5), "one": ChannelRule("0", round_to=4)}).of(groups, net)
    assert (limits["0"].floor, limits["0"].round_to, limits["2"].floor) == (0.1, 4, 0.5)
    with pytest.raises(SelectionError, match=r"rule 'head' of `limits` matches 4, whose channels cannot be cut"):
        Limits(rules={"head": ChannelRule("4", floor=0.5)}).of(groups, net)
    with pytest.raises(SelectionError, match=r"rule 'typo'"):
        Limits(rules={"typo": ChannelRule("fc*", floor=0.5)}).of(groups, net)


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: ChannelRule("0"), "at least one of"),
        (lambda: ChannelRule("0", amount=1.0), "`amount`"),
        (lambda: Limits(rules={"a": {"floor": 0.5}}), "rule 'a' of `limits` lacks `include`"),
        (lambda: Limits(rules={"a": {"include": "0", "floors": 0.5}}), "did you mean 'floor'"),
        (lambda: Limits(rules=["a"]), "`rules` must be a mapping"),
        (lambda: StructuredPruning(0.5, limits=0.5), "`limits` must be a Limits or a mapping"),
        (lambda: StructuredPruning(0.5, ranking="l3"), "`importance` is 'l3'"),
        (lambda: StructuredPruning(0.5, ranking=2), "`ranking` must be"),
    ],
)
def test_bad_rankings_and_limits_are_named(build: Any, named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        build()
