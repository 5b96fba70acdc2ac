"""Students in few bits under a teacher: the dense self stays dense, and the file is the student's alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kd_models import Classifier, copied, fit, images, same
from lightning.pytorch import seed_everything

from lightning_compress import (
    Binarization,
    CompressionCallback,
    Distillation,
    DistillationModule,
    FixedPointTraining,
    LowRank,
    QuantizationAwareTraining,
    Select,
    Ternarization,
    WeightSharing,
    load_compressed,
    save_compressed,
)
from lightning_compress.distillation import FitNetsHints, KnowledgeDistillation, Term

EVERYTHING = Select(types=["Conv2d", "Linear"])
FEW_BITS = {
    "binary": lambda: Binarization("bwn", select=EVERYTHING),
    "xnor": lambda: Binarization("xnor"),
    "ternary": lambda: Ternarization(select=EVERYTHING),
    "qat": lambda: QuantizationAwareTraining({"bits": 4, "range": "lsq"}, {"bits": 4, "range": "lsq+"}),
    "sharing": lambda: WeightSharing(3, select=EVERYTHING),
    "fixed_point": lambda: FixedPointTraining([3, 5], [5, 5], [2, 12]),
}


def losses() -> dict[str, Term]:
    return {"kd": Term(KnowledgeDistillation(), 0.9), "hint": Term(FitNetsHints(), 0.5, pairs="net.layer*")}


def distilled(way: str, student: Any, method: CompressionCallback) -> tuple[Any, Any]:
    """Train a student under its dense self; return the Trainer and the teacher, which must be what the student was."""
    dense = copied(student)
    if way == "module":
        module = DistillationModule(student, "baseline", losses(), task_weight=0.1)
        trainer = fit(module, [method], epochs=2)
        teacher = module.distiller.teacher
    else:
        distill = Distillation("baseline", losses(), task_weight=0.1)
        trainer = fit(student, [distill, method], epochs=2)
        teacher = distill.distiller.teacher
    assert same(dense, copied(teacher.module))
    return trainer, teacher


@pytest.mark.parametrize("way", ["module", "callback"])
@pytest.mark.parametrize("build", FEW_BITS.values(), ids=FEW_BITS.keys())
def test_a_student_in_few_bits_learns_from_its_dense_self(
    build: Callable[[], CompressionCallback], way: str, tmp_path: Path
) -> None:
    seed_everything(0, verbose=False)
    student, method = Classifier(dropout=0.0), build()
    trainer, teacher = distilled(way, student, method)
    assert [type(layer) for layer in teacher.module.modules()] == [type(layer) for layer in Classifier().modules()]
    assert trainer.callback_metrics["distill/kd"] > 0
    assert trainer.callback_metrics["distill/hint"] > 0
    assert trainer.callback_metrics["teacher/agreement"] <= 1
    assert trainer.callback_metrics["teacher/val/loss"] > 0
    small = student if method.compressed is None else method.compressed
    layer = small.net.layer2[0] if build is FEW_BITS["xnor"] else small.net.layer1[0]
    weight = layer.quantized_weight() if build is FEW_BITS["qat"] else layer.weight
    assert all(len(channel.unique()) <= 16 for channel in weight)
    save_compressed(small, tmp_path / "small.safetensors")
    bare = load_compressed(Classifier(dropout=0.0), tmp_path / "small.safetensors")
    data = images().tensors[0]
    with torch.no_grad():
        assert torch.equal(bare.eval()(data), small.eval()(data))


@pytest.mark.parametrize("way", ["module", "callback"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_student_of_low_rank_learns_from_its_dense_self(when: str, way: str, tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    student, method = Classifier(dropout=0.0), LowRank(factors=2, when=when)
    trainer, teacher = distilled(way, student, method)
    assert trainer.callback_metrics["distill/hint"] > 0
    assert trainer.callback_metrics["teacher/val/loss"] > 0
    small = student if method.compressed is None else method.compressed
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in teacher.module.parameters())
    save_compressed(small, tmp_path / "small.safetensors")
    bare = load_compressed(Classifier(dropout=0.0), tmp_path / "small.safetensors")
    data = images().tensors[0]
    with torch.no_grad():
        assert torch.equal(bare.eval()(data), small.eval()(data))
