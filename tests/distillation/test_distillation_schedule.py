"""Ramps follow the schedule's formula and the optimizer's updates; comparisons by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kd_models import Classifier, Net, fit
from lightning.pytorch import Callback

from lightning_compress import ConfigurationError, Distillation, Schedule
from lightning_compress.core.schedule import Horizon
from lightning_compress.distillation import Ramp
from lightning_compress.distillation.fit import comparison


def test_a_ramp_by_hand() -> None:
    half = Schedule(final=1.0, shape="linear", end="50%", every={"step": 1})
    course = Ramp(2.0, 10.0, half).resolve(Horizon(20, 5))
    assert [course(t) for t in (0, 5, 10, 19)] == [2.0, 6.0, 10.0, 10.0]
    cosine = Ramp(0.0, 1.0, Schedule(final=1.0, shape="cosine", end={"step": 4}, every={"step": 1}))
    assert cosine.resolve(Horizon(20, 5))(2) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ramp(float("nan"), 1.0), "`begin of a Ramp` must be a number"),
        (lambda: Ramp(0.0, True), "`end of a Ramp` must be a number"),
        (lambda: Ramp(0.0, 1.0, "linear"), "`schedule` of a Ramp must be a Schedule"),
        (lambda: Distillation(temperature=Ramp(4.0, 0.0)), "`temperature` must be above 0"),
    ],
)
def test_ramps_that_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_updates_count_not_batches() -> None:
    """Two batches an update: the ramp moves every second batch."""
    seen = []

    class Look(Callback):
        def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
            seen.append(distill.distiller.now(distill.distiller.temperature))

    distill = Distillation(Net(8), temperature=Ramp(8.0, 4.0))
    fit(Classifier(), [distill, Look()], epochs=2, accumulate_grad_batches=2)
    assert seen == pytest.approx([8.0, 8.0, 8 - 4 / 3, 8 - 4 / 3, 8 - 8 / 3, 8 - 8 / 3, 4.0, 4.0])


def test_comparisons_by_hand() -> None:
    ours, theirs = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0, 0.0], [3.0, 1.0]])
    found = comparison(ours, theirs, torch.tensor([1, 0]))
    assert {name: value.item() for name, value in found.items()} == {"agreement": 0.5, "accuracy": 0.5}
    values = comparison(ours[:, :1], theirs[:, :1], torch.tensor([[2.0], [1.0]]))
    assert {name: value.item() for name, value in values.items()} == {"distance": 5.0, "mse": 2.0}
    assert comparison(ours, theirs[:1], None) == {}
    maps = torch.zeros(2, 3, 4, 4)
    assert comparison(maps, maps, torch.zeros(2, 4, 4, dtype=torch.long))["accuracy"] == 1
