"""Well-known networks all the way: train with quantization, stop, resume, convert, export, run with onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from networks import VISION, Audio, Small, Words
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_compress import QuantizationAwareTraining, export
from lightning_compress.core.copies import full_copy
from lightning_compress.data import ResumableLoader
from lightning_compress.export.verification import relative_difference
from lightning_compress.models import ImageClassifier
from lightning_compress.quantization import convert_in_place, quantizers_of
from lightning_compress.quantization.fixed import FixedQuantizer
from lightning_compress.quantization.integer import integer_tensors

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")
QUIET: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
    "num_sanity_val_steps": 0, "limit_val_batches": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A network, its inputs, and what must be said about what stays float: (path, words) of plan or conversion."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    integers: int
    planned: tuple[str, ...] = ()
    left: dict[str, str] = field(default_factory=dict)


def images(size: int = 64) -> Callable[[], Tensor]:
    return lambda: torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(size))


def vision(name: str, integers: int, size: int = 64, **facts: Any) -> Case:
    return Case(VISION[name], images(size), integers, **facts)


_NORM_FIRST = "no convolution or linear layer stands alone before it"
CASES = {
    "small": Case(lambda: Small(inputs=3), images(16), 9),
    "resnet18": vision("resnet18", 21),
    "mobilenet_v2": vision("mobilenet_v2", 53),
    "vgg16": vision("vgg16", 16),
    "googlenet": vision("googlenet", 58),
    "densenet121": vision("densenet121", 121, left={"features.denseblock1.denselayer1.norm1": _NORM_FIRST}),
    "efficientnet_b0": vision("efficientnet_b0", 82),
    "vit_b_16": vision(
        "vit_b_16", 38, 224, planned=("scores and what enters out_proj stay float", "as it feeds LayerNorm")
    ),
    "audio": Case(Audio, lambda: torch.randn(4, 1, 64, generator=torch.Generator().manual_seed(1)), 3),
    "lstm": Case(
        Words,
        lambda: torch.randint(0, 20, (4, 7), generator=torch.Generator().manual_seed(1)),
        3,
        planned=("its hidden states stay float",),
    ),
}
FAST = ("small",)


def module_of(case: Case, seed: int) -> ImageClassifier:
    torch.manual_seed(seed)
    net = case.build()
    if hasattr(net, "heads"):  # a ViT begins with a head of zeros, whose outputs would compare with anything
        nn.init.normal_(net.heads.head.weight, std=0.02)
    for part in net.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            part.momentum = 1.0  # two steps must do for statistics
    return ImageClassifier(net, partial(torch.optim.SGD, lr=1e-3), num_classes=3)


def fit(
    module: ImageClassifier, data: ResumableLoader, folder: Path, steps: int, checkpoint: Path | None = None
) -> str:
    """Train up to a step, and return the plan."""
    callback = QuantizationAwareTraining(start={"step": 0}, freeze={})
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=1, monitor=None)
    trainer = Trainer(**QUIET, max_steps=steps, callbacks=[callback, saver])
    trainer.fit(module, data, data, ckpt_path=checkpoint, weights_only=True)
    assert trainer.global_step == steps
    return callback.plan_text


@contextmanager
def every_step(model: nn.Module, seen: dict[str, list[Tensor]], record: bool) -> Iterator[None]:
    """Note what quantizers return; or compare it with the notes, to one step, and go on with the notes."""
    counts: dict[str, int] = {}

    def hook(name: str, part: Any, args: Any, output: Tensor) -> Tensor | None:
        if record:
            seen.setdefault(name, []).append(output.clone())  # blocks add to what they get, in place
            return None
        expected = seen[name][counts.setdefault(name, 0)]
        counts[name] += 1
        assert float((output - expected).abs().max()) <= 1.01 * float(part.scale), name
        return expected.clone()

    parts = {
        name: part for name, part in model.named_modules()
        if isinstance(part, FixedQuantizer) or (record and name.endswith(("put_quantizer", "key_quantizer")))
    }  # fmt: skip
    handles = [part.register_forward_hook(partial(hook, name)) for name, part in parts.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    assert record or set(counts) == set(parts)


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_train_stop_resume_convert_export_run(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    x = case.inputs()
    data = ResumableLoader(TensorDataset(x, torch.arange(len(x)) % 3), batch_size=2)
    fit(module_of(case, 0), data, tmp_path, 1)
    module = module_of(case, 1)
    plan = fit(module, data, tmp_path, 2, tmp_path / "step=1.ckpt")
    assert all(words in plan for words in case.planned)
    net = module.net.eval()
    assert all(q.active for q in quantizers_of(net))

    seen: dict[str, list[Tensor]] = {}
    with torch.no_grad(), every_step(net, seen, record=True):
        fake = net(x)
    converted = full_copy(net)
    done = convert_in_place(converted, x)
    assert len(done.integers) == case.integers
    assert len(list(integer_tensors(converted))) >= case.integers
    assert {path: done.left.get(path) for path in case.left} == case.left
    with torch.no_grad(), every_step(converted, seen, record=False):
        integers = converted(x)
    assert torch.allclose(integers, fake, atol=1e-4 * float(fake.abs().max()) + 1e-6)  # given the same inputs

    made = export(converted, tmp_path / "net", example_inputs=x[:2])
    assert made.dynamic_batch
    session = onnxruntime.InferenceSession(str(made.path), providers=["CPUExecutionProvider"])
    (ran,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        nudged = net(x + 1e-4 * torch.randn_like(x) if x.is_floating_point() else x)
    noise = relative_difference([nudged.numpy()], [fake])  # rounding does a lot where little was learned yet
    assert relative_difference([ran], [fake]) <= 0.05 + 2 * noise
