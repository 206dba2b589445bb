"""Importance weights: ``(scores) -> [batch, R]``, stop-gradient. Which ratio is meant is an argument, see `ratios`."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from rlstab_jax.objectives.ratios import LogRatio, bounded_exp
from rlstab_jax.types import Scores


def unweighted(scores: Scores) -> Float[Array, "batch R"]:
    """w = 1: samples are taken for on-policy."""
    return jnp.ones_like(scores.target)


def importance(scores: Scores, of: LogRatio) -> Float[Array, "batch R"]:
    """w_t = exp(of_t). The paper's first-order surrogate (Eq. 3, 4) is ``of=target_over_rollout``; exact importance
    sampling (Eq. 1, 2) is ``of=piece(sequence, of=target_over_rollout)``, of high variance."""
    return bounded_exp(of(scores))
