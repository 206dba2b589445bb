"""Truncation of the weight: ``(scores, weight[batch, R]) -> weight[batch, R]``. It never changes ``c``.

A weight that is let through is returned bit for bit, so that ``truncated = weight != raw`` counts exactly the others.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from rlstab_jax.objectives.ratios import LogRatio, bounded_exp
from rlstab_jax.types import Scores


def cap(scores: Scores, weight: Float[Array, "batch R"], at: float = 5.0) -> Float[Array, "batch R"]:
    """min(w, at): MiniRL's truncation of the whole weight, at 5."""
    return jnp.minimum(weight, at)


def cap_factor(
    scores: Scores, weight: Float[Array, "batch R"], of: LogRatio, at: float = 5.0
) -> Float[Array, "batch R"]:
    """w min(1, at / f): caps only the factor f = exp(of) of w = f * rest. With ``of=old_over_rollout``: TIS."""
    return weight * jnp.minimum(1.0, at / bounded_exp(of(scores)))


def clip(scores: Scores, weight: Float[Array, "batch R"], eps_low: float, eps_high: float) -> Float[Array, "batch R"]:
    """clip(w, 1 - eps_low, 1 + eps_high): CISPO (2506.13585, Eq. 5)."""
    return jnp.clip(weight, 1 - eps_low, 1 + eps_high)


def band(
    scores: Scores, weight: Float[Array, "batch R"], of: LogRatio, low: float = 0.5, high: float = 5.0
) -> Float[Array, "batch R"]:
    """w where low <= f <= high, else 0, with f = exp(of): IcePop's double-sided mask, on f = pi_old/mu_old."""
    factor = bounded_exp(of(scores))
    return jnp.where((factor >= low) & (factor <= high), weight, 0)
