"""Trust regions: ``(scores, advantage[batch, R]) -> gate[batch, R]``, 1 where the gradient passes, 0 where it is
stopped.

They never change ``c``: a stopped token stays in the denominator. Where tokens are to be rejected instead, so that they
leave the denominator too, `passing` turns a gate into a ``select``. A mask on the ratio of a whole sequence is the same
gate on the log-ratio of the sequence: ``of=piece(geometric, of=...)``.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlstab_jax.objectives.ratios import LogRatio, bounded_exp, geometric
from rlstab_jax.types import Scores

Advantage = Float[Array, "batch R"]
Gate = Float[Array, "batch R"]
Trust = Callable[[Scores, Advantage], Gate]


def ppo_clip(scores: Scores, advantage: Advantage, of: LogRatio, eps_low: float, eps_high: float) -> Gate:
    """0 if (A > 0 and r > 1 + eps_high) or (A < 0 and r < 1 - eps_low): MiniRL's M_t (Eq. 7), and the gradient of
    min(r A, clip(r, 1 - eps_low, 1 + eps_high) A), PPO (1707.06347, Eq. 7).

    r = exp(of): anchored at pi_old with ``of=target_over_old``, at mu_old with ``of=target_over_rollout``. An infinite
    eps is no clipping at all.
    """
    ratio = bounded_exp(of(scores))
    return _stop(ratio, ((advantage > 0) & (ratio > 1 + eps_high)) | ((advantage < 0) & (ratio < 1 - eps_low)))


def dual_clip(scores: Scores, advantage: Advantage, of: LogRatio, at: float) -> Gate:
    """0 if A < 0 and r > at: the gradient of max(r A, at A), dual-clip PPO (1912.09729). Combine it by `both`."""
    ratio = bounded_exp(of(scores))
    return _stop(ratio, (advantage < 0) & (ratio > at))


def band(scores: Scores, advantage: Advantage, of: LogRatio, low: float, high: float) -> Gate:
    """0 unless low <= f <= high, f = exp(of). IcePop's double-sided mask is on f = pi_old/mu_old (0.5 to 5), the
    geometric sequence mask on the geometric mean of pi_theta/mu_old."""
    ratio = bounded_exp(of(scores))
    return _stop(ratio, (ratio < low) | (ratio > high))


def divergence_clip(scores: Scores, advantage: Advantage, divergence: LogRatio, at: float) -> Gate:
    """0 if D > at and the step would lead further away: (A > 0 and pi_theta > mu) or (A < 0 and pi_theta < mu).

    DPPO (2602.04879), anchored at mu_old. ``divergence`` is `binary_tv` or `binary_kl`.
    """
    away = jnp.sign(advantage) * (scores.target - scores.rollout) > 0
    return _stop(advantage, away & (divergence(scores) > at))


def binary_tv(scores: Scores) -> Float[Array, "batch R"]:
    """|pi_theta(y_t) - mu_old(y_t)|: total variation between "this token" and "another" under both (2602.04879)."""
    return jnp.abs(jnp.exp(scores.target) - jnp.exp(scores.rollout))


def binary_kl(scores: Scores) -> Float[Array, "batch R"]:
    """KL(mu_old || pi_theta) between "this token" and "another", in nats (2602.04879)."""
    other_target, other_rollout = _log_other(scores.target), _log_other(scores.rollout)
    this = jnp.exp(scores.rollout) * (scores.rollout - scores.target)
    return this + jnp.exp(other_rollout) * (other_rollout - other_target)


def largest_token_kl(scores: Scores, advantage: Advantage, of: LogRatio, at: float) -> Gate:
    """0 on every token of a sequence whose largest k3 = exp(of) - 1 - of exceeds ``at`` nats: trust-region masking.

    An approximation: the original (2512.23075) asks for the full-vocabulary KL on each prefix, and this is its estimate
    from the one sampled token.
    """
    log_ratio = jnp.where(scores.mask, of(scores), 0.0)
    k3 = bounded_exp(log_ratio) - 1 - log_ratio
    return _stop(advantage, jnp.broadcast_to(k3.max(1, keepdims=True) > at, scores.mask.shape))


def negative_sequence_mask(scores: Scores, advantage: Advantage, of: LogRatio, at: float) -> Gate:
    """0 if A < 0 and (1/|y|) sum_t -of_t > at nats: DeepSeek-V3.2's off-policy sequence mask (2512.02556, Eq. 9).

    ``of=target_over_rollout`` where the sampling policy is the inference engine.
    """
    return _stop(advantage, (advantage < 0) & (-geometric(scores, of) > at))


def both(scores: Scores, advantage: Advantage, first: Trust, second: Trust) -> Gate:
    """The product of two gates."""
    return first(scores, advantage) * second(scores, advantage)


def passing(scores: Scores, gate: Trust) -> Bool[Array, "batch R"]:
    """A ``select`` that rejects what a gate stops. The gate sees A = 0 and pi_theta = pi_old, so it is one that stops
    tokens whatever their advantage, such as `band` or `largest_token_kl`; clips by the advantage's sign reject none.
    """
    return scores.mask & (gate(scores, jnp.zeros_like(scores.old)) > 0)


def _stop(like: Float[Array, "batch R"], stopped: Bool[Array, "batch R"]) -> Gate:
    return 1.0 - stopped.astype(like.dtype)


def _log_other(log_prob: Float[Array, "batch R"]) -> Float[Array, "batch R"]:
    """log(1 - p), with 1 - p of at least 1e-7: a certain token leaves a finite divergence."""
    return jnp.log(jnp.maximum(-jnp.expm1(log_prob), 1e-7))
