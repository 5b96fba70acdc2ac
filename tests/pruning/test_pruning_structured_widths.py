"""How many channels groups keep: multiples that kernels like, at no more operations and parameters."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import lightning_compress as lc
from lightning_compress import ConfigurationError, StructuredPruning
from lightning_compress.core.cost import count_macs, count_parameters
from lightning_compress.pruning.structured import ChannelRule, Limits, coupled_groups
from lightning_compress.pruning.structured.budget import Costs
from lightning_compress.pruning.structured.limits import Limit
from lightning_compress.pruning.structured.widths import choose_widths

SIZES = {"conv": 64, "fc": 64}
SCORES = {name: torch.rand(size) for name, size in SIZES.items()}


def costs(conv: float, fc: float) -> Costs:
    return Costs(1.0, ((conv, ((64, {"conv": 1.0}),)), (fc, ((64, {"fc": 1.0}),))), SIZES)


MACS, PARAMETERS = costs(0.96, 0.04), costs(0.04, 0.96)


@pytest.mark.parametrize(
    ("step", "beside", "expected"),
    [
        (1, PARAMETERS, (38, 39)),  # 0.594 of the operations; one more of conv would make it 0.609
        (1, None, (38, 48)),  # the room of 0.006 filled with nine channels that cost 0.135 of the parameters
        (4, PARAMETERS, (36, 36)),
        (16, PARAMETERS, (32, 32)),  # neither 48: 0.74 of the operations or 0.74 of the parameters
        (16, None, (32, 64)),
    ],
)
def test_room_is_not_filled_with_what_is_dear_elsewhere(step: int, beside: Costs, expected: tuple[int, int]) -> None:
    limits = {name: Limit(round_to=step) for name in SIZES}
    found = choose_widths(SCORES, 0.6, MACS, "layer", limits, beside=beside)
    assert (found["conv"], found["fc"]) == expected


def test_what_is_narrow_keeps_a_multiple_and_others_make_up_for_it() -> None:
    sizes = {"narrow": 6, "wide": 64}
    both = Costs(2.0, tuple((1.0, ((size, {name: 1.0}),)) for name, size in sizes.items()), sizes)
    scores = {name: torch.arange(float(size)) for name, size in sizes.items()}
    found = choose_widths(scores, 0.5, both, "layer", {"narrow": Limit(round_to=4), "wide": Limit(round_to=8)})
    assert found == {"narrow": 4, "wide": 16}  # 2/3 and 1/4; 24 would leave 1.04 of 2
    with pytest.raises(ConfigurationError, match="at least"):
        choose_widths(scores, 0.5, both, "layer", {"narrow": Limit(round_to=4), "wide": Limit(0.9, 8)})


class Mixed(nn.Module):
    """Convolutions full of operations before a Linear full of parameters."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 64, 128)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.wide, self.head = nn.Linear(128 * 16, 256), nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = torch.relu(conv(x))
        return self.head(torch.relu(self.wide(nn.functional.adaptive_avg_pool2d(x, 4).flatten(1))))


@pytest.mark.parametrize("scope", ["global", "layer", "lamp"])
@pytest.mark.parametrize(("goal", "other"), [("macs", "parameters"), ("parameters", "macs")])
def test_widths_suit_kernels_by_default_and_cost_nothing(goal: str, other: str, scope: str) -> None:
    torch.manual_seed(0)
    net, example = Mixed(), torch.zeros(1, 3, 16, 16)
    left = {}
    for round_to in (None, 16, 1):
        callback = StructuredPruning(**{goal: 0.5}, ranking={"scope": scope}, limits={"round_to": round_to})
        cut = lc.compress(net, callback, example_inputs=example)
        left[round_to] = (count_macs(cut, example).total, count_parameters(cut).total, cut)
        assert (0 if round_to == 16 else 0.97 * 0.5) <= callback.history[0][goal] <= 0.5
    which = ("macs", "parameters").index(other)
    assert left[None][which] <= left[1][which]
    assert left[16][which] <= left[1][which]
    rounded = left[16][2]
    assert [layer.out_channels % 16 for layer in rounded.convs[1:]] + [rounded.wide.out_features % 16] == [0] * 3


def test_multiples_that_nobody_asked_for_give_way() -> None:
    limits = {name: Limit(round_to=16, yields=True) for name in SIZES}
    found = [choose_widths(SCORES, target, MACS, "layer", limits, beside=PARAMETERS) for target in (0.63, 0.6)]
    assert found[0] == {"conv": 40, "fc": 40}  # multiples of 16 would leave 0.5 of the operations
    assert found[1] == {"conv": 38, "fc": 39}  # multiples of 4 would leave 0.563
    assert Limit(0.1, 16, yields=True).least(64) == 7
    assert ChannelRule("a", round_to=8).refine(limits["fc"]) == Limit(0.1, 8)


def test_shares_that_were_asked_for_are_not_rounded() -> None:
    net = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    groups = coupled_groups(net, torch.zeros(1, 4)).groups
    limits = Limits(rules={"a": ChannelRule("0", amount=0.3)}).of(groups, net)
    assert limits == {"0": Limit(0.1, 1, 0.3), "2": Limit(0.1, 16, yields=True)}
    assert Limits(round_to=4, rules={"a": ChannelRule("0", amount=0.3)}).of(groups, net)["0"] == Limit(0.1, 4, 0.3)
    latency = StructuredPruning(latency=0.5)
    assert latency._steps.round_to == 1  # which multiples are fast is measured
