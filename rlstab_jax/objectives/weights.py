"""Importance weights ``(scores) -> [batch, R]`` and their truncation ``(scores, weight) -> weight``. All stop-gradient.

Which two policies are compared is an argument: ``of`` is one of the log-ratios of `ratios`, bound by `core.piece`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from rlstab_jax.objectives.ratios import LogRatio, bounded_exp, sequence_mean, sequence_sum
from rlstab_jax.types import Scores


def unweighted(scores: Scores) -> Float[Array, "batch R"]:
    """w = 1: what REINFORCE does when it takes its samples for on-policy."""
    return jnp.ones_like(scores.target)


def token_ratio(scores: Scores, of: LogRatio) -> Float[Array, "batch R"]:
    """w_t = ratio_t. With ``of=target_over_rollout`` the paper's first-order surrogate (Eq. 3 and 4)."""
    return bounded_exp(of(scores))


def sequence_ratio(scores: Scores, of: LogRatio) -> Float[Array, "batch R"]:
    """w_t = prod_s ratio_s: exact importance sampling of the sequence (Eq. 1 and 2), of high variance."""
    return bounded_exp(sequence_sum(scores, of(scores)))


def geometric_ratio(scores: Scores, of: LogRatio) -> Float[Array, "batch R"]:
    """w_t = (prod_s ratio_s)^(1/|y|): GSPO (2507.18071, Eq. 7)."""
    return bounded_exp(sequence_mean(scores, of(scores)))
