"""The callback: goals, ranks, layers of every kind, stages, and bad input."""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import Any

import pytest
import torch
from contract_rows import Mixed, Sequences, Task, dataset
from lightning.pytorch import Trainer
from torch import Tensor, nn

import lightning_compress as lc
from lightning_compress import ConfigurationError, LowRank, Select, SelectionError, compress, journal_of
from lightning_compress.low_rank.decompose import factorize
from lightning_compress.low_rank.layers import Factorized

IMAGES = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(0))
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
}


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(800, 40),
        nn.Linear(40, 5),
    )


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def macs(model: nn.Module) -> int:
    from lightning_compress.core.cost import count_macs

    total = count_macs(model, IMAGES[:1]).total
    assert total is not None
    return total


@pytest.mark.parametrize("rate", [1.2, 2.0, 5.0])
@pytest.mark.parametrize("favor", ["speed", "accuracy"])
@pytest.mark.parametrize("batches", [None, [IMAGES]], ids=["weights", "data"])
def test_a_compression_rate_is_met_within_one_rank(rate: float, favor: str, batches: Any) -> None:
    net = small()
    done = compress(net, LowRank(rate, factors={"favor": favor}, batches=batches), example_inputs=IMAGES)
    assert size(done) <= size(net) / rate
    steps = [
        sum(dense_in + dense_out for dense_in, dense_out in [_ends(layer)])
        for layer in done.modules()
        if isinstance(layer, Factorized)
    ]
    assert size(net) / rate - size(done) < max(steps)
    assert torch.isfinite(done.eval()(IMAGES)).all()


def _ends(layer: Factorized) -> tuple[int, int]:
    """Return what one more rank costs before and behind it."""
    (rank,) = layer.ranks
    return tuple(part.weight.numel() // rank for part in layer.layers())  # type: ignore[return-value]


@pytest.mark.parametrize("share", [0.8, 0.4])
def test_a_share_of_the_operations_is_met_within_one_rank(share: float) -> None:
    net = small()
    done = compress(net, LowRank(macs=share), example_inputs=IMAGES)
    assert share - 0.05 < macs(done) / macs(net) <= share


def test_accuracy_has_the_least_error_and_speed_no_more_than_an_equal_share() -> None:
    net = small()
    done = {
        favor: compress(net, LowRank(4.0, factors={"favor": favor}, batches=[IMAGES]), example_inputs=IMAGES)
        for favor in ("accuracy", "speed")
    }
    assert macs(done["speed"]) < macs(done["accuracy"])


def test_ranks_are_multiples_on_request() -> None:
    done = compress(small(), LowRank(3.0, factors={"round_to": 8}), example_inputs=IMAGES)
    ranks = [rank for layer in done.modules() if isinstance(layer, Factorized) for rank in layer.ranks]
    assert ranks
    assert all(rank % 8 == 0 for rank in ranks)


def test_rules_give_single_layers_ranks_and_methods() -> None:
    rules = {
        "mix": {"include": "3", "method": "channel_svd", "rank": 7},
        "head": {"include": "7", "rank": 2},
        "wide": {"include": "6", "round_to": 4},
    }
    net = small()
    done = compress(net, LowRank(3.0, factors={"rules": rules}), example_inputs=IMAGES)
    assert (done[3].method, done[3].ranks, done[7].ranks) == ("channel_svd", (7,), (2,))
    assert done[6].ranks[0] % 4 == 0
    assert size(net) / 3.3 < size(done) <= size(net) / 3


def test_ranks_by_energy_ratio_and_number() -> None:
    net = small()
    energetic = compress(net, LowRank(factors={"rank": {"energy": 0.8}}))
    errors = [edit.config["error"] for edit in journal_of(energetic)]
    assert errors
    assert all(error**2 <= 0.2 + 1e-4 for error in errors)
    third = compress(net, LowRank(factors={"rank": {"ratio": 3}}))
    assert size(third[6]) <= size(net[6]) / 3 < size(third[6]) + 840
    assert compress(net, LowRank(factors=4))[6].ranks == (4,)


def test_noise_is_said_to_be_noise() -> None:
    net = nn.Sequential(nn.Linear(60, 50))
    with pytest.warns(UserWarning, match="nothing but noise in 0"):
        assert compress(net, LowRank(factors="evbmf"))[0].ranks == (1,)


def test_what_would_grow_or_is_never_called_stays_and_is_named() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.tiny = nn.Linear(30, 30), nn.Linear(30, 30), nn.Linear(30, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.tiny(self.used(x))

    method = LowRank(factors=14)
    done = compress(Partly(), method, example_inputs=torch.zeros(1, 30))
    assert [edit.path for edit in journal_of(done)] == ["used"]
    assert "stays: the model does not call it" in method.plan_text
    assert "stays: the rank [14] is above its full rank [2]" in method.plan_text
    method = LowRank(factors=2)
    compress(Partly(), method)
    assert "stays: at [2] it would grow from 62 to 66 parameters" in method.plan_text


def test_tied_attention_recurrent_and_depthwise_layers_are_named() -> None:
    for net, names in (
        (Sequences(), ("embed", "attend", "attend.out_proj", "recur", "decode")),
        (Mixed(), ("depthwise",)),
    ):
        method = LowRank(factors=2)
        done = compress(net, method, example_inputs=dataset().tensors[0])
        for name in names:
            assert any(line.split()[:2] == ["kept", name] for line in method.plan_text.splitlines())
        assert torch.isfinite(done.eval()(dataset().tensors[0])).all()


@pytest.mark.parametrize("batch_first", [True, False])
def test_encoder_layers_work_in_training_and_evaluation(batch_first: bool) -> None:
    net = nn.Sequential(nn.TransformerEncoderLayer(16, 4, 64, batch_first=batch_first), nn.Linear(16, 16))
    method = LowRank(factors=4)
    done = compress(net, method)
    for mode in (True, False):
        done.train(mode)
        with torch.no_grad():
            assert torch.isfinite(done(torch.randn(3, 5, 16))).all()
    assert isinstance(done[0].linear1, Factorized) != batch_first


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_keep_theirs(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(128, 6)).to(dtype)
    done = compress(net, LowRank(2.0))
    assert {parameter.dtype for parameter in done.parameters()} == {dtype}


def test_frozen_layers_stay_frozen_and_shared_ones_shared() -> None:
    shared = nn.Linear(24, 24)
    net = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(24, 24).requires_grad_(False))
    done = compress(net, LowRank(factors=5))
    assert done[0] is done[2]
    assert not any(parameter.requires_grad for parameter in done[3].factors.parameters())


def test_compiled_parts_and_nested_modules() -> None:
    task = Task("MLP")
    task.net = torch.compile(task.net)  # type: ignore[assignment]
    done = compress(task, LowRank(factors=3))
    assert [edit.path for edit in journal_of(done)] == ["net.layers.1", "net.layers.3"]


def test_factors_become_smaller_factors_of_the_same_layer(tmp_path: Any) -> None:
    net = small()
    once = compress(net, LowRank(2.0))
    method = LowRank(2.0, batches=[IMAGES])
    twice = compress(once, method, example_inputs=IMAGES)
    assert size(twice) <= size(once) / 2
    assert not any(".factors." in edit.path for edit in journal_of(twice))
    factors = [layer for layer in twice.modules() if isinstance(layer, Factorized)]
    assert factors
    assert not any(isinstance(part, Factorized) for layer in factors for part in layer.layers())
    assert "times fewer; biases and norms not counted" in method.plan_text
    lc.save_compressed(twice, tmp_path / "twice.safetensors")  # a reload replays both rounds
    again = lc.load_compressed(small(), tmp_path / "twice.safetensors")
    assert torch.equal(again.eval()(IMAGES), twice.eval()(IMAGES))


def test_smaller_factors_are_those_of_what_the_larger_ones_make() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 20))
    once = compress(net, LowRank(factors=12))
    straight, twice = compress(net, LowRank(factors=5)), compress(once, LowRank(factors=5))
    assert twice[0].ranks == (5,)
    expected, found = straight[0].to_dense(), twice[0].to_dense()
    assert torch.allclose(found.weight, expected.weight, atol=1e-6)
    assert torch.equal(found.bias, net[0].bias)


def test_what_factors_save_counts_from_what_they_are_now() -> None:
    once = compress(small(), LowRank(factors={"rank": {"ratio": 2}}))
    before = {path: size(layer) for path, layer in once.named_modules() if isinstance(layer, Factorized)}
    method = LowRank(factors={"rank": {"ratio": 2}})
    twice = compress(once, method)
    after = {path: size(layer) for path, layer in twice.named_modules() if isinstance(layer, Factorized)}
    assert any(after[path] < before[path] for path in before)
    assert all(after[path] <= before[path] / 2 or after[path] == before[path] for path in before)
    method = LowRank(factors=8)
    compress(compress(small(), LowRank(factors=8)), method)
    assert "stays: its rank is [8] already" in method.plan_text


def test_single_factors_can_be_named(tmp_path: Any) -> None:
    once = compress(small(), LowRank(factors=8, select=Select(include="6")))
    twice = compress(once, LowRank(factors=3, select=Select(include="6.factors.0")))
    assert isinstance(twice[6].factors[0], Factorized)
    assert torch.allclose(twice[6].to_dense()(torch.ones(1, 800)), twice[6](torch.ones(1, 800)), atol=1e-4)
    inner = compress(once, LowRank(factors=3, select=Select(include="6.factors.1")))
    assert torch.allclose(inner[6].to_dense()(torch.ones(1, 800)), inner[6](torch.ones(1, 800)), atol=1e-4)


def test_the_last_layer_is_left_alone_as_factors_too() -> None:
    once = compress(small(), LowRank(factors=4))
    method = LowRank(factors=2, select=Select(not_last=True))
    twice = compress(once, method)
    assert (twice[6].ranks, twice[7].ranks) == ((2,), (4,))
    assert "the last layer" in method.plan_text
    types = compress(once, LowRank(factors=2, select=Select(types="Linear")))
    assert (types[3].ranks, types[6].ranks, types[7].ranks) == ((4,), (2,), (2,))


def test_one_callback_object_compresses_further_each_time_it_is_called() -> None:
    net, method = small(), LowRank(1.5)
    once = compress(net, method)
    twice = compress(once, method)
    assert size(twice) <= size(net) / 2.25


def test_factors_are_pruned_merged_and_cut() -> None:
    net = small()
    done = compress(net, LowRank(2.0), lc.IterativePruning(0.5), example_inputs=IMAGES)
    zeros = sum(int((p == 0).sum()) for p in done.parameters())
    assert zeros > 0.4 * size(done)
    cut = compress(compress(net, LowRank(2.0)), lc.StructuredPruning(0.3), example_inputs=IMAGES)
    assert size(cut) < 0.9 * size(net) / 2
    for edit in list(journal_of(done)):
        lc.apply(done, lc.Edit("bake", edit.path))
    assert not any(isinstance(layer, Factorized) for layer in done.modules())


def test_a_stage_between_two_fits(tmp_path: Any) -> None:
    first = Task("MLP")
    Trainer(max_epochs=1, **QUIET).fit(first)
    second = compress(first, LowRank(1.6))
    before = copy.deepcopy(second.state_dict())
    Trainer(max_epochs=1, **QUIET).fit(second)
    assert any(not torch.equal(before[key], value) for key, value in second.state_dict().items() if "factors" in key)
    lc.save_compressed(second, tmp_path / "m.safetensors")
    again = lc.load_compressed(Task("MLP"), tmp_path / "m.safetensors")
    assert torch.equal(again(dataset().tensors[0]), second(dataset().tensors[0]))


def test_gradually_in_rounds_of_fitting() -> None:
    task = Task("MLP")
    sizes = [size(task)]
    for _ in range(3):
        Trainer(max_epochs=1, callbacks=[LowRank(1.3, when="before")], **QUIET).fit(task)
        sizes.append(size(task))
    assert all(later <= earlier / 1.3 for earlier, later in itertools.pairwise(sizes))


def test_errors_are_recorded_and_the_plan_shows_ranks() -> None:
    method = LowRank(factors={"rank": {"ratio": 2}})
    done = compress(small(), method)
    for edit in journal_of(done):
        assert 0 < edit.config["error"] < 1
        assert f"rank {edit.config['ranks'][0]}" in method.plan_text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "must say how far to go"),
        ({"compression_rate": 2, "macs": 0.5}, "are two goals"),
        ({"compression_rate": 2, "factors": 8}, "`compression_rate` chooses ranks, but `factors` gives 8"),
        ({"compression_rate": 1}, "`compression_rate` must be a number above 1"),
        ({"compression_rate": True}, "`compression_rate` must be a number"),
        ({"macs": 1.5}, "`macs` must be a number above 0 and at most 1"),
        ({"latency": 2.0}, "`share` of `latency`"),
        ({"factors": "tuckr"}, "`method` is 'tuckr'"),
        ({"factors": 0}, "`rank` must be a whole number >= 1"),
        ({"factors": {"rank": {"energy": 1.5}}}, "`energy` of `rank`"),
        ({"factors": {"rank": {"power": 1}}}, "one key, 'energy' or 'ratio'"),
        ({"factors": {"ranks": 4}}, "did you mean 'rank'"),
        ({"factors": {"rank": 4, "favor": "size"}}, "`favor` is 'size'"),
        ({"factors": {"rank": 4, "round_to": 0}}, "`round_to` must be an int >= 1"),
        ({"factors": {"rules": {"a": {"include": "0"}}}}, "at least one of"),
        ({"compression_rate": 2, "when": "during"}, "`when` is 'during'"),
        ({"compression_rate": 2, "batches": iter([])}, "read again"),
    ],
)
def test_bad_arguments_are_one_clear_error(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        LowRank(**arguments)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (LowRank(100.0), r"`compression_rate` asks for 100 times fewer parameters; the selected layers allow \d"),
        (LowRank(macs=0.001), r"`macs` asks for 0.001 of the operations; the selected layers allow 0\.\d+ at least"),
        (LowRank(factors={"rules": {"a": {"include": "7", "rank": 9}}}), r"`rank` of '7' may be up to \[5\]"),
        (LowRank(factors={"rank": (4, 4)}), "takes one rank"),
        (LowRank(2.0, factors={"rules": {"a": {"include": "1", "rank": 9}}}), "which cannot be factorized"),
        (LowRank(2.0, factors={"rules": {"a": {"include": "lairs", "rank": 9}}}), "rule 'a' of `factors`"),
    ],
)
def test_what_does_not_fit_the_model_is_one_clear_error(method: LowRank, message: str) -> None:
    net = small()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ConfigurationError, match=message):
        compress(net, method, example_inputs=IMAGES, inplace=True)
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in before.items())


def test_operations_need_an_example() -> None:
    with pytest.raises(ConfigurationError, match="`macs` needs to know the sizes of inputs"):
        compress(small(), LowRank(macs=0.5))


def test_a_goal_out_of_reach_is_refused_before_training() -> None:
    task = Task("MLP")
    with pytest.raises(ConfigurationError, match="allow"):
        Trainer(max_epochs=1, callbacks=[LowRank(90.0)], **QUIET).fit(task)
    assert task.trainer.global_step == 0


def test_models_without_factorizable_layers_are_refused() -> None:
    with pytest.raises(SelectionError, match="no layer of Sequential can be factorized: 0: kept: depthwise"):
        compress(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)), LowRank(factors=1))
    with pytest.raises(SelectionError, match="lairs"):
        compress(small(), LowRank(factors=1, select=Select(include="lairs")))


def test_a_measured_latency_is_met_and_recorded() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1500, 1500), nn.ReLU(), nn.Linear(1500, 1500), nn.ReLU(), nn.Linear(1500, 8))
    method = LowRank(latency={"share": 0.85, "seconds": 2.0})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a busy machine may miss it
        done = compress(net, method, example_inputs=torch.randn(4, 1500))
    assert size(done) < size(net)
    assert 0 < method.history[0]["latency"] < 1


def test_layers_that_are_called_by_keyword_still_are() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.head = nn.Conv1d(12, 16, 3), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(input=self.mix(input=x).mean(-1))
            return out

    for factors in ({"rank": 3}, {"rank": 3, "keep": "outputs"}):
        done = compress(Named(), LowRank(factors=factors, batches=[torch.randn(9, 12, 8)]))
        assert sum(isinstance(layer, Factorized) for layer in done.modules()) == 2
        assert torch.isfinite(done(torch.randn(2, 12, 8))).all()
    train = factorize(nn.Linear(48, 36), "tt", (8, 8)).module
    assert train(input=torch.randn(2, 48)).shape == (2, 36)


def test_terms_are_chosen_with_calibration_data_too() -> None:
    net = small()
    done = compress(net, LowRank(1.05, factors="cp", batches=[IMAGES]), example_inputs=IMAGES)
    assert size(done) <= size(net) / 1.05
    assert done[3].method == "cp"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("factors", [2, {"rank": 2, "keep": "outputs"}, {"rank": {"energy": 0.9}}, "evbmf"])
def test_numbers_that_are_none_are_named_before_anything_is_computed(bad: float, factors: Any) -> None:
    batches = [torch.randn(8, 16)]
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    with torch.no_grad():
        net[2].weight[1, 3] = bad
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ConfigurationError, match=r"`2.weight` holds NaN or infinity"):
        compress(net, LowRank(factors=factors, batches=batches), inplace=True)
    assert all(torch.equal(value.nan_to_num(), before[key].nan_to_num()) for key, value in net.state_dict().items())
    with torch.no_grad():
        net[2].weight[1, 3] = 0
    batches[0][3, 5] = bad
    with pytest.raises(ConfigurationError, match=r"`batches`: what '0' sees on them holds NaN or infinity"):
        compress(net, LowRank(factors=factors, batches=batches))
