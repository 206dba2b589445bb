"""Divergences over the full vocabulary: exact on each prefix, where `gaps` estimates them from the sampled token alone.

Logits are [batch, R, vocab] at the sampling temperature, computed in float32. They exist only where a caller can afford
them: in a notebook, or chunk by chunk, for the statistics merge. No run of ours keeps them.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlstab_jax.stability.reduce import Mean, Statistics, mean_of

Logits = Float[Array, "batch R vocab"]
Mask = Bool[Array, "batch R"]


def entropy(logits: Logits, mask: Mask) -> Mean:
    """Mean over tokens of the entropy of the next-token distribution, in nats."""
    log_p = _log_softmax(logits)
    return mean_of(-_expect(log_p, log_p), mask)


def divergences(old: Logits, rollout: Logits, mask: Mask) -> Statistics:
    """Divergences between pi_old and mu_old (or any two policies) on each prefix, averaged over tokens.

    Returns:
      kl: KL(mu_old || pi_old), in nats: what k1 and k3 of `gaps.discrepancy` estimate.
      reverse_kl: KL(pi_old || mu_old), in nats.
      chi_square: chi^2(pi_old || mu_old) = sum pi_old^2 / mu_old - 1, log-ratios clipped to 20.
      total_variation: sum |pi_old - mu_old| / 2.
    """
    log_pi, log_mu = _log_softmax(old), _log_softmax(rollout)
    d = log_pi - log_mu
    pi, mu = jnp.exp(log_pi), jnp.exp(log_mu)
    return {
        "kl": mean_of(_expect(log_mu, -d), mask),
        "reverse_kl": mean_of(_expect(log_pi, d), mask),
        "chi_square": mean_of(_expect(log_mu, jnp.expm1(jnp.minimum(d, 20.0)) ** 2), mask),
        "total_variation": mean_of(0.5 * jnp.abs(pi - mu).sum(-1), mask),
    }


def _log_softmax(logits: Logits) -> Logits:
    return jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)


def _expect(log_p: Logits, values: Logits) -> Float[Array, "batch R"]:
    """sum_v p_v values_v; a token of probability 0 adds nothing, whatever its value."""
    p = jnp.exp(log_p)
    return jnp.where(p > 0, p * values, 0.0).sum(-1)
