"""Sparsity-inducing training: penalties, their proximal operators, and the callback that trains with them."""

from lightning_compress.pruning.sparsity.callbacks import SparsityRegularization
from lightning_compress.pruning.sparsity.penalties import (
    group_lasso,
    group_lasso_gradient,
    group_soft_threshold,
    soft_threshold,
)
from lightning_compress.pruning.sparsity.rules import StrengthRule

__all__ = [
    "SparsityRegularization",
    "StrengthRule",
    "group_lasso",
    "group_lasso_gradient",
    "group_soft_threshold",
    "soft_threshold",
]
