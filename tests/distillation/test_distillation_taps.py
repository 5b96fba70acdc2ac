"""Taps and pairs: what layers return in every form, and which layer learns from which."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from kd_models import Net, images
from torch import Tensor, nn

from lightning_compress import ConfigurationError
from lightning_compress.distillation.pairs import match_pairs
from lightning_compress.distillation.seen import collect
from lightning_compress.distillation.taps import Taps, defines_forward, pick, tap_point


class Shared(nn.Module):
    """A block that runs twice, an LSTM, and a mapping as the output."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(4, 4)
        self.again = self.block
        self.recur = nn.LSTM(4, 3, batch_first=True)
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
        x = self.block(self.again(x)) * scale
        out, state = self.recur(x)
        return {"loss": x.sum(), "logits": out, "state": state, "seen": self.attend(x, x, x)[0]}


def test_every_form_of_output() -> None:
    net, x = Shared(), torch.rand(2, 5, 4)
    taps = Taps(["", "again", "recur", "attend"], inputs_of=[""])
    with taps.watch(net) as seen:
        result = net(x, scale=2.0)
    assert {path: len(calls) for path, calls in seen.items()} == {"": 1, "again": 2, "recur": 1, "attend": 1}
    assert torch.equal(pick(seen[""][0].output), result["logits"])
    assert torch.equal(pick(seen["recur"][0].output, "1.0"), result["state"][0])
    assert torch.equal(pick(seen["attend"][0].output), result["seen"])
    assert torch.equal(seen[""][0].args[0], x)
    assert seen[""][0].kwargs == {"scale": 2.0}
    assert seen["recur"][0].args == ()


def test_a_later_change_in_place_is_not_seen() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 1))
    x = -torch.ones(2, 3)
    nn.init.eye_(net[0].weight)
    nn.init.zeros_(net[0].bias)
    with Taps(["0", "2"]).watch(net) as seen:
        net(x)
    assert torch.equal(seen["0"][0].output, x)


def test_hooks_are_gone_afterwards_and_copies_hold_no_model() -> None:
    net, taps = Net(), Taps(["", "layer1"])
    with pytest.raises(ZeroDivisionError), taps.watch(net):
        raise ZeroDivisionError
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())
    for twin in (copy.deepcopy(taps), pickle.loads(pickle.dumps(taps))):
        assert twin.paths == taps.paths
        with twin.watch(copy.deepcopy(net)) as seen:
            pass
        assert seen == {"": [], "layer1": []}


def test_calls_without_a_graph_can_be_left_out() -> None:
    net, x = Net(), images().tensors[0][:2]
    with Taps(["layer1"]).watch(net, with_graph=True) as seen:
        with torch.no_grad():
            net(x)
        net(x)
    assert len(seen["layer1"]) == 1
    assert seen["layer1"][0].output.requires_grad


def test_a_step_that_runs_through_the_roots_own_call_is_no_run() -> None:
    class Redirected(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return self(x).sum() if x.dim() == 3 else super().forward(x[..., :2])

    net = Redirected(2, 2)
    with Taps([""], inputs_of=[""]).watch(net) as seen:
        outer = nn.Module.__call__(net, torch.zeros(1, 2))
    assert len(seen[""]) == 1

    class Step(nn.Module):
        def forward(self, x: Tensor, inside: bool = False) -> Tensor:
            return x * 2 if inside else self(x, inside=True).sum()

    with Taps([""], inputs_of=[""]).watch(step := Step()) as seen:
        assert step(torch.ones(3)) == 6
    assert [call.output.tolist() for call in seen[""]] == [[2.0, 2.0, 2.0]]
    assert outer.shape == (1, 2)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("inner", [False, True])
def test_compiled_parts(inner: bool) -> None:
    torch.compiler.reset()
    net, x = Net(dropout=0.0), images().tensors[0][:4]
    with Taps(["", "layer2"]).watch(net) as plain:
        net(x)
    compiled = copy.deepcopy(net)
    if inner:
        compiled.layer2 = torch.compile(compiled.layer2, backend="eager")
    else:
        compiled.compile(backend="eager")
    assert tap_point(compiled, "layer2") is compiled.layer2
    for _ in range(2):
        with Taps(["", "layer2"]).watch(compiled) as seen:
            compiled(x)
        assert [len(calls) for calls in seen.values()] == [1, 1]
        torch.testing.assert_close(seen["layer2"][0].output, plain["layer2"][0].output)


@dataclass
class Output:
    loss: Tensor | None
    logits: Tensor


@pytest.mark.parametrize(
    ("value", "key", "expected"),
    [
        (torch.tensor(1.0), "", 1.0),
        ((torch.tensor(2.0), torch.tensor(3.0)), "", 2.0),
        ((torch.tensor(2.0), torch.tensor(3.0)), "1", 3.0),
        ({"aux": torch.tensor(4.0), "out": torch.tensor(5.0)}, "", 5.0),
        ({"aux": torch.tensor(4.0), "out": torch.tensor(5.0)}, "aux", 4.0),
        (Output(None, torch.tensor(6.0)), "", 6.0),
        (Output(torch.tensor(7.0), torch.tensor(6.0)), "loss", 7.0),
        ({"other": [torch.tensor(8.0)]}, "other.0", 8.0),
    ],
)
def test_pick(value: Any, key: str, expected: float) -> None:
    assert pick(value, key).item() == expected


@pytest.mark.parametrize(
    ("value", "key", "message"),
    [
        ({"logit": torch.ones(1)}, "logits", "no output 'logits'.*did you mean 'logit'"),
        ((torch.ones(1),), "2", "no output '2'.*expected one of '0'"),
        ("text", "", "returned a str without a tensor"),
        (torch.ones(2), "x", "no output 'x'"),
    ],
)
def test_pick_explains(value: Any, key: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        pick(value, key, "the student's 'layer'")


def test_what_has_a_forward() -> None:
    from lightning.pytorch import LightningModule

    class Bare(LightningModule):
        """Its work is in training_step."""

    class Own(Bare):
        def forward(self, x: Tensor) -> Tensor:
            return x

    assert [defines_forward(module) for module in (Bare(), Own(), nn.ReLU(), nn.Module())] == [False, True, True, False]


STUDENT = ["layer1", "layer1.0", "layer1.1", "layer2", "layer2.0", "head"]
TEACHER = ["layer1", "layer1.0", "layer1.1", "layer1.2", "layer2", "layer2.0", "stage1", "stage2", "fc"]


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ("layer*", "layer1, layer2"),
        (["layer1", "layer2"], "layer1, layer2"),
        ({"layer*": "stage*"}, "layer1 -> stage1, layer2 -> stage2"),
        ({"layer*.*": "layer*.*"}, "layer1.0, layer1.1, layer2.0"),
        ({"layer1.0": "layer1.2"}, "layer1.0 -> layer1.2"),
        ([["head", "fc"], "layer1"], "head -> fc, layer1"),
        ({"layer1:0": "stage1:out"}, "layer1:0 -> stage1:out"),
    ],
)
def test_shorthand_of_pairs(pairs: Any, expected: str) -> None:
    assert ", ".join(map(str, match_pairs(pairs, STUDENT, TEACHER))) == expected


@pytest.mark.parametrize(
    ("pairs", "teacher", "message"),
    [
        ("layer3", TEACHER, "'layer3', which is no layer of the student; did you mean 'layer"),
        ({"layer1": "stag1"}, TEACHER, "no layer of the teacher; did you mean 'stage1'"),
        ({"layer*.*": "stage*.*"}, TEACHER, "'layer1.0' has no partner 'stage1.0'"),
        ({"layer*": "fc"}, TEACHER, r"means 2 layers \(layer1, layer2\), the teacher's 'fc' means 1 \(fc\)"),
        ("head", [], "gives only its output"),
        ([3], TEACHER, r"layer names or \[student, teacher\], got 3"),
        (7, TEACHER, "a name, a list or a mapping"),
    ],
)
def test_pairs_that_do_not_fit(pairs: Any, teacher: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        match_pairs(pairs, STUDENT, teacher)


def test_runs_are_told_apart() -> None:
    """Two runs of the model with a layer that runs twice in each: two features a run."""
    net = Shared()
    pairs = {"x": match_pairs("block", ["block"], None)}
    with Taps(["", "block"], inputs_of=[""]).watch(net) as record:
        for scale in (0.0, 1.0):
            net(torch.full((1, 2, 4), scale))
    first, second = collect(record, "", pairs)
    assert len(first.features["block"]) == len(second.features["block"]) == 2
    assert torch.equal(second.features["block"][0], record["block"][2].output)
    record["block"].pop()
    with pytest.raises(ConfigurationError, match="'block' 3 times while it gave 2 output"):
        collect(record, "", pairs)
