"""Log-ratios between the three policies (PAPER, Eq. 5), and what a sequence makes of them. All [batch, R], in nats.

Every log-ratio is 0 outside the mask and clipped to +-`LOG_RATIO_LIMIT` before it meets ``exp``, so that a ratio is
finite and positive whatever the log-probs were.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from rlstab_jax.types import Scores, masked

LogRatio = Callable[[Scores], Float[Array, "batch R"]]

LOG_RATIO_LIMIT = 20.0  # exp(20) = 4.9e8: past every cap in use, and its square is still finite in float32


def bounded_exp(log_ratio: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``exp`` of a log-ratio clipped to +-`LOG_RATIO_LIMIT`."""
    return jnp.exp(jnp.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


def target_over_rollout(scores: Scores) -> Float[Array, "batch R"]:
    """log pi_theta/mu_old: both gaps together."""
    return masked(scores.target - scores.rollout, scores.mask)


def target_over_old(scores: Scores) -> Float[Array, "batch R"]:
    """log pi_theta/pi_old: policy staleness, blind to the inference engine."""
    return masked(scores.target - scores.old, scores.mask)


def old_over_rollout(scores: Scores) -> Float[Array, "batch R"]:
    """log pi_old/mu_old: the discrepancy between the training and the inference engine."""
    return masked(scores.old - scores.rollout, scores.mask)


def sequence_sum(scores: Scores, values: Float[Array, "batch R"]) -> Float[Array, "batch R"]:
    """The sum of each row over its mask, written to every token of the row."""
    return jnp.broadcast_to(masked(values, scores.mask).sum(1, keepdims=True), values.shape)


def sequence_mean(scores: Scores, values: Float[Array, "batch R"]) -> Float[Array, "batch R"]:
    """The mean of each row over its mask, written to every token of the row; 0 for an empty row."""
    length = scores.mask.sum(1, keepdims=True).astype(values.dtype)
    return sequence_sum(scores, values) / jnp.maximum(length, 1)


def sequence_max(scores: Scores, values: Float[Array, "batch R"]) -> Float[Array, "batch R"]:
    """The maximum of each row over its mask, written to every token of the row; -inf for an empty row."""
    largest = jnp.where(scores.mask, values, -jnp.inf).max(1, keepdims=True)
    return jnp.broadcast_to(largest, values.shape)
