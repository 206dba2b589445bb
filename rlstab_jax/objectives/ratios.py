"""Log-ratios between the three policies (PAPER, Eq. 5) and what a sequence makes of them: ``(scores) -> [batch, R]``,
in nats.

Weights, caps, bands and trust regions are all built on such a log-ratio: it is their argument ``of``. Outside the mask
it is 0. `bounded_exp` clips it before ``exp``, so that a ratio is finite and positive whatever the log-probs were.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from rlstab_jax.types import LOG_RATIO_LIMIT, Scores, UserError, masked

LogRatio = Callable[[Scores], Float[Array, "batch R"]]


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


def sequence(scores: Scores, of: LogRatio) -> Float[Array, "batch R"]:
    """sum_s of_s, the log-ratio of the whole sequence (Eq. 1), on each of its tokens."""
    total = masked(of(scores), scores.mask).sum(1, keepdims=True)
    return jnp.broadcast_to(total, scores.mask.shape)


def geometric(scores: Scores, of: LogRatio) -> Float[Array, "batch R"]:
    """(1/|y|) sum_s of_s, GSPO's length-normalised sequence ratio (2507.18071, Eq. 7), on each token; 0 for an empty
    row.
    """
    return sequence(scores, of) / jnp.maximum(scores.mask.sum(1, keepdims=True), 1)


def prefix_minimum(scores: Scores, of: LogRatio) -> Float[Array, "batch R"]:
    """of_t + min_{s < t} of_s, and of_1 for the first token: MinPRO's stand-in for the ratio of the prefix
    (2601.22718).
    """
    ratios = masked(of(scores), scores.mask)
    smallest = lax.cummin(jnp.where(scores.mask, ratios, jnp.inf), axis=1)[:, :-1]
    before = jnp.pad(jnp.where(jnp.isfinite(smallest), smallest, 0.0), ((0, 0), (1, 0)))
    return masked(ratios + before, scores.mask)


def product(scores: Scores, first: LogRatio, second: LogRatio) -> Float[Array, "batch R"]:
    """first_t + second_t: the product of two ratios."""
    return first(scores) + second(scores)


def clipped(scores: Scores, of: LogRatio, low: float, high: float) -> Float[Array, "batch R"]:
    """log clip(exp(of_t), low, high); a ``low`` of 0 or less leaves that side open."""
    return masked(jnp.clip(of(scores), jnp.log(jnp.maximum(low, 0.0)), jnp.log(high)), scores.mask)


def router_shift(scores: Scores, floor: float) -> Float[Array, "batch R"]:
    """log gamma_t, gamma_t = max(floor, exp(-mean over layers and experts in use of |log s_theta - log s_old|)).

    RSPO (2510.23027). s are the router's probabilities of the experts that were in use under theta_old, also those that
    theta no longer chooses. Raises UserError where the scores came without them.
    """
    if scores.router_old is None or scores.router_target is None:
        raise UserError("scores: the router-shift weight needs router_old and router_target; they are missing (None)")
    shift = jnp.abs(scores.router_target - scores.router_old).mean(-1)
    return masked(jnp.maximum(-shift, jnp.log(floor)), scores.mask)
