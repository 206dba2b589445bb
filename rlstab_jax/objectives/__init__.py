"""Objectives: arrays in, loss out. An objective is a composition of pure pieces (`core.Objective`); `recipes` has the
known ones, and `config` names them in a run's config.

The pieces live in one module for each slot of `Objective`: `advantages`, `weights`, `truncation` and `trust` (over the
log-ratios of `ratios`), `normalise`, `regularisers`. One's own objective is one more composition:

    def mine(eps: float = 0.2, cap: float = 2.0) -> Objective:
        ratio = piece(ratios.geometric, of=ratios.target_over_rollout)
        return Objective(
            advantage=piece(advantages.leave_one_out),
            weight=piece(weights.importance, of=ratio),
            truncate=piece(truncation.cap, at=cap),
            trust=piece(trust.ppo_clip, of=ratio, eps_low=eps, eps_high=eps),
            normalise=piece(normalise.token_mean),
        )
"""

from rlstab_jax.objectives import advantages, normalise, ratios, regularisers, truncation, trust, weights
from rlstab_jax.objectives.config import ObjectiveConfig, build
from rlstab_jax.objectives.core import (
    Objective,
    Regulariser,
    SurrogateParts,
    advantages_of,
    coefficients,
    piece,
    surrogate,
)
from rlstab_jax.objectives.recipes import (
    cispo,
    dapo,
    dppo_kl,
    dppo_tv,
    dr_grpo,
    grpo,
    gspo,
    icepop,
    minirl,
    reinforce,
    rloo,
    rspo,
    sequence_is,
    tis,
)

__all__ = [
    "Objective",
    "ObjectiveConfig",
    "Regulariser",
    "SurrogateParts",
    "advantages",
    "advantages_of",
    "build",
    "cispo",
    "coefficients",
    "dapo",
    "dppo_kl",
    "dppo_tv",
    "dr_grpo",
    "grpo",
    "gspo",
    "icepop",
    "minirl",
    "normalise",
    "piece",
    "ratios",
    "regularisers",
    "reinforce",
    "rloo",
    "rspo",
    "sequence_is",
    "surrogate",
    "tis",
    "truncation",
    "trust",
    "weights",
]
