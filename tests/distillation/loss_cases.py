"""One row a distillation loss: how to make it and inputs for it, for the tests that every loss passes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_compress.distillation import losses
from lightning_compress.distillation.losses import DistillationLoss

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Case:
    """A loss, the shapes of a sample on both sides, and what target it wants: ``class``, ``value`` or nothing."""

    make: Callable[[], DistillationLoss]
    student: Shapes
    teacher: Shapes
    target: str = ""

    def inputs(self, batch: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple:
        """Return both sides' tensors, as tuples where there are several pairs, and the target."""
        generator = torch.Generator().manual_seed(seed)

        def side(shapes: Shapes) -> Tensor | tuple[Tensor, ...]:
            made = [torch.randn(batch, *shape, generator=generator, dtype=torch.float64) for shape in shapes]
            made = [tensor.to(dtype) for tensor in made]
            return made[0] if len(made) == 1 else tuple(made)

        student, teacher = side(self.student), side(self.teacher)
        target = None
        if self.target == "class":
            positions = self.student[0][1:]
            target = torch.randint(self.student[0][0], (batch, *positions), generator=generator)
        if self.target == "value":
            target = torch.randn(batch, *self.student[0], generator=generator, dtype=torch.float64).to(dtype)
        return student, teacher, target


SCORES, MAP = ((5,),), ((3, 4, 4),)

CASES = {
    "kd": Case(losses.KnowledgeDistillation, SCORES, SCORES),
    "kd_reverse": Case(lambda: losses.KnowledgeDistillation("reverse", smoothing=0.1), SCORES, SCORES),
    "kd_js": Case(lambda: losses.KnowledgeDistillation("js"), SCORES, SCORES),
    "kd_pixels": Case(lambda: losses.KnowledgeDistillation(ignore_index=0), MAP, MAP, "class"),
    "kd_tokens": Case(lambda: losses.KnowledgeDistillation(class_dim=-1), ((3, 5),), ((3, 5),)),
    "logits_mse": Case(lambda: losses.LogitsMSE(center=True), SCORES, SCORES),
    "noisy_teacher": Case(lambda: losses.NoisyTeacher(0.3).eval(), SCORES, SCORES),
    "dkd": Case(losses.DecoupledDistillation, SCORES, SCORES, "class"),
    "multi_label": Case(losses.MultiLabelDistillation, SCORES, SCORES),
    "regression": Case(losses.RegressionDistillation, ((2,),), ((2,),)),
    "huber": Case(lambda: losses.RegressionDistillation("huber"), ((),), ((),)),
    "bounded_regression": Case(losses.BoundedRegression, ((2,),), ((2,),), "value"),
    "cwd": Case(losses.ChannelWiseDistillation, MAP, MAP),
    "cwd_features": Case(lambda: losses.ChannelWiseDistillation("features"), ((2, 4, 4),), ((3, 8, 8),)),
    "hint": Case(losses.FitNetsHints, ((2, 4, 4),), ((3, 2, 2),)),
    "hint_tokens": Case(lambda: losses.FitNetsHints(-1), ((4, 2),), ((6, 3),)),
    "at": Case(losses.AttentionTransfer, ((2, 4, 4), (3, 3)), ((3, 2, 2), (1, 6))),
    "fsp": Case(losses.FlowDistillation, ((2, 4, 4), (3, 2, 2)), ((2, 2, 2), (3, 4, 4))),
    "sp": Case(losses.SimilarityPreserving, ((2, 3),), ((4,),)),
    "rkd": Case(losses.RelationalDistillation, ((2, 3),), ((4,),)),
    "pkt": Case(losses.ProbabilisticTransfer, ((4,),), ((2, 3, 3),)),
    "crd": Case(lambda: losses.ContrastiveRepresentation(4, 6).double(), ((3,),), ((5,),), "class"),
    "crd_nce": Case(lambda: losses.ContrastiveRepresentation(4, 6, objective="nce").double(), ((3,),), ((2, 2),)),
    "dml": Case(losses.MutualLearning, ((5,), (5,)), ()),
    "byot": Case(lambda: losses.SelfDistillation(hard=0.5), ((5,), (5,), (5,)), (), "class"),
}
"""Every loss by a name of its own."""
