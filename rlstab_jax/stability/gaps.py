"""The gaps between the three policies, from log-probs of sampled tokens alone: unreduced statistics (`reduce`).

All log-probs are [batch, R] in nats; ``mask`` is True on real response tokens, and what lies outside it, NaN included,
is never read. Log-ratios are clipped to +-`LOG_RATIO_LIMIT`. The policies are the paper's: ``rollout`` mu_old,
``old`` pi_old, ``target`` pi_theta.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlstab_jax.stability.reduce import Statistics, ess_of, histogram_of, max_of, mean_of
from rlstab_jax.types import LOG_RATIO_LIMIT, masked

LogProbs = Float[Array, "batch R"]
Mask = Bool[Array, "batch R"]

EXTREME_RATIO = 2.0  # F(2): the share of tokens whose ratio is off by more than this factor (2510.11370)


def log_ratio(numerator: LogProbs, denominator: LogProbs, mask: Mask) -> LogProbs:
    """log(numerator/denominator), clipped; 0 outside the mask."""
    return jnp.clip(masked(jnp.subtract(numerator, denominator), mask), -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


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
    return {
        "mean": mean_of(weight, mask),
        "max": max_of(weight, mask),
        "ess": ess_of(weight, mask),
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
    """How far the paper's first-order approximation is off, with r_t = pi_theta/mu_old.

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


def effective_sample(target: LogProbs, rollout: LogProbs, mask: Mask) -> Statistics:
    """What importance sampling from mu_old to pi_theta costs, token by token and for whole sequences.

    Returns:
      token_ess, sequence_ess: effective sample size as a share of the sample, of r_t and of prod_t r_t.
      token_chi_square, sequence_chi_square: chi^2(pi_theta || mu_old) = E_mu[(r - 1)^2], estimated on the samples.
    """
    d = log_ratio(target, rollout, mask)
    token = jnp.exp(d)
    sequence, present = jnp.exp(jnp.clip(d.sum(1), -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)), mask.any(1)
    return {
        "token_ess": ess_of(token, mask),
        "sequence_ess": ess_of(sequence, present),
        "token_chi_square": mean_of((token - 1) ** 2, mask),
        "sequence_chi_square": mean_of((sequence - 1) ** 2, present),
    }


def ratio_factors(target: LogProbs, old: LogProbs, rollout: LogProbs, mask: Mask) -> Statistics:
    """Both factors of Eq. 5 and their product, apart: the keys of `discrepancy` under ``discrepancy_``, ``staleness_``
    and ``product_``, and in ``..._log_ratio`` a histogram for quantiles (`reduce.LogRatioHistogram`)."""
    pairs = {"discrepancy": (old, rollout), "staleness": (target, old), "product": (target, rollout)}
    statistics: Statistics = {}
    for name, (numerator, denominator) in pairs.items():
        statistics |= {f"{name}_{key}": value for key, value in discrepancy(numerator, denominator, mask).items()}
        statistics[f"{name}_log_ratio"] = histogram_of(log_ratio(numerator, denominator, mask), mask)
    return statistics


def routing_discrepancy(old_live: LogProbs, old_replayed: LogProbs, rollout: LogProbs, mask: Mask) -> Statistics:
    """How much of KL(mu_old || pi_old) the routing causes: KL with live routes minus KL with the rollout's routes, in
    nats.

    Args:
      old_live: log pi_old with its own routes.
      old_replayed: log pi_old with the experts that the inference engine chose (R3).
      rollout: log mu_old.

    Returns:
      k1, k3: the mean difference, by the estimators of `discrepancy`. Over the live KL, it is the routing's share.
    """
    live, replayed = log_ratio(old_live, rollout, mask), log_ratio(old_replayed, rollout, mask)
    k3 = (jnp.expm1(live) - live) - (jnp.expm1(replayed) - replayed)
    return {"k1": mean_of(replayed - live, mask), "k3": mean_of(k3, mask)}


def _kl(d: LogProbs, mask: Mask) -> Statistics:
    return {
        "k1": mean_of(-d, mask),
        "k3": mean_of(jnp.expm1(d) - d, mask),
        "max_ratio": max_of(jnp.exp(jnp.abs(d)), mask),
    }
