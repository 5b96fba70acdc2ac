"""Removing channels: speed at half the operations, beside Torch-Pruning's own pruner at the same operations."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from benchmarks import _common as common
from benchmarks._common import Row
from lightning_compress import StructuredPruning, compress
from lightning_compress.core.copies import full_copy
from lightning_compress.core.cost import count_macs, count_parameters

MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "ResNet-18": (torchvision.models.resnet18, "fc"),
    "MobileNetV2": (torchvision.models.mobilenet_v2, "classifier.1"),
    "VGG-16": (torchvision.models.vgg16, "classifier.6"),
}
MACS = 0.5
GOAL = 1 / 1.8
_STEPS = 10
THEIRS = "Torch-Pruning"


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
    """Return a network and what each pruner makes of it."""
    build, head = MODELS[name]
    torch.manual_seed(0)
    model, example = build().eval(), torch.zeros(1, 3, image, image)
    found = {"dense": model, THEIRS: prune_theirs(model, example, head, macs)}
    for label, round_to in (("ours", 1), ("ours, multiples of 16", 16)):
        method = StructuredPruning(macs=macs, ranking={"scope": "layer"}, limits={"round_to": round_to})
        found[label] = compress(model, method, example_inputs=example)
    return found


def speed_rows(name: str, batches: tuple[int, ...], repeats: int, image: int = 224) -> list[Row]:
    """Return the operations, parameters and milliseconds of each candidate, in both memory layouts."""
    models = candidates(name, image=image)
    example, rows = torch.zeros(1, 3, image, image), []
    macs = {label: count_macs(model, example).total or 0 for label, model in models.items()}
    sizes = {label: count_parameters(model).total for label, model in models.items()}
    for label in models:
        for what, counted in (("operations", macs), ("parameters", sizes)):
            ratio = counted[label] / counted["dense"]
            rows.append(Row(f"{name}: {label}, {what}", counted[label] / 1e6, "M", "dense", ratio))
    for layout in (torch.contiguous_format, torch.channels_last):
        for model in models.values():
            model.to(memory_format=layout)
        for batch in batches:
            inputs = torch.rand(batch, 3, image, image).to(memory_format=layout)
            with torch.inference_mode():
                times = common.time_calls({label: partial(model, inputs) for label, model in models.items()}, repeats)
            seconds = {label: float(np.median(cpu)) for label, (_, cpu) in times.items()}
            for label, taken in seconds.items():
                case = f"{name}: {label}, {str(layout).removeprefix('torch.')}, batch {batch}"
                head_line = (name, label, layout, batch) == ("ResNet-18", "ours", torch.channels_last, 1)
                goal = 1e3 * seconds["dense"] * GOAL if head_line else None
                rows.append(Row(case, 1e3 * taken, "ms (CPU time)", "dense", taken / seconds["dense"], goal))
    return rows


def main() -> None:
    """Run the benchmark."""
    options = common.arguments(__doc__)
    torch.set_num_threads(1)
    facts = common.environment(threads=1, quick=options.quick, macs=MACS)
    names = list(MODELS)[: 2 if options.quick else None]
    rows = [
        row
        for name in names
        for row in speed_rows(name, (1,) if options.quick else (1, 16), 5 if options.quick else 15)
    ]
    common.publish("structured_speed", rows, facts, options.out)


if __name__ == "__main__":
    main()
