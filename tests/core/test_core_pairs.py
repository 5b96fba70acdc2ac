"""Methods that cannot be used together are refused in the same words by ``compress`` and by a Trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_compress import (
    Binarization,
    CompressionCallback,
    ConfigurationError,
    FixedPointTraining,
    IntegerConversion,
    IterativePruning,
    LowRank,
    NeuronMerging,
    OptimalBrainCompression,
    PostTrainingQuantization,
    Schedule,
    Select,
    StructuredPruning,
    WeightSharing,
    ZeroChannelRemoval,
    compress,
)

X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


class Net(LightningModule):
    """Three layers, the first with two rows of zeros, as an earlier training might have left them."""

    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = X
        self.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        with torch.no_grad():
            for tensor in self.net[0].parameters():
                tensor[:2] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        raise AssertionError("trained")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Halves(CompressionCallback):
    """Halves weights, before pruning only, and never beside sharing."""

    supported = (nn.Linear,)
    runs_before = (IterativePruning,)
    conflicts_with = (WeightSharing,)

    def __init__(self) -> None:
        super().__init__(Schedule(1.0, shape="once"), Select())

    def update(self, layers: Any, amount: float) -> None:
        for layer in layers.values():
            layer.weight /= 2


def in_trainer(*methods: Any) -> None:
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=4, accelerator="cpu", enable_model_summary=False, callbacks=list(methods), **options)
    trainer.fit(Net(), torch.utils.data.DataLoader(X, 8))


def at_once(*methods: Any) -> None:
    compress(Net(), *methods)


def sharing() -> WeightSharing:
    return WeightSharing(2)


def before() -> LowRank:
    return LowRank(factors=2, when="before")


def after() -> LowRank:
    return LowRank(factors=2)


@pytest.mark.parametrize("way", [in_trainer, at_once])
@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ((Binarization, sharing), "Binarization and WeightSharing would both hold the weights of 'net.2' at values"),
        ((sharing, Binarization), "Binarization and WeightSharing would both hold the weights of 'net.2' at values"),
        ((lambda: FixedPointTraining([2, 6], [4, 1]), sharing), "FixedPointTraining and WeightSharing would both hold"),
        ((sharing, lambda: WeightSharing(3, name="b")), "WeightSharing and WeightSharing would both hold the weights"),
        (
            (lambda: FixedPointTraining([2, 6], name="a"), FixedPointTraining),
            "FixedPointTraining and FixedPointTraining would both hold the weights of 'net.0'",
        ),
        ((Halves, sharing), "Halves and WeightSharing change the same weights; remove one of them"),
        ((lambda: IterativePruning(0.5), Halves), "in the wrong order: put Halves before IterativePruning"),
        ((sharing, lambda: IterativePruning(0.5)), "put IterativePruning first"),
        ((IntegerConversion, lambda: PostTrainingQuantization(X)), "IntegerConversion, which leaves nothing to it"),
    ],
)
def test_both_ways_refuse_the_same_pairs(
    way: Callable[..., None], methods: tuple[Callable[[], Any], ...], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        way(*(build() for build in methods))


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ((sharing, before), "has LowRank after WeightSharing, and replaces 'net.0', 'net.2', which"),
        ((FixedPointTraining, before), "put LowRank before FixedPointTraining"),
        (
            (sharing, after),
            "LowRank makes new weights of 'net.0', 'net.2', 'net.4' after fit, so that what WeightSharing",
        ),
        ((after, lambda: IterativePruning(0.5)), "so that what IterativePruning holds in them while they train would"),
        ((after, Binarization), "put Binarization before LowRank"),
        (
            (lambda: IterativePruning(0.5), Binarization),
            r"'net\.2\.weight' is parametrized now, as another callback",
        ),
    ],
)
def test_layers_that_another_one_replaces_or_makes_anew_are_named_before_training(
    methods: tuple[Callable[[], Any], ...], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        in_trainer(*(build() for build in methods))


def test_layers_of_their_own_are_no_conflict_and_nothing_is_changed_before_the_refusal() -> None:
    first, rest = Select(include="net.0"), Select(exclude="net.0")
    made = compress(Net(), Binarization(select=first), WeightSharing(1, select=rest))
    assert [len(made.net[index].weight.unique()) for index in (0, 2, 4)] == [2, 2, 2]
    net = Net()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(ConfigurationError, match="would both hold"):
        compress(net, IterativePruning(0.5), Binarization(), sharing(), inplace=True)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_an_integer_model_is_left_to_nobody_also_where_a_fit_would_have_pruned_before() -> None:
    with pytest.raises(ConfigurationError, match="has IterativePruning behind IntegerConversion"):
        compress(Net(), PostTrainingQuantization(X), IntegerConversion(), IterativePruning(0.5))


@pytest.mark.parametrize("other", [lambda: StructuredPruning(0.25), lambda: NeuronMerging(0.25)])
def test_channels_may_be_cut_twice_one_after_the_other_but_not_after_one_fit(other: Callable[[], Any]) -> None:
    methods = ZeroChannelRemoval(), other()
    made = compress(Net(), *methods)
    assert made.net[0].out_features + made.net[2].out_features < 6 + 8
    assert made(X).isfinite().all()
    with pytest.raises(ConfigurationError, match="change the same weights"):
        in_trainer(*methods)


@pytest.mark.parametrize("first", [lambda: LowRank(factors=2), lambda: PostTrainingQuantization(X)])
@pytest.mark.parametrize(
    "second", [lambda: StructuredPruning(0.25), lambda: NeuronMerging(0.25), lambda: OptimalBrainCompression(0.25, X)]
)
def test_what_is_replaced_after_a_fit_is_not_pruned_behind_it(
    first: Callable[[], Any], second: Callable[[], Any]
) -> None:
    with pytest.raises(ConfigurationError, match=r"put (\w+) before (LowRank|PostTrainingQuantization), or compress"):
        in_trainer(first(), second())
    with pytest.raises(AssertionError, match="trained"):
        in_trainer(second(), first())
