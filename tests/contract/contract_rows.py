"""Tiny modules with the shapes that break methods, and the rows of the contract table."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_compress import (
    Binarization,
    CompressionCallback,
    Distillation,
    DistillationModule,
    DynamicSparseTraining,
    Edit,
    FisherPruning,
    FixedPointTraining,
    IntegerConversion,
    IterativePruning,
    LotteryTicket,
    LowRank,
    NeuronMerging,
    OptimalBrainCompression,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    Rule,
    Schedule,
    Select,
    SoftWeightSharing,
    SparsityRegularization,
    StructuredPruning,
    Ternarization,
    WeightSharing,
    ZeroChannelRemoval,
    apply,
    register_kind,
)
from lightning_compress.data.order import ResumableLoader
from lightning_compress.distillation import FitNetsHints, KnowledgeDistillation, Ramp, Term
from lightning_compress.low_rank.ranking import RankSearch
from lightning_compress.pruning.structured.latency_search import LatencySearch
from lightning_compress.quantization.sharing import EntropyConstrained, Fisher, KMeans, SharingRule, Uniform


class Mixed(nn.Module):
    """Residual, concat, depthwise, grouped and dilated convolutions, dropout, batch norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        y = self.grouped(F.relu(self.depthwise(x))) + x
        return self.head(self.drop(torch.cat([x.mean((2, 3)), y.amax((2, 3))], 1)))


class Sequences(nn.Module):
    """Embedding tied to the output, attention, LSTM, Conv1d and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.recur = nn.LSTM(8, 8, batch_first=True)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.decode = nn.Linear(8, 11, bias=False)
        self.decode.weight = self.embed.weight
        self.head = nn.Linear(11, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x.flatten(1) * 3).long().remainder(11)[:, :9]
        e = self.embed(tokens)
        e = e + self.conv(e.transpose(1, 2)).transpose(1, 2)
        e = e + self.attend(e, e, e, need_weights=False)[0]
        return self.head(self.decode(self.frozen(self.recur(e)[0][:, -1])))


class MLP(nn.Module):
    """Linear layers only."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU())
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x))


class Silent(MLP):
    """An MLP five of whose hidden neurons are zero, and get no gradient through the ReLU."""

    def __init__(self) -> None:
        super().__init__()
        for parameter in self.layers[1].parameters():
            nn.init.zeros_(parameter[3:8])


def dataset() -> TensorDataset:
    """Return 48 fixed images of 6 x 6 in three classes."""
    generator = torch.Generator().manual_seed(7)
    images = torch.rand(48, 1, 6, 6, generator=generator)
    return TensorDataset(images, images.mean((1, 2, 3)).argsort().argsort() // 16)


class Task(LightningModule):
    """An ordinary LightningModule; it knows nothing of compression."""

    def __init__(self, net: str = "Mixed") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = {"Mixed": Mixed, "Sequences": Sequences, "MLP": MLP, "Silent": Silent}[net]()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=0.01, weight_decay=0.1)

    def train_dataloader(self) -> ResumableLoader:
        return ResumableLoader(dataset(), batch_size=6, seed=3)

    def val_dataloader(self) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(dataset(), batch_size=24, generator=torch.Generator())

    test_dataloader = val_dataloader


# --- methods that exist only to exercise the core: each verb, and structure chosen from data


class TwoFactors(nn.Module):
    """A Linear as the product of two, of a rank that is chosen from the weights."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@register_kind("replace", "test_two_factors")
def two_factors(layer: nn.Linear, inputs: int, outputs: int, rank: int) -> nn.Module:
    return TwoFactors(inputs, outputs, rank).to(layer.weight.device)


class Halve(nn.Module):
    """Half the weight."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.5


@register_kind("parametrize", "test_halve")
def halve(layer: nn.Module) -> nn.Module:
    return Halve()


class Probe(CompressionCallback):
    """Does nothing between the edits."""

    supported = (nn.Linear,)

    def __init__(self) -> None:
        super().__init__(Schedule(final=1.0, shape="once", start="50%"), Select(include=("net.layers",)))

    def update(self, layers: Mapping[str, nn.Module], amount: float) -> None:
        self.seen = amount

    def metrics(self, layers: Mapping[str, nn.Module]) -> Mapping[str, float]:
        return {"seen": self.seen}


class RankFromData(Probe):
    """Replace before fit, with a rank that depends on the weights."""

    def prepare(self, layers: Mapping[str, nn.Module]) -> Iterable[Edit]:
        for path, layer in layers.items():
            if isinstance(layer, nn.Linear) and not path.endswith(("first", "second")):
                rank = 2 + int(layer.weight.detach().abs().sum() * 1000) % 5
                config = {"inputs": layer.in_features, "outputs": layer.out_features, "rank": rank}
                yield Edit("replace", path, "test_two_factors", config)


class Parametrized(Probe):
    """Parametrize before fit."""

    def prepare(self, layers: Mapping[str, nn.Module]) -> Iterable[Edit]:
        for path, layer in layers.items():
            if not nn.utils.parametrize.is_parametrized(layer):
                yield Edit("parametrize", path, "test_halve", {"tensor": "weight"})

    def finalize(self, layers: Mapping[str, nn.Module]) -> Iterable[Edit]:
        return [Edit("bake", path, "", {"tensor": "weight"}) for path in layers]


class SliceAtEnd(Probe):
    """Slice after fit, by the weights."""

    def finalize(self, layers: Mapping[str, nn.Module]) -> Iterable[Edit]:
        first, second = layers["net.layers.1"], layers["net.layers.3"]
        keep = sorted(first.weight.abs().sum(1).topk(9).indices.tolist())
        yield Edit(
            "slice",
            "net.layers.1",
            "",
            {"tensors": {"weight": {"0": keep}, "bias": {"0": keep}}, "attributes": {"out_features": 9}},
        )
        yield Edit("slice", "net.layers.3", "", {"tensors": {"weight": {"1": keep}}, "attributes": {"in_features": 9}})
        assert second is not None


class LatencyByCount(LatencySearch):
    """A clock that is the same everywhere but in the second process, which nobody should listen to."""

    def measure(self, models: Sequence[nn.Module], seconds: float) -> list[list[float]]:
        shift = 1000.0 * int(os.environ.get("RANK", "0"))
        return [[shift + sum(p.numel() for p in model.parameters())] for model in models]


class StructuredByCount(StructuredPruning):
    """Cuts to a latency that depends on the parameters alone."""

    _searches_with = LatencyByCount


class RanksByCount(RankSearch):
    """The same clock for ranks."""

    def measure(self, models: Sequence[nn.Module], inputs: Any, seconds: float) -> list[list[float]]:
        shift = 1000.0 * int(os.environ.get("RANK", "0"))
        return [[shift + sum(p.numel() for p in model.parameters())] for model in models]


class LowRankByCount(LowRank):
    """Chooses ranks for a latency that depends on the parameters alone."""

    _searches_with = RanksByCount


@dataclass(frozen=True)
class Row:
    """One method under contract.

    Args:
        name: Id of the row.
        build: Returns the callback.
        net: Name of the network in :class:`Task`.
        prepared: Expected (verb, path) of edits before fit.
        finalized: Expected (verb, path) of edits after fit.
        metric: A metric it must log.
        nothing: Returns the callback with a selection that matches no layer.
        wrap: Returns what is trained: the task itself, or the task under a teacher.
        beside: Returns callbacks that stand before this one.
    """

    name: str
    build: Callable[[], CompressionCallback]
    net: str
    metric: str
    prepared: tuple[tuple[str, str], ...] = ()
    finalized: tuple[tuple[str, str], ...] = ()
    nothing: Callable[[], CompressionCallback] | None = field(default=None)
    wrap: Callable[[Task], LightningModule] = field(default=lambda task: task)
    beside: Callable[[], list[Callback]] = field(default=list)


def teacher_of(net: str) -> nn.Module:
    """Return the same teacher whatever the seed of the run."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(5)
        return Task(net)


def _begun(task: Task) -> Task:
    """Return a task with the factors that a first round made."""
    for name, method, rank in _BEGUN:
        apply(task, Edit("replace", f"net.{name}", "low_rank", {"method": method, "ranks": [rank]}))
    return task


def _under(net: str, *layers: str) -> dict[str, Any]:
    losses = {"kd": Term(KnowledgeDistillation(), 0.5), "hint": Term(FitNetsHints(), 0.1, pairs=list(layers))}
    return {"teacher": teacher_of(net), "losses": losses, "temperature": Ramp(6.0, 2.0)}


def _distilled(net: str) -> tuple[str, Callable[[Task], LightningModule], Callable[[], list[Callback]]]:
    return "distilled", lambda task: DistillationModule(task, **_under(net, "net.stem", "net.grouped")), list


def _beside_distillation(net: str) -> tuple[str, Callable[[Task], LightningModule], Callable[[], list[Callback]]]:
    def beside() -> list[Callback]:
        return [Distillation(**_under(net, "net.stem", "net.grouped"))]

    return "beside_distillation", lambda task: task, beside


def _pruning(final: float = 0.75, every: int = 1, **arguments: Any) -> Callable[[], CompressionCallback]:
    return lambda: IterativePruning(Schedule(final, end="60%", every={"step": every}), floor=0.02, **arguments)


def _sharing(start: int = 5, **arguments: Any) -> Callable[[], CompressionCallback]:
    schedule = Schedule(1.0, start={"step": start}, shape="once")
    return lambda: WeightSharing(**{"quantizer": 3, **arguments}, schedule=schedule)


def _sparsity(strength: float, *arguments: Any, **more: Any) -> Callable[[], CompressionCallback]:
    schedule = Schedule(1.0, end="60%", every={"step": 1})
    return lambda: SparsityRegularization(strength, *arguments, schedule=schedule, **more)


_QUANTIZED_MIXED = ("stem", "depthwise", "grouped", "head", "grouped", "drop")
_QUANTIZED_SEQUENCES = (
    *("embed", "conv", "attend", "recur", "frozen", "decode", "head"),
    *("embed", "conv", "frozen", "decode"),
)
_HIDDEN = ("net.layers.1", "net.layers.3")
_MIDDLE = ("net.depthwise", "net.grouped")
_CONV3D = Select(types=("Conv3d",))
_FACTORED = tuple(("replace", f"net.{name}") for name in ("stem", "grouped", "head"))
_BEGUN = (("stem", "spatial_svd", 3), ("grouped", "svd", 4), ("head", "svd", 3))
"""Layers of ``Mixed``, the method of their first factors, and the rank."""


def _nothing() -> CompressionCallback:
    return IterativePruning(0.5, Select(types=("Conv3d",)))


ROWS = (
    Row("pruning_global", _pruning(), "Mixed", "compress/sparsity", nothing=_nothing),
    Row(
        "pruning_layer_rules",
        _pruning(scope="layer", rules={"stem": Rule("net.stem", 0.3), "head": Rule("net.head", 0.5)}),
        "Mixed",
        "compress/sparsity",
        nothing=_nothing,
    ),
    Row("pruning_sequences", _pruning(), "Sequences", "compress/sparsity", nothing=_nothing),
    *(
        Row(f"pruning_{name}", _pruning(**arguments), net, "compress/sparsity", nothing=_nothing)
        for name, net, arguments in (
            ("gradient_filter", "Mixed", {"score": "gradient", "granularity": "filter", "every": 4}),
            ("wanda", "Mixed", {"score": "wanda", "scope": "layer", "every": 4}),
            ("movement_2to4", "MLP", {"score": "movement", "granularity": "2:4", "final": 0.5, "every": 4}),
            ("obd_erk", "Mixed", {"score": "obd", "scope": "erk", "every": 4}),
            ("lamp", "Sequences", {"scope": "lamp"}),
            ("random_kernel", "Mixed", {"score": "random", "granularity": "kernel", "scope": "global_normalized"}),
            ("snip_block", "Sequences", {"score": "snip", "granularity": "block:2x2", "every": 4}),
        )
    ),
    Row(
        "rigl",
        lambda: DynamicSparseTraining(0.8, every={"step": 2}, end="60%"),
        "Mixed",
        "compress/sparsity",
        nothing=lambda: DynamicSparseTraining(0.8, select=Select(types=("Conv3d",))),
    ),
    Row(
        "set_uniform",
        lambda: DynamicSparseTraining(0.5, "set", distribution="uniform", every={"step": 3}),
        "Sequences",
        "compress/moved",
        nothing=lambda: DynamicSparseTraining(0.8, select=Select(types=("Conv3d",))),
    ),
    Row(
        "lottery",
        lambda: LotteryTicket(0.3, rewind={"step": 5}),
        "Mixed",
        "compress/round",
        nothing=lambda: LotteryTicket(select=Select(types=("Conv3d",))),
    ),
    *(
        Row(
            f"qat_{name}",
            build,
            net,
            "compress/quantizing",
            prepared=tuple(("replace", f"net.{path}") for path in layers),
            nothing=lambda: QuantizationAwareTraining(select=Select(types=("Conv3d",))),
        )
        for name, net, layers, build in (
            ("int8", "Mixed", _QUANTIZED_MIXED, QuantizationAwareTraining),
            (
                "learned",
                "Mixed",
                _QUANTIZED_MIXED,
                lambda: QuantizationAwareTraining({"bits": 3, "range": "lsq"}, {"bits": 3, "range": "pact"}),
            ),
            (
                "sequences",
                "Sequences",
                _QUANTIZED_SEQUENCES,
                lambda: QuantizationAwareTraining({"bits": 4, "range": "lsq"}, {"range": "lsq+"}, freeze={}),
            ),
            (
                "rules",
                "MLP",
                ("layers.1", "layers.3", "head", "layers.0", "layers.2", "layers.4"),
                lambda: QuantizationAwareTraining(
                    {"bits": 2, "range": "dorefa", "per_channel": False},
                    {"bits": 4, "range": "percentile"},
                    rules={"head": {"include": "net.head", "weights": {"bits": 6, "range": "mse"}}},
                ),
            ),
        )
    ),
    *(
        Row(
            f"ptq_{name}",
            lambda arguments=arguments: PostTrainingQuantization([dataset()[:]], **arguments),
            net,
            "compress/weight_bits",
            finalized=tuple(("replace", f"net.{path}") for path in layers),
            nothing=lambda: PostTrainingQuantization([dataset()[:]], select=Select(types=("Conv3d",))),
        )
        for name, net, layers, arguments in (
            ("int8", "Mixed", _QUANTIZED_MIXED, {}),
            ("tensor", "Mixed", _QUANTIZED_MIXED, {"weights": {"bits": 4, "per_channel": False}}),
            ("goal", "Mixed", _QUANTIZED_MIXED, {"weights": {"drop": 100.0, "bits": [3, 8]}}),
            (
                "sequences",
                "Sequences",
                _QUANTIZED_SEQUENCES,
                {"weights": 4, "activations": {"range": "percentile"}, "steps": {"rounding": "adaround"}},
            ),
        )
    ),
    Row(
        "integers",
        IntegerConversion,
        "Mixed",
        "compress/integer_layers",
        prepared=tuple(("replace", f"net.{path}") for path in _QUANTIZED_MIXED),
        finalized=tuple(
            ("replace", f"net.{path}")
            for path in (
                *("stem", "depthwise", "grouped", "head", "norm"),
                *("stem.input_quantizer", "depthwise.input_quantizer", "grouped.input_quantizer"),
                *("grouped.output_quantizer", "drop.output_quantizer"),
            )
        ),
        beside=lambda: [QuantizationAwareTraining()],
    ),
    Row("optimal_brain", lambda: OptimalBrainCompression(0.5, [dataset()[:]]), "MLP", "compress/sparsity"),
    Row("fisher_pruning", lambda: FisherPruning(0.5, [dataset()[:]], block=8), "MLP", "compress/sparsity"),
    Row(
        "neuron_merging",
        lambda: NeuronMerging(0.5),
        "MLP",
        "compress/neurons",
        finalized=tuple(("slice", path) for path in (*_HIDDEN, _HIDDEN[1], "net.head")),
    ),
    Row(
        "structured_channels",
        lambda: StructuredPruning(Schedule(final=0.5, end="60%", every={"step": 1})),
        "MLP",
        "compress/channels",
        finalized=tuple(("slice", path) for path in (*_HIDDEN, "net.head")),
        nothing=lambda: StructuredPruning(0.5, select=Select(types=("Conv3d",))),
    ),
    Row(
        "structured_latency",
        lambda: StructuredByCount(Schedule(final=1.0, end="60%", every={"step": 1}), latency=0.6),
        "MLP",
        "compress/latency",
        finalized=tuple(("slice", path) for path in (*_HIDDEN, "net.head")),
        nothing=lambda: StructuredByCount(latency=0.5, select=Select(types=("Conv3d",))),
    ),
    Row(
        "structured_taylor",
        lambda: StructuredPruning(Schedule(final=0.5, end="60%", every={"step": 4}), ranking="taylor"),
        "Mixed",
        "compress/channels",
        finalized=tuple(("slice", f"net.{name}") for name in ("stem", "norm", "depthwise", "grouped", "head")),
        nothing=lambda: StructuredPruning(0.5, select=Select(types=("Conv3d",))),
    ),
    Row(
        "structured_heads",
        lambda: StructuredPruning(Schedule(final=0.5, end="60%", every={"step": 1})),
        "Sequences",
        "compress/channels",
        finalized=(("replace", "net.attend"),),
        nothing=lambda: StructuredPruning(0.5, select=Select(types=("Conv3d",))),
    ),
    Row(
        "structured_macs",
        lambda: StructuredPruning(Schedule(final=1.0, end="60%", every={"step": 1}), macs=0.6),
        "Mixed",
        "compress/macs",
        finalized=tuple(("slice", f"net.{name}") for name in ("stem", "norm", "depthwise", "grouped", "head")),
        nothing=lambda: StructuredPruning(macs=0.5, select=Select(types=("Conv3d",))),
    ),
    *(
        Row(f"sparsity_{name}", build, net, "compress/zero_groups", nothing=_sparsity(1.0, select=_CONV3D))
        for name, net, build in (
            ("l1", "Sequences", _sparsity(1.0, "l1")),
            ("filters", "Mixed", _sparsity(1.0, "filter", threshold=0.6)),
            ("channels_penalty", "Mixed", _sparsity(0.1, "channel", mode="penalty", threshold=0.8)),
            ("depth", "Mixed", _sparsity(1.0, "depth", threshold=0.9)),
            ("slimming", "Mixed", _sparsity(1.0, "slimming", threshold=0.98)),
        )
    ),
    Row(
        "zero_channels",
        ZeroChannelRemoval,
        "Silent",
        "compress/channels",
        finalized=tuple(("slice", path) for path in _HIDDEN),
        nothing=lambda: ZeroChannelRemoval(_CONV3D),
    ),
    *(
        Row(
            f"binary_{name}",
            build,
            net,
            "compress/strength",
            tuple((verb, path) for verb in ("replace", "parametrize")[-verbs:] for path in paths),
            tuple(("bake", path) for path in paths),
            nothing=lambda: Ternarization(select=_CONV3D),
        )
        for name, net, verbs, paths, build in (
            ("connect", "Mixed", 1, _MIDDLE, lambda: Binarization(stochastic=True)),
            ("xnor", "Mixed", 2, _MIDDLE, lambda: Binarization("xnor")),
            ("loss_aware", "MLP", 1, _HIDDEN[1:], lambda: Binarization("loss_aware")),
            ("ternary", "Mixed", 1, _MIDDLE, lambda: Ternarization(schedule=Schedule(1.0, end="60%", shape="linear"))),
        )
    ),
    *(
        Row(
            f"low_rank_{name}",
            build,
            net,
            "compress/parameters",
            prepared,
            finalized,
            nothing=lambda: LowRank(factors=2, select=_CONV3D),
        )
        for name, net, build, prepared, finalized in (
            ("before", "Mixed", lambda: LowRank(factors=2, when="before"), _FACTORED, ()),
            ("after", "Sequences", lambda: LowRank(compression_rate=1.15), (), ()),
            (
                "by_data",
                "MLP",
                lambda: LowRank(factors={"rank": {"energy": 0.6}}, when="before", batches=[dataset()[:]]),
                (("replace", "net.layers.1"), ("replace", "net.head")),
                (),
            ),
            (
                "by_outputs",
                "MLP",
                lambda: LowRank(factors={"rank": 6, "keep": "outputs"}, when="before", batches=[dataset()[:]]),
                (("replace", "net.layers.1"), ("replace", "net.layers.3")),
                (),
            ),
            (
                "batch_norm",
                "Mixed",
                lambda: LowRank(factors={"rank": 2, "batch_norm": True}, when="before", select=Select(types="Conv2d")),
                _FACTORED[:2],
                (),
            ),
            (
                "latency",
                "MLP",
                lambda: LowRankByCount(latency=0.6, when="before", batches=[dataset()[:]]),
                (("replace", "net.layers.1"),),
                (),
            ),
        )
    ),
    Row(
        "fixed_point",
        lambda: FixedPointTraining([3, 9], [5, 9], [2, 12]),
        "Mixed",
        "compress/saturated",
        tuple(("replace", f"net.{name}") for name in ("stem", "depthwise", "grouped", "head")),
        nothing=lambda: FixedPointTraining(select=_CONV3D),
    ),
    Row(
        "fixed_point_weights",
        lambda: FixedPointTraining([3, 9], None, None),
        "Sequences",
        "compress/saturated",
        nothing=lambda: FixedPointTraining(select=_CONV3D),
    ),
    *(
        Row(
            f"sharing_{name}",
            _sharing(start, **arguments),
            net,
            "compress/bits",
            nothing=_sharing(select=_CONV3D),
            beside=(lambda: [_pruning(0.5)()]) if name == "pruned" else list,
        )
        for name, net, start, arguments in (
            ("at_once", "Sequences", 0, {"rules": {"head": SharingRule("net.head", 1)}}),
            ("pruned", "Mixed", 7, {"quantizer": 2}),
            ("global", "Sequences", 5, {"quantizer": KMeans(4, init="k-means++"), "scope": "global"}),
            ("gradients", "Mixed", 5, {"quantizer": EntropyConstrained(2.0), "importance": "gradients"}),
            ("adam_mean", "MLP", 5, {"quantizer": Uniform(2.5), "importance": "adam", "gradient": "mean"}),
            ("fisher", "MLP", 5, {"importance": Fisher([dataset()[:]], samples=24)}),
        )
    ),
    Row(
        "soft_sharing",
        lambda: SoftWeightSharing(1e-4, 6, rate=0.01, schedule=Schedule(1.0, end="60%", every={"step": 1})),
        "Sequences",
        "compress/zeros",
        nothing=lambda: SoftWeightSharing(1e-4, select=_CONV3D),
    ),
    Row(
        "pruning_distilled",
        _pruning(),
        "Mixed",
        "compress/sparsity",
        nothing=_nothing,
        wrap=lambda task: DistillationModule(task, **_under("Mixed", "net.stem", "net.grouped")),
    ),
    Row(
        "pruning_beside_distillation",
        _pruning(every=4, score="gradient"),
        "Sequences",
        "compress/sparsity",
        nothing=_nothing,
        beside=lambda: [Distillation(**_under("Sequences", "net.conv", "net.recur"))],
    ),
    Row(
        "structured_distilled",
        lambda: StructuredPruning(Schedule(final=0.5, end="60%", every={"step": 1})),
        "MLP",
        "compress/channels",
        finalized=tuple(("slice", path) for path in (*_HIDDEN, "net.head")),
        wrap=lambda task: DistillationModule(task, **_under("MLP", "net.layers.*")),
    ),
    Row(
        "probe_replace_distilled",
        RankFromData,
        "MLP",
        "compress/seen",
        tuple(("replace", p) for p in _HIDDEN),
        wrap=lambda task: DistillationModule(task, **_under("MLP", *_HIDDEN)),
    ),
    Row(
        "binary_distilled",
        lambda: Binarization("xnor"),
        "Mixed",
        "compress/strength",
        tuple((verb, path) for verb in ("replace", "parametrize") for path in _MIDDLE),
        tuple(("bake", path) for path in _MIDDLE),
        nothing=lambda: Ternarization(select=_CONV3D),
        wrap=lambda task: DistillationModule(task, **_under("Mixed", "net.stem", "net.grouped")),
    ),
    Row(
        "fixed_point_beside_distillation",
        lambda: FixedPointTraining([3, 9], [5, 9], [2, 12]),
        "Mixed",
        "compress/saturated",
        tuple(("replace", f"net.{name}") for name in ("stem", "depthwise", "grouped", "head")),
        nothing=lambda: FixedPointTraining(select=_CONV3D),
        beside=lambda: [Distillation(**_under("Mixed", "net.stem", "net.grouped"))],
    ),
    *(
        Row(
            f"qat_{name}",
            lambda: QuantizationAwareTraining({"bits": 4, "range": "lsq"}, {"bits": 4, "range": "lsq+"}),
            "Mixed",
            "compress/quantizing",
            prepared=tuple(("replace", f"net.{path}") for path in _QUANTIZED_MIXED),
            nothing=lambda: QuantizationAwareTraining(select=_CONV3D),
            wrap=wrap,
            beside=beside,
        )
        for name, wrap, beside in (_distilled("Mixed"), _beside_distillation("Mixed"))
    ),
    *(
        Row(
            f"low_rank_{name}",
            lambda: LowRank(factors=2, when="before"),
            "Mixed",
            "compress/parameters",
            _FACTORED,
            nothing=lambda: LowRank(factors=2, select=_CONV3D),
            wrap=wrap,
            beside=beside,
        )
        for name, wrap, beside in (_distilled("Mixed"), _beside_distillation("Mixed"))
    ),
    Row(
        "low_rank_in_rounds",
        lambda: LowRank(factors=2, when="before"),
        "Mixed",
        "compress/parameters",
        (*_FACTORED, *_FACTORED),
        nothing=lambda: LowRank(factors=2, select=_CONV3D),
        wrap=_begun,
    ),
    Row(
        "low_rank_after_distilled",
        lambda: LowRank(compression_rate=1.15),
        "Sequences",
        "compress/parameters",
        nothing=lambda: LowRank(factors=2, select=_CONV3D),
        wrap=lambda task: DistillationModule(task, **_under("Sequences", "net.conv", "net.recur")),
    ),
    Row("probe_replace_by_data", RankFromData, "MLP", "compress/seen", tuple(("replace", p) for p in _HIDDEN)),
    Row(
        "probe_parametrize_and_bake",
        Parametrized,
        "MLP",
        "compress/seen",
        tuple(("parametrize", p) for p in _HIDDEN),
        tuple(("bake", p) for p in _HIDDEN),
    ),
    Row("probe_slice", SliceAtEnd, "MLP", "compress/seen", (), tuple(("slice", p) for p in _HIDDEN)),
)
