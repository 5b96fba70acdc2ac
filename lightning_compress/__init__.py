"""Compress PyTorch models while they train, as Lightning callbacks."""

from lightning_compress.core.at_target import EarlyStoppingAtTarget, ModelCheckpointAtTarget
from lightning_compress.core.callback import CompressionCallback
from lightning_compress.core.checkpoint import (
    ArtifactInfo,
    inspect_compressed,
    load_compressed,
    save_compressed,
)
from lightning_compress.core.compress import compress
from lightning_compress.core.errors import (
    ArtifactError,
    CompressionError,
    ConfigurationError,
    JournalMismatchError,
    SelectionError,
)
from lightning_compress.core.hooks import install_hooks, journal_of
from lightning_compress.core.journal import Edit, Journal
from lightning_compress.core.lightning_checkpoint import load_from_checkpoint
from lightning_compress.core.schedule import Schedule
from lightning_compress.core.select import Select
from lightning_compress.core.verbs import apply, register_kind
from lightning_compress.data.resume import ExactResume
from lightning_compress.distillation.callbacks import Distillation
from lightning_compress.distillation.module import DistillationModule
from lightning_compress.evaluation.callbacks import CompressionReport
from lightning_compress.export import Exported, ExportError, export
from lightning_compress.low_rank.callbacks import LowRank
from lightning_compress.pruning import (
    FisherPruning,
    IterativePruning,
    NeuronMerging,
    OptimalBrainCompression,
    Rule,
)
from lightning_compress.pruning.dynamic import DynamicSparseTraining
from lightning_compress.pruning.lottery import LotteryTicket
from lightning_compress.pruning.sparsity import SparsityRegularization, StrengthRule
from lightning_compress.pruning.structured import (
    StructuredPruning,
    ZeroChannelRemoval,
    coupled_groups,
    recalibrate_batch_norm,
)
from lightning_compress.quantization import QuantizerSpec, convert
from lightning_compress.quantization.assignment import QuantizationRule
from lightning_compress.quantization.binary.callbacks import Binarization, Ternarization
from lightning_compress.quantization.callbacks import QuantizationAwareTraining
from lightning_compress.quantization.conversion import IntegerConversion
from lightning_compress.quantization.fixed_point.callbacks import FixedPointTraining
from lightning_compress.quantization.post_training import BitGoal, PostTrainingQuantization, PostTrainingSteps
from lightning_compress.quantization.sharing import SharingRule, WeightSharing
from lightning_compress.quantization.soft_sharing import SoftWeightSharing

__version__ = "0.1.0"

__all__ = [
    "ArtifactError",
    "ArtifactInfo",
    "Binarization",
    "BitGoal",
    "CompressionCallback",
    "CompressionError",
    "CompressionReport",
    "ConfigurationError",
    "Distillation",
    "DistillationModule",
    "DynamicSparseTraining",
    "EarlyStoppingAtTarget",
    "Edit",
    "ExactResume",
    "ExportError",
    "Exported",
    "FisherPruning",
    "FixedPointTraining",
    "IntegerConversion",
    "IterativePruning",
    "Journal",
    "JournalMismatchError",
    "LotteryTicket",
    "LowRank",
    "ModelCheckpointAtTarget",
    "NeuronMerging",
    "OptimalBrainCompression",
    "PostTrainingQuantization",
    "PostTrainingSteps",
    "QuantizationAwareTraining",
    "QuantizationRule",
    "QuantizerSpec",
    "Rule",
    "Schedule",
    "Select",
    "SelectionError",
    "SharingRule",
    "SoftWeightSharing",
    "SparsityRegularization",
    "StrengthRule",
    "StructuredPruning",
    "Ternarization",
    "WeightSharing",
    "ZeroChannelRemoval",
    "apply",
    "compress",
    "convert",
    "coupled_groups",
    "export",
    "inspect_compressed",
    "install_hooks",
    "journal_of",
    "load_compressed",
    "load_from_checkpoint",
    "recalibrate_batch_norm",
    "register_kind",
    "save_compressed",
]
