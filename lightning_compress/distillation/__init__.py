"""Distillation: a small student learns from a large teacher."""

from lightning_compress.distillation.adapters import Adapters, Regressor
from lightning_compress.distillation.cache import TeacherCache, cache_teacher
from lightning_compress.distillation.cached_batch import CachedBatch
from lightning_compress.distillation.cached_data import CachedCollate, CachedDataset, cached_loader
from lightning_compress.distillation.callbacks import Distillation
from lightning_compress.distillation.losses import (
    AttentionTransfer,
    BoundedRegression,
    ChannelWiseDistillation,
    ContrastiveRepresentation,
    DecoupledDistillation,
    DistillationLoss,
    FitNetsHints,
    FlowDistillation,
    KnowledgeDistillation,
    LogitsMSE,
    MultiLabelDistillation,
    MutualLearning,
    NoisyTeacher,
    ProbabilisticTransfer,
    RegressionDistillation,
    RelationalDistillation,
    SelfDistillation,
    SimilarityPreserving,
)
from lightning_compress.distillation.module import DistillationModule
from lightning_compress.distillation.schedule import Ramp
from lightning_compress.distillation.supervised import Supervised
from lightning_compress.distillation.teacher import Answer, Question, Teacher
from lightning_compress.distillation.teachers import Ensemble, FunctionTeacher, ModuleTeacher, as_teacher, load_teacher
from lightning_compress.distillation.terms import Term

__all__ = [
    "Adapters",
    "Answer",
    "AttentionTransfer",
    "BoundedRegression",
    "CachedBatch",
    "CachedCollate",
    "CachedDataset",
    "ChannelWiseDistillation",
    "ContrastiveRepresentation",
    "DecoupledDistillation",
    "Distillation",
    "DistillationLoss",
    "DistillationModule",
    "Ensemble",
    "FitNetsHints",
    "FlowDistillation",
    "FunctionTeacher",
    "KnowledgeDistillation",
    "LogitsMSE",
    "ModuleTeacher",
    "MultiLabelDistillation",
    "MutualLearning",
    "NoisyTeacher",
    "ProbabilisticTransfer",
    "Question",
    "Ramp",
    "RegressionDistillation",
    "Regressor",
    "RelationalDistillation",
    "SelfDistillation",
    "SimilarityPreserving",
    "Supervised",
    "Teacher",
    "TeacherCache",
    "Term",
    "as_teacher",
    "cache_teacher",
    "cached_loader",
    "load_teacher",
]
