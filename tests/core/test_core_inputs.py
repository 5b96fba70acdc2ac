"""What models are called with, and calibration data that does not suit one, found before it is trained."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import (
    ConfigurationError,
    FisherPruning,
    LowRank,
    OptimalBrainCompression,
    PostTrainingQuantization,
    WeightSharing,
    compress,
)
from lightning_compress.core.calibration import run_on
from lightning_compress.core.first_look import check_first_batch, look_ahead
from lightning_compress.core.inputs import inputs_of
from lightning_compress.quantization.sharing.importance import Fisher


class Two(nn.Module):
    """Takes two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.c(F.relu(self.a(x) + self.b(y)))


class Whole(Two):
    """Takes a mapping as a whole."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return super().forward(batch["x"], batch["y"])


class Optional(Two):
    """Could do without its second input, and takes lists for its first."""

    def forward(self, x: Any, y: Any = None) -> Any:
        return x, y


class Keywords(Two):
    """Passes on whatever comes."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs


X, Y = torch.randn(16, 4, generator=torch.Generator().manual_seed(0)), torch.linspace(-1, 1, 48).reshape(16, 3)
TARGETS = torch.arange(16) % 2
BATCHES = {
    "tuple": (Two, ((X, Y), TARGETS)),
    "collated list": (Two, [[X, Y], TARGETS]),
    "mapping": (Two, ({"x": X, "y": Y}, TARGETS)),
    "extra keys": (Two, ({"x": X, "labels": TARGETS, "y": Y}, TARGETS)),
    "whole": (Whole, ({"x": X, "y": Y, "labels": TARGETS}, TARGETS)),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_every_way_of_inputs_reaches_the_model(kind: str) -> None:
    net, batch = BATCHES[kind]
    torch.manual_seed(0)
    model = net()
    expected = model.c(F.relu(model.a(X) + model.b(Y)))
    assert torch.equal(run_on(model, batch), expected)
    if isinstance(batch[0], dict):
        assert torch.equal(run_on(model, batch[0]), expected)


def test_what_forward_does_not_name_is_passed_as_it_is() -> None:
    given = {"x": 1, "labels": 2}
    assert inputs_of(Keywords(), given) == given
    assert inputs_of(Optional(), given) == {"x": 1}
    assert inputs_of(Optional(), {"y": 1}) == ({"y": 1},)
    assert inputs_of(Optional(), ([1, 2], "targets")) == ([1, 2],)  # images of many sizes, as detectors take them
    assert inputs_of(Optional(), ((1, 2), "targets")) == (1, 2)
    assert inputs_of(Keywords(), ([1, 2], "targets")) == (1, 2)
    packed = nn.utils.rnn.pack_padded_sequence(torch.zeros(2, 1, 3), torch.tensor([2]))
    assert inputs_of(nn.LSTM(3, 1), (packed, "targets"))[0] is packed
    assert inputs_of(torch.compile(Two()), {"x": 1, "y": 2, "z": 3}) == {"x": 1, "y": 2}


METHODS = {
    "quantization": lambda data: PostTrainingQuantization(data),
    "optimal brain compression": lambda data: OptimalBrainCompression(0.5, data),
    "fisher pruning": lambda data: FisherPruning(0.5, data, block=4),
    "sharing": lambda data: WeightSharing(3, importance=Fisher(data)),
    "low rank": lambda data: LowRank(factors={"rank": 1, "keep": "outputs"}, batches=data),
}


@pytest.mark.parametrize("kind", ["tuple", "extra keys", "whole"])
@pytest.mark.parametrize("method", METHODS)
def test_methods_agree_on_what_a_batch_is(method: str, kind: str) -> None:
    net, batch = BATCHES[kind]
    torch.manual_seed(0)
    model = net()
    made = compress(model, METHODS[method]([batch]))
    usual = compress(model, METHODS[method]([((X, Y), TARGETS)])) if net is Two else None
    with torch.no_grad():
        changed, before = run_on(made, batch), run_on(model, batch)
    assert not torch.equal(changed, before)
    assert changed.isfinite().all()
    if usual is not None:
        with torch.no_grad():
            assert torch.equal(usual(X, Y), changed)


class Module(LightningModule):
    """Trains a model of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Two()
        self.norm = nn.BatchNorm1d(4)
        self.steps = 0

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.net(F.dropout(self.norm(x), 0.5, self.training), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1
        x, y, target = batch
        return F.cross_entropy(self(x, y), target)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(module: Module, *callbacks: Any) -> None:
    data = DataLoader(TensorDataset(X, Y, TARGETS), 8, shuffle=True)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, callbacks=list(callbacks), **options)
    trainer.fit(module, data)


@pytest.mark.parametrize("method", METHODS)
def test_data_that_does_not_suit_the_model_is_refused_before_training(method: str) -> None:
    module = Module()
    plain = DataLoader(TensorDataset(X, TARGETS), 8)
    with pytest.raises(
        ConfigurationError, match=r"`batches`: Module cannot run on a calibration batch.*\(\(first, sec"
    ):
        fit(module, METHODS[method](plain))
    assert module.steps == 0
    wrong = [((X[:, :3], Y), TARGETS)]
    with pytest.raises(ConfigurationError, match=r"gives it a tuple \(a tensor of shape \[16, 3\]"):
        fit(module, METHODS[method](wrong))
    assert module.steps == 0


def test_looking_at_the_data_changes_nothing_of_a_run() -> None:
    results = []
    for callbacks in ([], [PostTrainingQuantization([((X, Y), TARGETS)])]):
        torch.manual_seed(0)
        module = Module()
        fit(module, *callbacks)
        results.append(module.state_dict())
    assert all(torch.equal(value, results[1][key]) for key, value in results[0].items())
    assert callbacks[0].compressed is not None

    class Drawing(TensorDataset):
        def __getitem__(self, index: Any) -> Any:
            random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002 - data sets of users do
            return super().__getitem__(index)

    def states() -> tuple[Any, ...]:
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()  # noqa: NPY002 - as above

    model, before = nn.Linear(4, 2), states()
    look_ahead(model, {}, DataLoader(Drawing(X, TARGETS), 4), 16)
    check_first_batch(model, DataLoader(Drawing(X, TARGETS), 4, shuffle=True))
    assert states() == before


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_data_that_is_not_finite_is_refused(method: str, value: float) -> None:
    bad = X.clone()
    bad[3, 1] = value
    with pytest.raises(ConfigurationError, match=r"`batches`: .*NaN or infinity"):
        compress(Two(), METHODS[method]([((X, Y), TARGETS), ((bad, Y), TARGETS)]))


AFTER_FIT = ["quantization", "optimal brain compression", "fisher pruning"]


def with_bad_rows(*rows: int) -> TensorDataset:
    x = torch.cat([X, X])
    x[list(rows), 1] = float("nan")
    return TensorDataset(x, torch.cat([Y, Y]), torch.cat([TARGETS, TARGETS]))


def as_pairs(samples: list[Any]) -> Any:
    x, y, targets = (torch.stack(part) for part in zip(*samples, strict=True))
    return (x, y), targets


@pytest.mark.parametrize("method", [*AFTER_FIT, "low rank"])
def test_later_batches_that_are_not_finite_are_refused_before_training_where_they_can_be_read(method: str) -> None:
    loader, module = DataLoader(with_bad_rows(20), 8, collate_fn=as_pairs), Module()
    for data in (loader, list(loader)):
        with pytest.raises(ConfigurationError, match=r"batch 2 of them holds such numbers"):
            fit(module, METHODS[method](data))
    assert module.steps == 0


@pytest.mark.parametrize("method", AFTER_FIT)
def test_batches_found_not_finite_after_training_cost_nothing_of_it(method: str) -> None:
    shuffled = DataLoader(with_bad_rows(20), 8, shuffle=True, collate_fn=as_pairs)
    modules = []
    for callbacks in ([], [METHODS[method](shuffled)]):
        torch.manual_seed(0)
        modules.append(Module())
        if not callbacks:
            fit(modules[-1])
            continue
        with pytest.raises(ConfigurationError, match=r"batch \d of them holds .*The training is not lost.*compress\("):
            fit(modules[-1], *callbacks)
        assert callbacks[0].compressed is None
    alone, module = (module.state_dict() for module in modules)
    assert all(torch.equal(value, module[key]) for key, value in alone.items())
    made = compress(modules[1], METHODS[method]([((X, Y), TARGETS)]))
    assert not torch.equal(made(X, Y), modules[1](X, Y))


def test_weights_that_are_not_finite_are_named_and_masks_of_minus_infinity_are_fine() -> None:
    model = Two()
    nn.init.constant_(model.b.weight[:1], float("nan"))
    with pytest.raises(ConfigurationError, match=r"`b.weight` holds NaN or infinity"):
        compress(model, PostTrainingQuantization([((X, Y), TARGETS)]))

    class Masked(Two):
        def forward(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
            return super().forward(x, y) + mask

    mask = torch.tensor([0.0, float("-inf")])
    made = compress(Masked(), PostTrainingQuantization([((X, Y, mask), TARGETS)], activations=None))
    assert made(X, Y, torch.zeros(2)).isfinite().all()


class TakesAPair(nn.Module):
    """Takes both inputs as one argument."""

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0] + pair[1]


def test_a_tuple_stays_one_argument_where_forward_takes_one() -> None:
    pair = torch.ones(2, 3), torch.zeros(2, 3)
    assert inputs_of(TakesAPair(), (pair, torch.zeros(2))) == (pair,)
    assert torch.equal(run_on(TakesAPair(), (pair, torch.zeros(2))), torch.ones(2, 3))
    check_first_batch(TakesAPair(), [(pair, torch.zeros(2))])
