"""Truncation of the weight: ``(scores, weight[batch, R]) -> weight[batch, R]``. It never changes ``c``.

A weight that is let through is returned bit for bit, so that ``truncated = weight != raw`` counts exactly the others.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from rlstab_jax.objectives.ratios import LogRatio, bounded_exp
from rlstab_jax.types import Scores

Weight = Float[Array, "batch R"]


def cap(scores: Scores, weight: Weight, at: float) -> Weight:
    """min(w, at): MiniRL's truncation of the whole weight."""
    return jnp.minimum(weight, at)


def cap_factor(scores: Scores, weight: Weight, of: LogRatio, at: float) -> Weight:
    """w min(1, at / f): caps only the factor f = exp(of) of w = f * rest. With ``of=old_over_rollout``: TIS."""
    return weight * jnp.minimum(1.0, at / bounded_exp(of(scores)))


def clip(scores: Scores, weight: Weight, eps_low: float, eps_high: float) -> Weight:
    """clip(w, 1 - eps_low, 1 + eps_high): CISPO (2506.13585, Eq. 5)."""
    return jnp.clip(weight, 1 - eps_low, 1 + eps_high)
