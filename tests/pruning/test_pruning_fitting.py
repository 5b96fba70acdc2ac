"""Which layers a score and a granularity fit, N:M patterns that hardware takes, and what the plan says."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import densenet121, mobilenet_v2, resnet18, vgg11_bn

from lightning_compress.core.compress import compress
from lightning_compress.core.errors import ConfigurationError, SelectionError
from lightning_compress.core.schedule import Schedule
from lightning_compress.core.select import Select
from lightning_compress.core.targets import Target
from lightning_compress.models import CifarResNet
from lightning_compress.pruning.callbacks import IterativePruning
from lightning_compress.pruning.fitting import fit_targets, following_norms, rank_groups
from lightning_compress.pruning.granularity import Granularity, Layout, parse_granularity, to_units
from lightning_compress.pruning.rules import Rule
from lightning_compress.pruning.scores import find_score


@pytest.mark.parametrize(
    ("build", "convolutions"),
    [(resnet18, 20), (mobilenet_v2, 52), (vgg11_bn, 8), (lambda: CifarResNet(20), 19)],
    ids=["resnet18", "mobilenet_v2", "vgg11_bn", "resnet20"],
)
def test_the_batch_norm_behind_each_convolution(build: Any, convolutions: int) -> None:
    with torch.device("meta"):
        model = build()
    found = following_norms(model)
    modules = dict(model.named_modules())
    assert {path for path, module in modules.items() if isinstance(module, nn.Conv2d)} == set(found)
    assert len(found) == convolutions
    assert all(modules[norm].num_features == modules[path].out_channels for path, norm in found.items())


def test_a_norm_that_normalises_more_than_the_layer_makes_is_not_its_norm() -> None:
    with torch.device("meta"):
        model = densenet121()  # a norm stands before each convolution, over everything concatenated so far
    found = following_norms(model)
    assert found["features.denseblock1.denselayer1.conv1"] == "features.denseblock1.denselayer1.norm2"
    assert "features.denseblock1.denselayer1.conv2" not in found


def test_norms_without_a_scale_and_of_other_sizes() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 6), nn.BatchNorm1d(6))
    targets = [Target("0", "weight"), Target("2", "weight")]
    fitting, left, norms = fit_targets(net, targets, find_score("bn_scale"), Granularity("filter"))
    assert [target.key for target in fitting] == ["2.weight"]
    assert norms == {"2.weight": "3"}
    assert "no batch norm" in left["0.weight"]


def test_what_is_kept_and_why() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 3))
    method = IterativePruning(0.5, Select(), granularity="2:4")
    pruned = compress(net, method)
    assert [bool((layer.weight == 0).any()) for layer in pruned] == [False, False, True, True]
    assert method._left == {
        "0.weight": "kept: its 3 inputs are not a multiple of 4, so 2:4 pruning by magnitude does not fit",
        "1.weight": "kept: its 1 inputs per group are not a multiple of 4, so 2:4 pruning by magnitude does not fit",
    }
    with pytest.raises(SelectionError, match=r"0\.weight: kept: its 3 inputs are not a multiple of 4"):
        compress(net, IterativePruning(0.5, Select(include="0"), granularity="2:4"))
    single = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3))
    method = IterativePruning(0.5, Select(), granularity="channel")
    compress(single, method)
    assert "all of it is one channel" in method._left["0.weight"]


def test_inputs_that_cannot_be_seen() -> None:
    net = nn.ModuleDict({"attend": nn.MultiheadAttention(8, 2), "recur": nn.LSTM(8, 8), "mix": nn.Linear(8, 8)})
    net["pair"] = nn.Bilinear(4, 4, 4)
    targets = [Target("attend", "in_proj_weight"), Target("attend.out_proj", "weight"), Target("mix", "weight")]
    targets += [Target("recur", "weight_ih_l0"), Target("pair", "weight")]
    fitting, left, _ = fit_targets(net, targets, find_score("wanda"), Granularity())
    assert [target.key for target in fitting] == ["mix.weight"]
    assert all("only inputs of linear layers and convolutions can be seen" in reason for reason in left.values())


def test_groups_that_a_mask_removed_rank_lowest() -> None:
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    mask = torch.tensor([[-1, -1], [-1, 0], [0, 0]], dtype=torch.int8)
    score = torch.tensor([1.0, 2.0, 9.0]).reshape(1, 3, 1, 1)
    ranked = rank_groups(score, weight, Granularity("row"), Layout(), mask, 0.5)
    assert ranked.scores.flatten().tolist() == [1.0, 2.0, -torch.inf]
    assert (ranked.size, ranked.least, ranked.room) == (2, 3, 1)
    pattern = rank_groups(
        torch.tensor([[4.0, 3.0, 2.0, 1.0]]), torch.ones(1, 4), Granularity("n:m", 2, 4), Layout(), None, 0
    )
    assert pattern.scores.tolist() == [[torch.inf, torch.inf, 2.0, 1.0]]
    assert pattern.least == 2


LAYERS = {
    "linear": nn.Linear(64, 32),
    "conv1d": nn.Conv1d(16, 8, 3),
    "conv2d": nn.Conv2d(16, 8, (3, 2), groups=2),
    "conv3d": nn.Conv3d(4, 4, 2),
    "transposed": nn.ConvTranspose2d(16, 8, 3, groups=2),
    "lstm": nn.LSTM(8, 8),
}


@pytest.mark.parametrize("word", ["2:4", "1:4", "1:2"])
@pytest.mark.parametrize("name", LAYERS)
def test_every_run_of_inputs_keeps_exactly_so_many(name: str, word: str) -> None:
    kept, of = map(int, word.split(":"))
    pruned = compress(nn.Sequential(LAYERS[name]), IterativePruning(1 - kept / of, Select(), granularity=word))[0]
    for key, weight in pruned.named_parameters():
        if "bias" in key:
            continue
        if name == "transposed":  # (inputs, outputs, ...): inputs of a group are next to each other
            runs = weight.reshape(weight.shape[0] // of, of, -1).transpose(0, 1)
        else:
            runs = weight.flatten(2).transpose(1, 2) if weight.dim() > 2 else weight
            runs = runs.reshape(-1, of).T
        counts = (runs != 0).sum(0)
        assert counts.unique().tolist() == [kept]


def test_on_the_way_no_run_ever_loses_more_than_the_pattern_lets_go() -> None:
    net = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16))
    method = IterativePruning(Schedule(0.5), Select(), granularity="2:4", score="random")
    method._resolve(net)
    gone: list[Tensor] = []
    for amount in (0.1, 0.3, 0.45, 0.5):
        method.update({"0": net[0], "1": net[1]}, amount)
        zeros = torch.cat([net[i].weight.detach().flatten() == 0 for i in (0, 1)])
        assert int(zeros.sum()) == round(amount * zeros.numel())
        assert int(zeros.reshape(-1, 4).sum(1).max()) <= 2
        assert not gone or bool(zeros[gone[-1]].all())
        gone.append(zeros)
    assert set(gone[-1].reshape(-1, 4).sum(1).tolist()) == {2}


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
def test_the_pattern_has_the_shapes_that_sparse_kernels_take() -> None:
    """What ``torch.sparse.to_sparse_semi_structured`` asks for, and the conversion itself where a device has it."""
    net = nn.Sequential(nn.Linear(128, 64, dtype=torch.float16), nn.Conv2d(64, 32, 3, dtype=torch.float16))
    pruned = compress(net, IterativePruning(0.5, Select(), granularity="2:4", scope="layer"))
    matrices = [pruned[0].weight, pruned[1].weight.permute(0, 2, 3, 1).flatten(1)]  # channels last: inputs together
    for matrix in matrices:
        rows, columns = matrix.shape
        assert rows % 32 == 0
        assert columns % 64 == 0
        assert set((matrix.reshape(-1, 4) != 0).sum(1).tolist()) == {2}
        if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8:
            device = matrix.detach().contiguous().cuda()
            assert torch.equal(torch.sparse.to_sparse_semi_structured(device).to_dense(), device)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"schedule": 0.9, "granularity": "2:4"},
            r"`final` is 0\.9, but `granularity` '2:4' removes exactly 0\.5; write 0\.5",
        ),
        ({"schedule": 0.5, "granularity": "1:4"}, r"removes exactly 0\.75"),
        (
            {"schedule": 0.5, "granularity": "2:4", "rules": {"a": Rule("*", 0.3)}},
            r"`amount of rule 'a'` is 0\.3.*'2:4'",
        ),
        ({"schedule": 0.5, "granularity": "filtr"}, r"`granularity` is 'filtr': did you mean 'filter'"),
        ({"schedule": 0.5, "granularity": 124}, r"`granularity` must be a string.*quotes"),
        ({"schedule": 0.5, "score": "gradienf"}, r"`score` is 'gradienf': did you mean 'gradient'"),
        (
            {"schedule": 0.5, "score": "bn_scale"},
            r"`score` 'bn_scale' rates whole filters, but `granularity` is 'element'",
        ),
        ({"schedule": 0.5, "scope": "lampe"}, r"`scope` is 'lampe': did you mean 'lamp'"),
    ],
)
def test_constructor_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        IterativePruning(**arguments)


def test_a_rule_may_spare_a_layer_from_the_pattern() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    pruned = compress(net, IterativePruning(0.5, Select(), granularity="2:4", rules={"first": Rule("0", 0)}))
    assert [int((layer.weight == 0).sum()) for layer in pruned] == [0, 32]


@pytest.mark.parametrize("scope", ["global", "layer", "global_normalized", "erk", "lamp"])
def test_rules_and_floors_hold_for_filters(scope: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 20, 1))
    net[1].weight.data *= 1e-3
    method = IterativePruning(
        0.6, Select(), scope=scope, rules={"last": Rule("2", 0.33)}, floor=0.25, granularity="filter"
    )
    pruned = compress(net, method)
    gone = [int((layer.weight.flatten(1) == 0).all(1).sum()) for layer in pruned]
    assert gone[2] == 6  # 0.33 of 20, from below
    assert gone[1] <= 12
    assert gone[0] * 27 + gone[1] * 144 <= 0.6 * (16 * 27 + 16 * 144)
    assert gone[0] + gone[1] > 0


def test_the_plan_names_score_granularity_and_scope() -> None:
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3))
    rules = {"first": Rule("0", 0.25)}
    method = IterativePruning(0.5, Select(), scope="lamp", rules=rules, score="l1_norm", granularity="filter")
    compress(net, method)
    rows = method.plan({"0": net[0], "1": net[1]})
    assert [row.action for row in rows] == [
        "prune to 0.25, by l1_norm, filter",
        "prune to 0.5 of all (lamp), by l1_norm, filter",
    ]


def test_units_of_a_pattern_are_inputs_of_one_output() -> None:
    weight = torch.arange(32.0).reshape(2, 4, 2, 2)
    assert to_units(weight, Layout(1, False, 2))[0, 0, :, 0].tolist() == [0.0, 4.0, 8.0, 12.0]
    assert parse_granularity("2:4").single


def test_the_plan_says_where_groups_are_too_few_for_an_amount() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 200, 3))
    callback = IterativePruning(0.99, Select(), granularity="filter", scope="layer")
    pruned = compress(net, callback)
    actions = [row.action for row in callback.plan(callback.layers(pruned))]
    assert "here 0.875 at most" in actions[0]
    assert "at most" not in actions[1]
    assert [float((layer.weight == 0).double().mean()) for layer in pruned] == [0.875, 0.99]
    element = IterativePruning(0.99, Select())
    assert all("at most" not in row.action for row in element.plan(element.layers(compress(net, element))))
