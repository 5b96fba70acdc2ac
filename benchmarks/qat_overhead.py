"""What quantization-aware training costs: a training step of ResNet-18 on 64 x 64 images, beside other implementations.

Steps are timed in real fits, each in a process of its own, that take turns every few steps; after the start of
quantization and before ranges freeze, so that a step observes, quantizes and learns. Torch's FX mode is deprecated; it
appears here alone. All train in float32 on one thread, and goals are judged on processor time.

    python -m benchmarks.qat_overhead [--quick]
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models import resnet18

from benchmarks import _common as common
from benchmarks._common import Row, ratio_of_medians
from benchmarks._fits import Batches, Classifier
from benchmarks._turns import time_in_turns
from lightning_compress import QuantizationAwareTraining
from lightning_compress.quantization import quantizers_of

SHAPE = (8, 3, 64, 64)
GOAL, STRETCH = 1.8, 1.5
PLAIN = "float training"
OURS = "QuantizationAwareTraining, 8 bits"
LSQ = "QuantizationAwareTraining, LSQ, 4 bits"
TORCH = "torch FX (deprecated), 8 bits"
NNCF = "NNCF, 8 bits"
CASES = (PLAIN, OURS, LSQ, TORCH, NNCF)


def network() -> nn.Module:
    """Return torchvision's ResNet-18 for ten classes."""
    return resnet18(num_classes=10)


def prepare(case: str) -> tuple[nn.Module, list[Callback]]:
    """Return the network and the callbacks of a case."""
    net = network()
    if case == OURS:
        return net, [QuantizationAwareTraining(start={"step": 0}, freeze={})]
    if case == LSQ:
        learned = {"bits": 4, "range": "lsq"}
        return net, [QuantizationAwareTraining(learned, learned, start={"step": 0}, freeze={})]
    if case == TORCH:
        return with_torch(net), []
    return (with_nncf(net) if case == NNCF else net), []


def with_torch(net: nn.Module) -> nn.Module:
    """Return the network as torch's FX mode prepares it for the oneDNN backend."""
    from torch.ao.quantization import QConfigMapping, get_default_qat_qconfig
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mapping = QConfigMapping().set_global(get_default_qat_qconfig("onednn"))
        return prepare_qat_fx(net.train(), mapping, (torch.randn(SHAPE),))


def with_nncf(net: nn.Module) -> nn.Module:
    """Return the network as NNCF prepares it."""
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)
    os.environ["NNCF_EXTENSION_LOAD_TIMEOUT"] = "0"  # its kernels are compiled when they are first used
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = nncf.Dataset([torch.randn(SHAPE) for _ in range(2)])
        quantized = nncf.quantize(net.eval(), data, subset_size=2).train()
    quantized(torch.randn(SHAPE)).sum().backward()
    quantized.zero_grad()
    return quantized


def fit(case: str, pacer: Callback, steps: int) -> None:
    """Train for a number of steps, under the pacer's clock."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    net, callbacks = prepare(case)
    trainer = Trainer(
        max_steps=steps,
        callbacks=[pacer, *callbacks],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(net), DataLoader(Batches(SHAPE, steps), batch_size=None))
    if case in (OURS, LSQ) and not all(quantizer.active for quantizer in quantizers_of(net)):
        raise RuntimeError(f"{case}: something was not quantized; the comparison is void")


def measure(rounds: int) -> list[Row]:
    """Return milliseconds per step of every case, and the upper end of its ratio to float training."""
    fits: dict[str, Callable[[Callback, int], None]] = {case: partial(fit, case) for case in CASES}
    times = time_in_turns(fits, rounds)
    rows = []
    for kind, label in ((1, "processor time"), (0, "wall time")):
        plain = times[PLAIN][kind]
        for case in CASES:
            ratio = ratio_of_medians(times[case][kind], plain)
            goal = GOAL if case == OURS and kind == 1 else None
            milliseconds = 1e3 * float(torch.tensor(times[case][kind]).median())
            rows.append(Row(f"training step, {case}, {label}, median", milliseconds, "ms", PLAIN, ratio.value))
            if case != PLAIN:
                what = f"training step, {case}, {label}, upper end of the ratio's 95 % interval"
                rows.append(Row(what, ratio.high, "x", PLAIN, ratio.value, goal))
                if goal is not None:
                    rows.append(Row(f"{what}, stretch goal", ratio.high, "x", PLAIN, ratio.value, STRETCH))
    return rows


def main(quick: bool, out: Path) -> Path:
    """Measure, print and write."""
    torch.set_num_threads(1)
    versions = {"nncf": version("nncf")}
    facts = common.environment(quick=quick, judged="processor time, one thread", images=list(SHAPE), **versions)
    return common.publish("qat_overhead", measure(2 if quick else 30), facts, out)


if __name__ == "__main__":
    options = common.arguments(__doc__)
    main(options.quick, options.out)
