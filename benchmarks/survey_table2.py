"""Table II of the survey: AlexNet, VGG-16 and GoogLeNet at its compression rates, and how much faster they get.

The networks are torchvision's, at their random initialization, so that no accuracy is measured: ranks are chosen as
for any model, and the summed relative error of the layers' outputs on a calibration batch stands beside every row. Of
random weights no rank is good; what counts is how a choice compares with an equal share for every layer.

The survey's second row of each network is the closed form of Tai et al. without batch norm. Its rates count the weights
of convolutions; here they are those of the whole model, which is more, and both countings are printed.

Times are taken in pieces, one process for each network, memory layout and batch size, that together fill one file:

    python -m benchmarks.survey_table2 --part ranks
    python -m benchmarks.survey_table2 --part times --model VGG-16 --layout channels_last --batch 16
    python -m benchmarks.survey_table2 --part compiled --model VGG-16 --batch 1
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor

from benchmarks import _common as common
from benchmarks._common import Row
from benchmarks._ranks import DEFAULT, ENTRIES, FRONTIER, WAYS, Found, choose_ranks, factorized, network
from lightning_compress.core.cost import count_macs

NAME, PARTS = "survey_table2", ("ranks", "sizes", "times", "compiled")
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
ROUNDS = {"AlexNet": {1: 41, 16: 15}, "GoogLeNet": {1: 31, 16: 9}, "VGG-16": {1: 21, 16: 5}}
_QUICK_ROUNDS = 5


def labels_of(name: str, quick: bool = False) -> list[str]:
    """Return what is built of a network: each way at the survey's higher rate, the default at all other rates."""
    low, high = ENTRIES[name].rates
    more = [] if quick else [f"{rate:g} {DEFAULT}" for rate in (low, *FRONTIER)]
    return [*(f"{high:g} {way}" for way in WAYS), *more]


def models_of(name: str, chosen: Mapping[str, Found], labels: Sequence[str]) -> dict[str, nn.Module]:
    """Return a network, dense and with the ranks of each label."""
    dense = network(name)
    return {"dense": dense} | {label: factorized(dense, chosen[label]["ranks"]) for label in labels}


def convolution_weights(model: nn.Module) -> int:
    """Return the weights of convolutions, without biases."""
    return sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Conv2d))


def size_rows(name: str, chosen: Mapping[str, Found], labels: Sequence[str], image: int) -> list[Row]:
    """Return both countings of the rate, the operations and the errors of each choice."""
    models = models_of(name, chosen, labels)
    dense, rows = models.pop("dense"), []
    whole, convs = sum(p.numel() for p in dense.parameters()), convolution_weights(dense)
    example = torch.zeros(1, 3, image, image)
    macs = count_macs(dense, example).total or 1
    for label, model in models.items():
        size = sum(p.numel() for p in model.parameters())
        done = count_macs(model, example).total or 0
        case = f"{name}: {label}"
        rows += [
            Row(f"{case}, compression rate of the whole model", whole / size, "times", "dense"),
            Row(f"{case}, of the weights of convolutions", convs / convolution_weights(model), "times", "dense"),
            Row(f"{case}, operations", done / 1e6, "M", "dense", done / macs),
            *error_rows(case, chosen[label], chosen[f"{label.split()[0]} equal"]),
        ]
    return rows


def error_rows(case: str, found: Found, equal: Found) -> list[Row]:
    """Return what a choice loses beside an equal share for every layer at the same rate."""
    against = "an equal share for every layer, at that rate"
    names = {
        "summed_error": f"relative output errors of {found['layers']} layers",
        "summed_squared_error": f"squared relative output errors of {found['layers']} layers",
        "largest_error": "largest relative output error",
    }
    return [
        Row(f"{case}, {text}", found[key], "sum" if "sum" in key else "of 1", against, found[key] / equal[key])
        for key, text in names.items()
    ]


def time_rows(
    name: str,
    chosen: Mapping[str, Found],
    labels: Sequence[str],
    where: tuple[str, int],
    rounds: int,
    image: int,
    compiled: bool = False,
) -> list[Row]:
    """Return the milliseconds of each choice, against the dense network in the same layout at the same batch."""
    layout, batch = where
    models = models_of(name, chosen, labels)
    for model in models.values():
        model.to(memory_format=LAYOUTS[layout])
    inputs = torch.rand(batch, 3, image, image).to(memory_format=LAYOUTS[layout])
    with torch.inference_mode(not compiled), torch.no_grad():
        calls = {label: _call(model, inputs, compiled) for label, model in models.items()}
        times = common.time_calls(calls, rounds)
    cpu = {label: 1e3 * float(np.median(taken)) for label, (_, taken) in times.items()}
    place = f"{layout}, batch {batch}" + (", compiled and frozen" if compiled else "")
    judged = f"{max(ENTRIES[name].rates):g} {DEFAULT}" if layout == "channels_last" and not compiled else ""
    rows = []
    for label, taken in cpu.items():
        goal = cpu["dense"] / ENTRIES[name].goals[batch] if label == judged else None
        text = _against(label, chosen)
        rows.append(Row(f"{name}: {label}, {place}", taken, "ms (CPU time)", text, taken / cpu["dense"], goal))
        if label != "dense":
            speed = cpu["dense"] / taken
            rows.append(Row(f"{name}: {label}, {place}, speed-up", speed, "times", text, speed))
    return rows


def _against(label: str, chosen: Mapping[str, Found]) -> str:
    if label == "dense":
        return "dense"
    mine, equal = chosen[label]["summed_error"], chosen[f"{label.split()[0]} equal"]["summed_error"]
    return f"dense; output errors sum up to {mine:.3g}, with an equal share to {equal:.3g}"


def _call(model: nn.Module, inputs: Tensor, compiled: bool) -> Callable[[], object]:
    if not compiled:
        return partial(model, inputs)
    torch._dynamo.reset()  # past its limit of recompilations it would run eager, and say nothing
    run = torch.compile(model)
    run(inputs)
    return partial(run, inputs)


def measure(part: str, name: str, chosen: Mapping[str, Found], options: argparse.Namespace) -> list[Row]:
    """Return the rows of one part of one network."""
    labels, rows = labels_of(name, options.quick), []
    image = options.image
    if part == "sizes":
        return size_rows(name, chosen, labels, image)
    batches = options.batch or ([1] if options.quick else [1, 16])
    for batch in batches:
        rounds = _QUICK_ROUNDS if options.quick else ROUNDS[name][batch]
        for layout in options.layout or LAYOUTS:
            if part == "times":
                rows += time_rows(name, chosen, labels, (layout, batch), rounds, image)
            else:
                with inductor.patch(freezing=True):
                    rows += time_rows(name, chosen, labels[:1], (layout, batch), rounds, image, compiled=True)
    return rows


def publish(rows: list[Row], quick: bool, out: Path) -> None:
    """Write rows beside those that were measured before."""
    file, others = out / f"{NAME}.json", []
    if file.is_file():
        anew = {row.case for row in rows}
        known = json.loads(file.read_text(encoding="utf-8"))["rows"]
        fields = ("case", "value", "unit", "against", "ratio", "goal")
        others = [Row(**{key: row[key] for key in fields}) for row in known if row["case"] not in anew]
    facts = common.environment(
        threads=1,
        quick=quick,
        weights="random",
        calibration="random images",
        pieces="one process for each network, layout and batch size; the load averages are those of the last",
    )
    order = list(ENTRIES)
    merged = sorted([*others, *rows], key=lambda row: order.index(row.case.split(":")[0]))
    common.publish(NAME, merged, facts, out)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(ENTRIES), action="append", help="only these networks")
    parser.add_argument("--part", choices=PARTS, action="append", help="only these; ranks are kept for the others")
    parser.add_argument(
        "--layout", choices=list(LAYOUTS), action="append", help="only these, of times, compiled or not"
    )
    parser.add_argument("--batch", type=int, choices=(1, 16), action="append", help="only these, of times")
    parser.add_argument("--quick", action="store_true", help="the same code on AlexNet, small images, few rates")
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    options = parser.parse_args(words)
    options.out = options.out or (common.QUICK if options.quick else common.RESULTS)
    options.image = 64 if options.quick else 224
    options.part = options.part or (PARTS[:3] if options.quick else PARTS)
    options.model = options.model or (["AlexNet"] if options.quick else list(ENTRIES))
    return options


def main(words: Sequence[str] | None = None) -> None:
    """Choose the ranks (slow: singular values of every layer), measure, or both."""
    options = arguments(words)
    torch.set_num_threads(1)
    for name in options.model:
        file = options.out / "ranks" / f"{name}.json"
        for part in options.part:
            if part == "ranks":
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(choose_ranks(name, options.image)) + "\n", encoding="utf-8")
            else:
                chosen: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
                publish(measure(part, name, chosen, options), options.quick, options.out)


if __name__ == "__main__":
    main()
