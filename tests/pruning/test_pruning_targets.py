"""Which tensors are pruned, which are left alone and why, rules, and constructor errors."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_compress.core.compress import compress
from lightning_compress.core.errors import ConfigurationError, SelectionError
from lightning_compress.core.schedule import Schedule
from lightning_compress.core.select import Select
from lightning_compress.core.targets import find_targets, weight_names
from lightning_compress.pruning.callbacks import IterativePruning
from lightning_compress.pruning.rules import Rule, as_rules

EVERYTHING = Select()


def pruned(model: nn.Module, *arguments: Any, **options: Any) -> nn.Module:
    return compress(model, IterativePruning(*arguments, **options))


def zeros(model: nn.Module) -> dict[str, int]:
    return {key: int((value == 0).sum()) for key, value in model.named_parameters()}


def half_everywhere(layer: nn.Module) -> set[str]:
    """Prune every tensor of one layer to a half; return the names of those that were."""
    holder = nn.Sequential(layer)
    with torch.no_grad():
        for parameter in holder.parameters():
            parameter.add_(torch.randn_like(parameter))  # no zero to begin with, biases neither
    found = pruned(holder, 0.5, EVERYTHING, scope="layer")
    hit = {key for key, count in zeros(found).items() if count}
    parameters = dict(found.named_parameters())
    assert all(zeros(found)[key] == round(0.5 * parameters[key].numel()) for key in hit)
    return {key.removeprefix("0.") for key in hit}


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 4),
        nn.Bilinear(3, 4, 2),
        nn.Conv1d(4, 6, 3),
        nn.Conv2d(4, 6, 3),
        nn.Conv3d(2, 4, 2),
        nn.ConvTranspose1d(4, 6, 3),
        nn.ConvTranspose2d(4, 6, 3),
        nn.ConvTranspose3d(2, 4, 2),
        nn.Conv2d(4, 8, 3, groups=2),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(4, 6, 3, dilation=2, bias=False),
    ],
    ids=lambda layer: f"{type(layer).__name__}-{getattr(layer, 'groups', 1)}",
)
def test_linear_and_convolution_weights(layer: nn.Module) -> None:
    assert half_everywhere(layer) == {"weight"}


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_weights(kind: Any) -> None:
    expected = {f"weight_{part}_l{n}{side}" for part in ("ih", "hh") for n in (0, 1) for side in ("", "_reverse")}
    assert half_everywhere(kind(4, 6, num_layers=2, bidirectional=True)) == expected


def test_lstm_projections_and_cells() -> None:
    assert half_everywhere(nn.LSTM(4, 6, proj_size=2)) == {"weight_ih_l0", "weight_hh_l0", "weight_hr_l0"}
    for cell in (nn.LSTMCell(4, 6), nn.GRUCell(4, 6), nn.RNNCell(4, 6)):
        assert half_everywhere(cell) == {"weight_ih", "weight_hh"}


def test_attention_in_both_forms() -> None:
    assert half_everywhere(nn.MultiheadAttention(8, 2)) == {"in_proj_weight", "out_proj.weight"}
    assert half_everywhere(nn.MultiheadAttention(8, 2, kdim=4, vdim=6, add_bias_kv=True)) == {
        "q_proj_weight",
        "k_proj_weight",
        "v_proj_weight",
        "out_proj.weight",
    }


@pytest.mark.parametrize(
    "layer",
    [nn.Embedding(4, 4), nn.BatchNorm2d(4), nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.PReLU(), nn.EmbeddingBag(4, 4)],
)
def test_embeddings_and_norms_are_no_targets(layer: nn.Module) -> None:
    with pytest.raises(SelectionError, match="no layer that this method can work on"):
        pruned(nn.Sequential(layer), 0.5, EVERYTHING)


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrized_weights_are_left_alone_and_named(wrap: Any) -> None:
    net = nn.Sequential(wrap(nn.Linear(4, 4)), nn.Linear(4, 4))
    targets, left = find_targets(net, {"0": net[0], "1": net[1]})
    assert [target.key for target in targets] == ["1.weight"]
    assert "parametrized" in left["0.weight"]
    rnn = nn.Sequential(wrap(nn.LSTM(4, 3), "weight_hh_l0"))
    targets, left = find_targets(rnn, {"0": rnn[0]})
    assert [target.key for target in targets] == ["0.weight_ih_l0"]
    assert "parametrized" in left["0.weight_hh_l0"]
    assert set(weight_names(rnn[0])) == {"weight_ih_l0", "weight_hh_l0"}


def test_only_parametrized_weights_is_an_error_that_says_so() -> None:
    with pytest.raises(SelectionError, match=r"no tensor of the selected layers.*0.weight: kept: not a plain"):
        pruned(nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4))), 0.5, EVERYTHING)


def test_a_decoder_tied_to_an_embedding_is_kept_and_named() -> None:
    net = nn.ModuleDict({"embed": nn.Embedding(10, 4), "mid": nn.Linear(4, 4), "decode": nn.Linear(4, 10)})
    net["decode"].weight = net["embed"].weight
    targets, left = find_targets(net, {"mid": net["mid"], "decode": net["decode"]})
    assert [target.key for target in targets] == ["mid.weight"]
    assert left == {"decode.weight": "kept: tied with embed.weight, which is not selected"}


def test_tied_linears_are_pruned_once() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    targets, left = find_targets(net, {str(i): layer for i, layer in enumerate(net)})
    assert [(target.key, target.tied) for target in targets] == [("0.weight", ("1.weight",)), ("2.weight", ())]
    assert left == {"1.weight": "pruned as 0.weight, with which it is tied"}
    found = pruned(net, 0.5, EVERYTHING)
    assert found[0].weight is found[1].weight
    assert int((found[0].weight == 0).sum() + (found[2].weight == 0).sum()) == 16
    with pytest.raises(SelectionError, match=r"tied with 1\.weight"):
        pruned(net, 0.5, Select(include="0"))


def test_one_module_under_two_names_is_pruned() -> None:
    net = nn.ModuleDict({"model": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))})
    net["backbone"] = net["model"][0]
    found = pruned(net, 0.5, EVERYTHING, scope="layer")
    assert found["backbone"] is found["model"][0]
    assert int((found["backbone"].weight == 0).sum()) == 32


def test_lazy_layers_need_a_batch_first() -> None:
    net = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    with pytest.raises(ConfigurationError, match=r"'0.weight' has no shape yet.*run one batch"):
        find_targets(net, {"0": net[0]})
    for inplace in (False, True):
        with pytest.raises(ConfigurationError, match=r"(?i)'0.weight'.*lazy layer.*run "):
            compress(net, IterativePruning(0.5), inplace=inplace)
    net(torch.ones(1, 4))
    assert zeros(pruned(net, 0.5))["0.weight"] == 8


def test_frozen_weights_of_a_finished_model_are_pruned() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)
    found = pruned(net, 0.5, EVERYTHING)
    assert sum(zeros(found)[key] for key in ("0.weight", "1.weight")) == 16
    assert not any(parameter.requires_grad for parameter in found.parameters())


def net4() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10), nn.Linear(10, 10), nn.Linear(10, 10))


def test_the_last_matching_rule_wins_and_the_rest_is_shared() -> None:
    rules = {"most": Rule("*", 0.2), "first": Rule("0", 0.5), "none": Rule(("re:[23]",), 0)}
    found = zeros(pruned(net4(), 0.9, EVERYTHING, rules=rules))
    assert [found[f"{i}.weight"] for i in range(4)] == [50, 20, 0, 0]
    found = zeros(pruned(net4(), 0.9, EVERYTHING, rules={"first": Rule("0", 0.5)}))
    assert found["0.weight"] == 50
    assert sum(found[f"{i}.weight"] for i in (1, 2, 3)) == 270


def test_a_rule_that_names_the_last_layer_takes_it() -> None:
    found = zeros(pruned(net4(), 0.5, rules={"head": {"include": ["3"], "amount": 0.25}}))
    assert found["3.weight"] == 25
    assert zeros(pruned(net4(), 0.5))["3.weight"] == 0


def test_rules_can_narrow_by_exclude_and_type() -> None:
    rules = as_rules({"a": {"include": "*", "amount": 0.1, "exclude": ["1"], "types": ["Linear"]}})
    found = zeros(pruned(net4(), 0.5, EVERYTHING, rules=rules))
    assert [found[f"{i}.weight"] for i in range(4)] == [10, 50, 10, 10]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([Rule("a", 0.5)], "`rules` must be a mapping"),
        ({"stem": 0.5}, "rule 'stem' must be a Rule or a mapping with include, amount"),
        ({"stem": {"includez": "a", "amount": 0.5}}, "rule 'stem' has no argument 'includez': did you mean 'include'"),
        ({"stem": {"include": "a"}}, "rule 'stem' lacks `amount`"),
        ({"stem": {"amount": 0.1}}, "rule 'stem' lacks `include`"),
        ({"stem": {"include": "a", "amount": 50}}, r"rule 'stem'.*`amount`.*90 % is written 0\.9"),
        ({"stem": {"include": "a", "amount": True}}, "rule 'stem'.*`amount`"),
        ({"stem": {"include": "re:(", "amount": 0.5}}, "rule 'stem'.*regular expression"),
    ],
)
def test_bad_rules(rules: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        IterativePruning(0.5, rules=rules)


def test_a_rule_for_no_layer_is_an_error() -> None:
    with pytest.raises(SelectionError, match=r"rule 'stem'.*'convl'.*matches no module"):
        pruned(net4(), 0.5, rules={"stem": Rule("convl", 0.5)})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": 90}, r"`final` must be a number from 0 to 1, got 90; 90 % is written 0\.9"),
        ({"schedule": True}, "`final`"),
        ({"schedule": "0.9"}, "`final`"),
        ({"schedule": 0.99, "floor": 0.05}, "`final` is 0.99, but `floor` keeps 0.05"),
        ({"schedule": 1.0}, "`final` is 1, but `floor`"),
        ({"schedule": 0.5, "rules": {"a": Rule("*", 1)}}, "`amount of rule 'a'` is 1, but `floor`"),
        ({"schedule": Schedule(0.5, initial=0.6)}, r"`initial` \(0.6\) is above `final` \(0.5\)"),
        ({"schedule": 0.0, "rules": {"a": Rule("*", 0.5)}}, "`final` is 0, so rule 'a'.*would never prune"),
        ({"schedule": 0.5, "scope": "globall"}, "`scope` is 'globall': did you mean 'global'"),
        ({"schedule": 0.5, "scope": None}, "`scope`"),
        ({"schedule": 0.5, "floor": 1.0}, "`floor` must be a number from 0 to below 1"),
        ({"schedule": 0.5, "floor": -0.1}, "`floor`"),
        ({"schedule": 0.5, "floor": True}, "`floor`"),
        ({"schedule": 0.5, "floor": float("nan")}, "`floor`"),
        ({"schedule": 0.5, "select": "conv*"}, "`select` must be a Select"),
    ],
)
def test_constructor_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        IterativePruning(**arguments)


@pytest.mark.parametrize(("amount", "floor"), [(0.9, 0.1), (0.7, 0.3), (0.93, 0.07)])
def test_an_amount_that_the_floor_just_allows(amount: float, floor: float) -> None:
    found = zeros(pruned(net4(), amount, EVERYTHING, floor=floor))
    assert [found[f"{i}.weight"] for i in range(4)] == [round(100 * amount)] * 4
