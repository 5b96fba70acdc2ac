"""Every score x granularity x scope on three networks: it works, or one sentence says why it means nothing."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.schedule import Schedule
from lightning_compress.pruning.allocation import SCOPES
from lightning_compress.pruning.callbacks import IterativePruning
from lightning_compress.pruning.granularity import expand_mask, group_scores, layout_of, parse_granularity
from lightning_compress.pruning.scores import SCORES

GRANULARITIES = ("element", "row", "column", "kernel", "filter", "channel", "block:2x2", "2:4")
CELLS = list(itertools.product(SCORES, GRANULARITIES, SCOPES))


class Convolutions(nn.Module):
    """Residual and concat; grouped, depthwise and transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise, self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1, groups=2)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.head = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x.reshape(-1, 4, 3, 3))))
        y = x + self.grouped(F.relu(self.depthwise(x)))
        return self.head(torch.cat([x.mean((2, 3)), y.amax((2, 3)), self.up(y).mean((2, 3))], 1))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x.reshape(-1, 9, 4))).mean(1))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(36, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)
    )


NETS: dict[str, Any] = {"convolutions": Convolutions, "mlp": mlp, "transformer": Transformer}


class Task(LightningModule):
    def __init__(self, net: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = NETS[net]()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(0)
        return DataLoader(TensorDataset(torch.rand(12, 36, generator=generator), torch.arange(12) % 3), batch_size=4)


def reason(net: str, score: str, granularity: str, scope: str) -> str | None:
    """Return what an error must say where a cell means nothing, written down apart from the code that decides it."""
    if score == "geometric_median" and granularity not in ("row", "filter", "channel"):
        return "`score` 'geometric_median' rates whole filters or channels, but `granularity`"
    if score == "bn_scale" and granularity not in ("row", "filter"):
        return "`score` 'bn_scale' rates whole filters, but `granularity`"
    if score == "movement" and scope == "lamp":
        return "`scope` 'lamp' divides squared scores"
    if score == "bn_scale" and net == "transformer":
        return "no batch norm with a scale follows it"
    if granularity == "kernel" and net != "convolutions":
        return "`granularity` 'kernel' means single weights in every selected layer"
    return None


def check(net: str, score: str, granularity: str, scope: str) -> None:
    """Fit for three steps; look at every weight."""
    expected = reason(net, score, granularity, scope)
    model, schedule = Task(net), Schedule(0.5, end={"step": 2}, every={"step": 1})
    options = {"max_steps": 3, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    try:
        callback = IterativePruning(schedule, scope=scope, score=score, granularity=granularity)
        Trainer(**options, callbacks=[callback], enable_progress_bar=False, enable_model_summary=False).fit(model)
    except ConfigurationError as error:
        if expected is None or expected not in str(error):
            raise
        return
    assert expected is None, "this cell means nothing, but it worked"
    pruned = total = largest = 0
    layers = dict(model.named_modules())
    for key in callback._masks:
        layer, weight = layers[key.rpartition(".")[0]], model.get_parameter(key).detach()
        gone = weight == 0
        groups, layout = parse_granularity(granularity), layout_of(layer)
        if not groups.single:  # a group goes as a whole or stays as a whole
            first = group_scores(gone.float(), groups, layout, "first").to(torch.int8).neg()
            assert torch.equal(expand_mask(first, groups, layout, weight) != 0, gone)
            largest = max(largest, weight.numel() // first.numel())
        assert not gone.all()
        pruned, total = pruned + int(gone.sum()), total + weight.numel()
    assert torch.isfinite(model.net(torch.rand(2, 36))).all()
    assert callback.history[-1]["sparsity"] == pytest.approx(pruned / total)
    if granularity in ("element", "2:4"):
        assert pruned == 0.5 * total
    else:
        short = largest * (len(callback._masks) if scope in ("layer", "erk") else 1)
        assert 0.5 * total - short < pruned <= 0.5 * total


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("score", SCORES)
def test_a_fifth_of_the_grid(net: str, score: str) -> None:
    """Each granularity in one scope, another one for each score."""
    for place, granularity in enumerate(GRANULARITIES):
        check(net, score, granularity, SCOPES[(place + list(SCORES).index(score)) % len(SCOPES)])


@pytest.mark.slow
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(("score", "granularity", "scope"), CELLS)
def test_the_grid(net: str, score: str, granularity: str, scope: str) -> None:
    check(net, score, granularity, scope)


def test_there_are_as_many_cells_as_said() -> None:
    assert len(CELLS) * len(NETS) == 11 * 8 * 5 * 3
    refused = sum(reason(net, *cell) is not None for net in NETS for cell in CELLS)
    assert refused < len(CELLS) * len(NETS) / 4
