"""Objectives: arrays in, loss out. An objective is a composition of pure pieces (`core.Objective`); `recipes` has the
known ones.

The pieces live in one module for each slot of `Objective`: `advantages`, `weights` (over the log-ratios of `ratios`),
`truncation`, `trust`, `normalise`.
"""

from rlstab_jax.objectives.advantages import check_rewards
from rlstab_jax.objectives.core import (
    Objective,
    Regulariser,
    SurrogateParts,
    coefficients,
    group_count,
    piece,
    surrogate,
)
from rlstab_jax.objectives.recipes import minirl

__all__ = [
    "Objective",
    "Regulariser",
    "SurrogateParts",
    "check_rewards",
    "coefficients",
    "group_count",
    "minirl",
    "piece",
    "surrogate",
]
