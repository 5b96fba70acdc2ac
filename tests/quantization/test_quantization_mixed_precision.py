"""Bits divided over layers by one goal: against all divisions, on real digits, in files, and what is refused."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from networks import Small
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_compress import (
    BitGoal,
    ConfigurationError,
    PostTrainingQuantization,
    compress,
    load_compressed,
    save_compressed,
)
from lightning_compress.core.allocation import Line, least_error, total
from lightning_compress.data import DigitsDataModule
from lightning_compress.quantization import convert, quantizers_of
from lightning_compress.quantization.assignment import make_settings
from lightning_compress.quantization.layers import CLASSES
from lightning_compress.quantization.post_training.bit_lines import bit_lines, entropy_bytes
from lightning_compress.quantization.post_training.bit_metric import check_metric
from lightning_compress.quantization.post_training.search import largest_within

BITS = (2, 3, 4, 6, 8)


class Digits(nn.Sequential):
    """Two convolutions and two Linear layers of very different sizes."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10),
        )  # fmt: skip


Labelled = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, list[Labelled], Labelled]:
    """A network trained on digits, calibration batches with labels, and the test set."""
    data = DigitsDataModule(batch_size=64)
    data.prepare_data()
    data.setup("fit")
    batches = [(batch[0], batch[1]) for batch in data.train_dataloader()]
    data.setup("test")
    test = [torch.cat(part) for part in zip(*((b[0], b[1]) for b in data.test_dataloader()), strict=True)]
    torch.manual_seed(0)
    net = Digits()
    optimizer = torch.optim.Adam(net.parameters(), 4e-3)
    for x, y in batches * 6:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval(), batches[:4], (test[0], test[1])


def file_bytes(net: nn.Module, folder: Any) -> int:
    return save_compressed(convert(net), folder / "net.safetensors").bytes


def tensor_bytes(net: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in net.state_dict().values())


def lost(net: nn.Module, found: nn.Module, test: Labelled) -> float:
    with torch.no_grad():
        return float((found(test[0]) - net(test[0])).square().mean())


def test_the_division_is_nearly_the_best_of_all(trained) -> None:
    net, batches, _ = trained
    settings = make_settings(8, 8, {}, None)
    known = {path: layer for path, layer in net.named_modules() if isinstance(layer, tuple(CLASSES))}
    assigned = settings.assign(net, known)
    layers = bit_lines(net, assigned, BITS, list(known), batches)
    assert [layer.paths for layer in layers] == [(path,) for path in known]
    lines = [layer.line for layer in layers]
    for line in lines:
        assert (line.cost[1:] > line.cost[:-1]).all()
        assert (line.error[1:] < line.error[:-1]).all()
    everything = list(itertools.product(range(len(BITS)), repeat=len(lines)))
    for share in (0.3, 0.4, 0.5, 0.7, 0.9):
        budget = share * sum(float(line.cost[-1]) for line in lines)
        picks = least_error(lines, budget)
        assert picks is not None
        assert total(lines, picks) <= budget
        best = min(total(lines, other, "loss") for other in everything if total(lines, other) <= budget)
        assert total(lines, picks, "loss") <= 1.1 * best + 1e-6


def test_errors_are_those_of_outputs_and_bytes_those_of_files(trained) -> None:
    net, batches, _ = trained
    head = net[8]
    settings = make_settings(8, None, {}, None)
    (layer,) = bit_lines(net, settings.assign(net, {"8": head}), (3,), ["8"], batches)
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        for x, _ in batches:
            net(x)
    handle.remove()
    inputs = torch.cat(seen).double()
    inputs -= inputs.mean(0)  # the bias makes up for the mean
    weight = head.weight.detach().double()
    scale = (weight.abs().amax(1, keepdim=True) / 3).float().double()
    q = (weight / scale).round()
    error = (inputs @ (q * scale - weight).T).square().sum() / (inputs @ weight.T).square().sum()
    assert float(layer.line.error[0]) == pytest.approx(float(error), rel=1e-5)
    counts = torch.unique(q, return_counts=True)[1].double()
    assert float(layer.line.cost[0]) == pytest.approx(float(-(counts * (counts / q.numel()).log2()).sum() / 8))
    assert entropy_bytes(torch.zeros(9, dtype=torch.int8)) == 0


def test_a_budget_is_spent_where_files_become_smaller_all_at_once() -> None:
    costs, losses = np.arange(1000.0, 1100.0), np.linspace(1, 0, 100)
    line = Line(costs, losses, np.zeros(100))

    def measure(picks: tuple[int, ...]) -> float:  # from 1,050 on what is said beside the weights is folded
        return float(costs[picks[0]] + (500 if costs[picks[0]] < 1050 else 100))

    assert largest_within([line], 1530.0, measure) == ((99,), 1199.0)
    assert largest_within([line], 1190.0, measure)[1] == 1190.0
    assert largest_within([line], 1510.0, lambda picks: float(costs[picks[0]] + 500)) == ((10,), 1510.0)
    assert largest_within([line], 400.0, measure) == ((0,), 1500.0)


@pytest.mark.parametrize("size", [0.12, 0.17])
def test_a_size_is_obeyed_and_better_spent_than_evenly(trained, tmp_path, size: float) -> None:
    net, batches, test = trained
    callback = PostTrainingQuantization(batches, weights={"size": size}, ends=None)
    mixed = compress(net, callback)
    taken = file_bytes(mixed, tmp_path)
    assert 0.9 * size * tensor_bytes(net) < taken <= size * tensor_bytes(net)
    bits = callback.bits_by_layer
    assert len(set(bits.values())) > 1
    assert set(bits.values()) <= {2, 3, 4, 5, 6, 8}
    for path, number in bits.items():
        assert mixed.get_submodule(path).weight_quantizer.spec.bits == number
        assert f"to {number} bits" in next(row for row in callback.plan_text.splitlines()[2:] if row.split()[1] == path)
    even = [compress(net, PostTrainingQuantization(batches, weights=number, ends=None)) for number in BITS]
    smaller = [lost(net, one, test) for one in even if file_bytes(one, tmp_path) <= taken]
    assert smaller
    assert lost(net, mixed, test) < min(smaller)
    again = PostTrainingQuantization(batches, weights=BitGoal(size=size), ends=None)
    assert all(torch.equal(a, b) for a, b in zip(compress(net, again).parameters(), mixed.parameters(), strict=True))


def right(net: nn.Module, batches: list[Labelled]) -> float:
    with torch.no_grad():
        wrong = sum(int((net(x).argmax(1) != y).sum()) for x, y in batches)
    return 100 * (1 - wrong / sum(len(y) for _, y in batches))


def test_a_drop_is_obeyed_with_labels_without_them_and_by_any_metric(trained, tmp_path) -> None:
    net, batches, test = trained
    whole = file_bytes(compress(net, PostTrainingQuantization(batches, ends=None)), tmp_path)
    goal = {"drop": 1.0, "bits": [2, 4, 8]}
    for given in (batches, [x for x, _ in batches]):
        mixed = compress(net, PostTrainingQuantization(given, weights=goal, ends=None))
        assert file_bytes(mixed, tmp_path) < 0.6 * whole
        if given is batches:
            assert right(mixed, batches) >= right(net, batches) - 1.0
        else:
            with torch.no_grad():
                changed = sum(int((mixed(x).argmax(1) != net(x).argmax(1)).sum()) for x, _ in batches)
            assert changed <= 0.01 * sum(len(y) for _, y in batches)
    judged = BitGoal(drop=0.01, bits=[4, 8], metric=lambda model: -lost(net, model, test))
    assert lost(net, compress(net, PostTrainingQuantization(batches, weights=judged, ends=None)), test) <= 0.01


def test_rules_and_ends_keep_their_bits() -> None:
    net, x = Small(), torch.randn(16, 1, 16, 16)
    rules = {"right": {"include": "right", "weights": 3}, "left": {"include": "left", "activations": 6}}
    callback = PostTrainingQuantization(x, weights={"drop": 100, "bits": [2, 4]}, rules=rules, ends=6)
    compress(net, callback)
    bits = callback.bits_by_layer
    assert (bits["right"], bits["stem.0"], bits["head"]) == (3, 6, 6)
    assert {number for path, number in bits.items() if path not in ("right", "stem.0", "head")} == {2}
    goal = BitGoal(drop=100, bits=[2, 8], weights={"per_channel": False})
    quantized = compress(net, PostTrainingQuantization(x, weights=goal))
    assert not any(q.spec.per_channel for q in quantizers_of(quantized))


class Tied(nn.Module):
    """A decoder that shares its weight with an embedding, behind an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.recur, self.out = nn.Embedding(20, 12), nn.LSTM(12, 12, batch_first=True), nn.Linear(12, 20)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.recur(self.embed(tokens))[0][:, -1])


def test_layers_that_share_a_weight_get_the_same_bits_and_files_are_small(tmp_path) -> None:
    torch.manual_seed(0)
    net, tokens = Tied(), torch.randint(0, 20, (64, 7))
    callback = PostTrainingQuantization(tokens, weights={"drop": 20.0}, ends=None)
    quantized = compress(net, callback)
    bits = callback.bits_by_layer
    assert bits["embed"] == bits["out"]
    assert quantized.out.weight is quantized.embed.weight
    for layer in (quantized.embed, quantized.out):
        assert torch.equal(layer.quantized_weight(), layer.weight)
    weight = quantized.recur.weight_hh_l0
    assert torch.equal(quantized.recur.weight_quantizers["weight_hh_l0"](weight), weight)
    save_compressed(quantized, tmp_path / "net.safetensors")
    again = load_compressed(Tied(), tmp_path / "net.safetensors")
    with torch.no_grad():
        assert torch.equal(again.eval()(tokens), quantized.eval()(tokens))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"size": 0}, "`weights`: `size` must be a number above 0"),
        ({"size": 1}, "`size` must be a number above 0 and below 1"),
        ({"size": 0.1, "drop": 1}, "give one of `size` and `drop`"),
        ({"drop": -1}, "`drop` must be a number of at least 0"),
        ({"drop": 1, "bits": [4]}, "at least two different numbers"),
        ({"drop": 1, "bits": [1, 4]}, "`bits` must be an int from 2 to 8"),
        ({"drop": 1, "bits": 4}, "`bits` must be a list"),
        ({"size": 0.5, "metric": len}, "goes with `drop`"),
        ({"size": 0.5, "per_chanel": False}, "'per_channel'"),
        ({"size": 0.0001}, "comes to .* where .* is allowed"),
        ({"drop": 0, "metric": lambda net: -float(len(quantizers_of(net)))}, "comes to"),
        ({"drop": 1, "metric": lambda net: None}, "`metric` must return a number .* got a NoneType"),
        ({"drop": 1, "metric": lambda net: float("nan")}, "`metric` must return a number .* nan"),
        ({"drop": 1, "metric": lambda net: float("-inf")}, "`metric` must return a number .* -inf"),
        ({"drop": 1, "metric": lambda net: torch.ones(2)}, "`metric` must return a number .* shape .2."),
        ({"drop": 1, "metric": lambda net: 1.0 if not quantizers_of(net) else float("nan")}, "`metric` must return"),
    ],
)
def test_refuses(weights: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        compress(Small(), PostTrainingQuantization(torch.randn(4, 1, 16, 16), weights=weights))


def test_refuses_goals_that_have_nothing_to_divide_or_to_count() -> None:
    x = torch.randn(4, 1, 16, 16)
    rules = {"all": {"include": "*", "weights": 4}}
    with pytest.raises(ConfigurationError, match="rules decide on the bits of every layer"):
        compress(Small(), PostTrainingQuantization(x, weights={"size": 0.2}, rules=rules))

    class Pair(Small):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), x

    with pytest.raises(ConfigurationError, match="returns a tuple; give `metric`"):
        compress(Pair(), PostTrainingQuantization(x, weights={"drop": 1}))


class Untrained(LightningModule):
    """Must not be trained."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        raise AssertionError("trained")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Answers(Small):
    """Returns its answers alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).argmax(1)


def misspelled(model: Any) -> float:
    return float(model.no_such_thing)


@pytest.mark.parametrize(
    ("net", "weights", "rules", "message"),
    [
        (
            Small,
            {"drop": 1, "metric": misspelled},
            None,
            "`metric` failed on Untrained .*AttributeError.*no_such_thing",
        ),
        (Small, {"drop": 1, "metric": lambda net, data: 1.0}, None, "`metric` failed .*TypeError"),
        (Small, {"drop": 1, "metric": lambda net: {"accuracy": 1.0}}, None, "`metric` must return a number .* a dict"),
        (Answers, {"drop": 1}, None, "`drop` counts the largest of the outputs .* shape .4."),
        (Small, {"size": 0.2}, {"all": {"include": "*", "weights": 4}}, "rules decide on the bits of every layer"),
    ],
)
def test_refuses_before_training_what_can_be_known_then(net: Any, weights: Any, rules: Any, message: str) -> None:
    x = torch.randn(4, 1, 16, 16)
    callback = PostTrainingQuantization(x, weights=weights, rules=rules)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, callbacks=callback, **options)
    with pytest.raises(ConfigurationError, match=message):
        trainer.fit(Untrained(net()), DataLoader(x, 4))


def test_a_metric_that_is_no_number_yet_is_no_error_before_training() -> None:
    check_metric(Small(), BitGoal(drop=1.0, metric=lambda model: float("nan")), None)
