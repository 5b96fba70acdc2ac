"""What a student is told to imitate: losses on outputs and on features, each a function and a module around it."""

from lightning_compress.distillation.losses.base import DistillationLoss
from lightning_compress.distillation.losses.channel_wise import ChannelWiseDistillation, channel_wise_distillation
from lightning_compress.distillation.losses.contrastive import ContrastiveRepresentation, contrastive_nce, info_nce
from lightning_compress.distillation.losses.decoupled import DecoupledDistillation, decoupled_distillation
from lightning_compress.distillation.losses.hints import (
    AttentionTransfer,
    FitNetsHints,
    FlowDistillation,
    attention_map,
    attention_transfer,
    flow_distillation,
    flow_matrix,
    hint,
)
from lightning_compress.distillation.losses.logits import LogitsMSE, NoisyTeacher, logits_mse, noisy_logits
from lightning_compress.distillation.losses.multi_label import MultiLabelDistillation, multi_label_distillation
from lightning_compress.distillation.losses.online import (
    MutualLearning,
    SelfDistillation,
    mutual_learning,
    self_distillation,
)
from lightning_compress.distillation.losses.regression import (
    BoundedRegression,
    RegressionDistillation,
    bounded_regression,
    regression_distillation,
)
from lightning_compress.distillation.losses.relational import (
    RelationalDistillation,
    relational_angle,
    relational_distance,
)
from lightning_compress.distillation.losses.similarity import (
    ProbabilisticTransfer,
    SimilarityPreserving,
    probabilistic_transfer,
    similarity_preserving,
)
from lightning_compress.distillation.losses.soft_targets import (
    KnowledgeDistillation,
    class_divergence,
    knowledge_distillation,
)

__all__ = [
    "AttentionTransfer",
    "BoundedRegression",
    "ChannelWiseDistillation",
    "ContrastiveRepresentation",
    "DecoupledDistillation",
    "DistillationLoss",
    "FitNetsHints",
    "FlowDistillation",
    "KnowledgeDistillation",
    "LogitsMSE",
    "MultiLabelDistillation",
    "MutualLearning",
    "NoisyTeacher",
    "ProbabilisticTransfer",
    "RegressionDistillation",
    "RelationalDistillation",
    "SelfDistillation",
    "SimilarityPreserving",
    "attention_map",
    "attention_transfer",
    "bounded_regression",
    "channel_wise_distillation",
    "class_divergence",
    "contrastive_nce",
    "decoupled_distillation",
    "flow_distillation",
    "flow_matrix",
    "hint",
    "info_nce",
    "knowledge_distillation",
    "logits_mse",
    "multi_label_distillation",
    "mutual_learning",
    "noisy_logits",
    "probabilistic_transfer",
    "regression_distillation",
    "relational_angle",
    "relational_distance",
    "self_distillation",
    "similarity_preserving",
]
