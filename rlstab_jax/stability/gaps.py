"""The gaps between the three policies, from log-probs of sampled tokens alone: unreduced statistics (`reduce`).

All log-probs are [batch, R] in nats; ``mask`` is True on real response tokens, and what lies outside it, NaN included,
is never read. Log-ratios are clipped to +-`LOG_RATIO_LIMIT`. PAPER, section 1 names the policies: ``rollout`` mu_old,
``old`` pi_old, ``target`` pi_theta.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlstab_jax.stability.reduce import EffectiveSampleSize, Statistics, max_of, mean_of
from rlstab_jax.types import masked

LogProbs = Float[Array, "batch R"]
Mask = Bool[Array, "batch R"]

LOG_RATIO_LIMIT = 20.0  # exp(20) = 4.9e8, and its square is still finite in float32
EXTREME_RATIO = 2.0  # F(2): the share of tokens whose ratio is off by more than this factor (2510.11370)


def log_ratio(numerator: LogProbs, denominator: LogProbs, mask: Mask) -> LogProbs:
    """log(numerator/denominator), clipped; 0 outside the mask."""
    return jnp.clip(masked(numerator - denominator, mask), -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def discrepancy(old: LogProbs, rollout: LogProbs, mask: Mask) -> Statistics:
    """The training-inference discrepancy, the first factor of Eq. 5: KL(mu_old || pi_old) on samples of mu_old.

    With d = log pi_old - log mu_old and r = exp(d), over the tokens of the mask:

    Returns:
      k1: mean of -d, in nats: unbiased, may be negative. The paper's metric.
      k3: mean of r - 1 - d >= 0, in nats: unbiased too, of lower variance.
      max_ratio: the largest max(r, 1/r).
      f2: share of tokens with max(r, 1/r) > 2.
    """
    d = log_ratio(old, rollout, mask)
    f2 = mean_of(jnp.abs(d) > jnp.log(EXTREME_RATIO), mask)
    return {**_kl(d, mask), "f2": f2}


def staleness(target: LogProbs, old: LogProbs, mask: Mask) -> Statistics:
    """The policy staleness, the second factor of Eq. 5: k1, k3 and max_ratio of KL(pi_old || pi_theta), as in
    `discrepancy`.

    The tokens were sampled from mu_old, so that the estimators are exact only without a discrepancy.
    """
    return _kl(log_ratio(target, old, mask), mask)


def weight_statistics(weight: LogProbs, truncated: Mask, mask: Mask) -> Statistics:
    """The importance weights as used: mean, max, ess (effective sample size by token), and the share truncated."""
    kept = masked(jnp.asarray(weight, jnp.float32), mask)
    ess = EffectiveSampleSize(kept.sum(), (kept**2).sum(), mask.sum().astype(jnp.float32))
    return {
        "mean": mean_of(weight, mask),
        "max": max_of(weight, mask),
        "ess": ess,
        "truncated": mean_of(truncated, mask),
    }


def trust_statistics(gate: LogProbs, advantage: LogProbs, mask: Mask) -> Statistics:
    """What the trust region stops, as shares of all tokens of the mask.

    Args:
      gate: 1 where the gradient passes, 0 where it is stopped.
      advantage: [batch, R], or anything that broadcasts to it, such as [batch, 1].

    Returns:
      masked: mean of 1 - gate; masked_high: those of them with A > 0; masked_low: those with A < 0.
    """
    stopped = 1.0 - gate
    advantage = jnp.broadcast_to(advantage, gate.shape)
    return {
        "masked": mean_of(stopped, mask),
        "masked_high": mean_of(masked(stopped, advantage > 0), mask),
        "masked_low": mean_of(masked(stopped, advantage < 0), mask),
    }


def first_order(target: LogProbs, rollout: LogProbs, mask: Mask) -> Statistics:
    """How far the paper's first-order approximation is off (PAPER section 2), with r_t = pi_theta/mu_old.

    Returns:
      sequence_gap: mean over sequences of |prod_t r_t - 1 - sum_t (r_t - 1)|: the value's second-order remainder.
      token_gap: mean over tokens of |prod_s r_s - r_t|: the error of the token's gradient weight, first order.
    """
    d = log_ratio(target, rollout, mask)
    ratio = jnp.exp(d)
    product = jnp.exp(jnp.clip(d.sum(1), -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    linear = 1.0 + masked(ratio - 1.0, mask).sum(1)
    return {
        "sequence_gap": mean_of(jnp.abs(product - linear), mask.any(1)),
        "token_gap": mean_of(jnp.abs(product[:, None] - ratio), mask),
    }


def _kl(d: LogProbs, mask: Mask) -> Statistics:
    return {
        "k1": mean_of(-d, mask),
        "k3": mean_of(jnp.expm1(d) - d, mask),
        "max_ratio": max_of(jnp.exp(jnp.abs(d)), mask),
    }
