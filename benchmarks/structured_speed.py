"""Removing channels: speed at half the operations, beside Torch-Pruning's own pruner at the same operations.

"Ours" is what a user gets without asking for widths; "any width" allows all numbers of channels, as Torch-Pruning does.
Parts can be measured one at a time, on an idle machine: what a run does not measure stays as an earlier one found it.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from benchmarks import _common as common
from benchmarks._common import Row, Times, median_of_ratios
from lightning_compress import StructuredPruning, compress
from lightning_compress.core.copies import full_copy
from lightning_compress.core.cost import count_macs, count_parameters
from lightning_compress.core.hooks import journal_of

MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "ResNet-18": (torchvision.models.resnet18, "fc"),
    "MobileNetV2": (torchvision.models.mobilenet_v2, "classifier.1"),
    "VGG-16": (torchvision.models.vgg16, "classifier.6"),
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
ROUNDS = {"ResNet-18": {1: 31, 16: 7}, "MobileNetV2": {1: 31, 16: 9}, "VGG-16": {1: 15, 16: 5}}
NAME = "structured_speed"
MACS = 0.5
GOAL = 1 / 1.8
_STEPS = 10
THEIRS = "Torch-Pruning"
OURS, ROUNDED, ANY = "ours", "ours, multiples of 16", "ours, any width"


def prune_theirs(model: nn.Module, example: Tensor, head: str, macs: float) -> nn.Module:
    """Return what Torch-Pruning's own pruner makes of a copy, at the largest channel ratio that meets the goal."""
    import torch_pruning as tp

    pruning: Any = tp
    whole = count_macs(model, example).total or 1
    low, high, found = 0.0, 0.9, model
    for _ in range(_STEPS):
        ratio, copied = (low + high) / 2, full_copy(model)
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            pruner = pruning.pruner.BasePruner(
                copied,
                example,
                importance=pruning.importance.GroupMagnitudeImportance(p=2),
                pruning_ratio=ratio,
                ignored_layers=[copied.get_submodule(head)],
                in_channel_groups={},
                out_channel_groups={},
                num_heads={},
            )
            pruner.step()
        if (count_macs(copied, example).total or 0) <= macs * whole:
            high, found = ratio, copied
        else:
            low = ratio
    return found


def candidates(name: str, macs: float = MACS, image: int = 224) -> dict[str, nn.Module]:
    """Return a network and what each pruner makes of it: theirs first, then ours at the operations that theirs met."""
    build, head = MODELS[name]
    torch.manual_seed(0)
    model, example = build().eval(), torch.zeros(1, 3, image, image)
    theirs = prune_theirs(model, example, head, macs)
    found = {"dense": model, THEIRS: theirs}
    reached = (count_macs(theirs, example).total or 0) / (count_macs(model, example).total or 1)
    for label, limits in ((OURS, None), (ROUNDED, {"round_to": 16}), (ANY, {"round_to": 1})):
        method = StructuredPruning(macs=reached, ranking={"scope": "layer"}, limits=limits)
        found[label] = compress(model, method, example_inputs=example)
    return found


def speed_rows(
    name: str, repeats: Mapping[int, int], image: int = 224, layouts: Sequence[str] = tuple(LAYOUTS)
) -> list[Row]:
    """Return the operations, parameters and milliseconds of each candidate.

    Args:
        name: A key of :data:`MODELS`.
        repeats: Rounds for each batch size.
        image: Height and width of the input.
        layouts: Keys of :data:`LAYOUTS`.
    """
    models = candidates(name, image=image)
    rows = size_rows(name, models, image)
    for layout in map(LAYOUTS.__getitem__, layouts):
        for model in models.values():
            model.to(memory_format=layout)
        for batch, rounds in repeats.items():
            inputs = torch.rand(batch, 3, image, image).to(memory_format=layout)
            with torch.inference_mode():
                times = common.time_calls({label: partial(model, inputs) for label, model in models.items()}, rounds)
            cpu = {label: 1e3 * taken for label, (_, taken) in times.items()}
            where = f"{str(layout).removeprefix('torch.')}, batch {batch}"
            first = (name, layout, batch) == ("ResNet-18", torch.channels_last, 1)
            rows += time_rows(name, cpu, where, first)
    return rows


def size_rows(name: str, models: Mapping[str, nn.Module], image: int) -> list[Row]:
    """Return operations and parameters; ours should be no larger than theirs."""
    example = torch.zeros(1, 3, image, image)
    macs = {label: (count_macs(model, example).total or 0) / 1e6 for label, model in models.items()}
    sizes = {label: count_parameters(model).total / 1e6 for label, model in models.items()}
    rows = []
    for label in models:
        for what, counted in (("operations", macs), ("parameters", sizes)):
            goal = counted[THEIRS] if (label, what) == (OURS, "parameters") else None
            case = f"{name}: {label}, {what}"
            rows.append(Row(case, counted[label], "M", "dense", counted[label] / counted["dense"], goal))
    return rows


def time_rows(name: str, cpu: Mapping[str, Times], where: str, first: bool) -> list[Row]:
    """Return the milliseconds of each candidate, and ours over theirs with the lower end of the 95 % interval."""
    dense, rows = float(np.median(cpu["dense"])), []
    for label, taken in cpu.items():
        median = float(np.median(taken))
        goal = dense * GOAL if first and label in (OURS, ROUNDED) else None
        rows.append(Row(f"{name}: {label}, {where}", median, "ms (CPU time)", "dense", median / dense, goal))
    for label in (OURS, ROUNDED, ANY):
        ratio = median_of_ratios(cpu[label], cpu[THEIRS])
        case = f"{name}: {label} over {THEIRS}, {where}"
        goal = None if label == ANY else 1.0
        rows.append(Row(case, ratio.low, "lower end of the 95 % interval", THEIRS, ratio.value, goal))
    return rows


def latency_rows(image: int = 224, seconds: float = 30.0) -> list[Row]:
    """Return what a goal of latency makes of ResNet-18, channels last, at batch 1."""
    torch.manual_seed(0)
    model = MODELS["ResNet-18"][0]().eval().to(memory_format=torch.channels_last)
    example = torch.zeros(1, 3, image, image).to(memory_format=torch.channels_last)
    method = StructuredPruning(latency={"share": GOAL, "seconds": seconds}, ranking={"scope": "layer"})
    cut = compress(model, method, example_inputs=example)
    measured = journal_of(cut).edits[0].config["measured"]
    before, after = measured["latency_ms"]
    case = f"ResNet-18: goal of {GOAL:.3f} of the latency, channels_last, batch 1"
    left = method.history[0]["macs"]
    return [
        Row(
            f"{case}: multiples of {measured['round_to']}",
            after,
            "ms (CPU time)",
            "dense",
            after / before,
            before * GOAL,
        ),
        Row(f"{case}: operations", left * (count_macs(model, example).total or 0) / 1e6, "M", "dense", left),
    ]


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the same code on less, in under two minutes")
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    parser.add_argument("--part", choices=(*MODELS, "latency"), action="append", help="only this; several are allowed")
    parser.add_argument("--layout", choices=LAYOUTS, action="append", help="only this memory layout")
    parser.add_argument("--batch", type=int, choices=(1, 16), action="append", help="only this batch size")
    given = parser.parse_args()
    given.part = given.part or [*list(MODELS)[: 2 if given.quick else None], "latency"]
    given.out = given.out or (common.QUICK if given.quick else common.RESULTS)
    return given


def measure(part: str, given: argparse.Namespace) -> list[Row]:
    """Return the rows of one part, as far as they were asked for."""
    if part == "latency":
        return latency_rows(seconds=5.0 if given.quick else 30.0)
    rounds = {1: 5} if given.quick else ROUNDS[part]
    wanted = {batch: count for batch, count in rounds.items() if batch in (given.batch or rounds)}
    return speed_rows(part, wanted, layouts=given.layout or tuple(LAYOUTS))


def main() -> None:
    """Measure part by part, and publish after each."""
    given = arguments()
    torch.set_num_threads(1)
    for part in given.part:
        facts = common.environment(threads=1, quick=given.quick, macs=MACS, rounds=str(ROUNDS))
        rows = measure(part, given)
        common.publish(NAME, [*common.earlier(given.out / f"{NAME}.json", rows), *rows], facts, given.out)


if __name__ == "__main__":
    main()
