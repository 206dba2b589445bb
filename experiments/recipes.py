"""Objectives of the studies that are no published recipe: MiniRL with one piece changed."""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlstab_jax.objectives import Objective, minirl, piece, ratios, trust, weights
from rlstab_jax.types import Scores

Weight = Callable[[Scores], Float[Array, "batch R"]]


def minirl_anchored_at_mu(eps_low: float = 0.2, eps_high: float = 0.27) -> Objective:
    """MiniRL whose trust region is around mu_old, not pi_old: the clip is decided on pi_theta/mu_old."""
    return minirl().replace(
        trust=piece(trust.ppo_clip, of=ratios.target_over_rollout, eps_low=eps_low, eps_high=eps_high)
    )


def minirl_trm(at: float = 0.2) -> Objective:
    """MiniRL whose trust region is a mask of whole sequences, and no clip of tokens: those of which the largest token
    KL(mu_old || pi_theta) exceeds ``at`` nats have no gradient (TRM, 2512.23075). The KL is estimated by k3 on the
    sampled token; the threshold is this project's choice.
    """
    return minirl().replace(trust=piece(trust.largest_token_kl, of=ratios.target_over_rollout, at=at))


def minirl_minpro() -> Objective:
    """MiniRL whose weight is that of the prefix, pi_theta/mu_old of the token times the smallest one before it (MinPRO,
    2601.22718), capped as MiniRL's.
    """
    prefix = piece(ratios.prefix_minimum, of=ratios.target_over_rollout)
    return minirl().replace(weight=piece(weights.importance, of=prefix))


def minirl_kpop(at: float = 0.05) -> Objective:
    """MiniRL of which tokens are masked as well where the engines differ too much: by binary KL between pi_old and
    mu_old, "this token" against "another", in either direction beyond ``at`` nats (KPop, Ling team, 2026). The weight
    and the threshold, which is DPPO's, are this project's choice.
    """
    return _masked(piece(engines_apart, at=at))


def minirl_geometric(low: float = 0.95, high: float = 1.05) -> Objective:
    """MiniRL of which whole sequences are masked as well: those whose geometric mean of pi_old/mu_old is outside the
    band. The band is this project's choice.
    """
    return _masked(piece(trust.band, of=piece(ratios.geometric, of=ratios.old_over_rollout), low=low, high=high))


def minirl_uneven(spread: float = 0.95, masked: float = 0.0156) -> Objective:
    """MiniRL that loses what replay of another token's routes makes it lose, but for the approximation: each token's
    weight is multiplied by a random number of mean 1 (lognormal, of ``spread``) and a random share of tokens is
    ``masked``. In expectation the gradient keeps its direction. By default the weights' effective sample size halves,
    as it does there, and 2% of tokens are masked.
    """
    objective = minirl()
    return objective.replace(
        weight=piece(_uneven, of=objective.weight, spread=spread),
        trust=piece(trust.both, first=objective.trust, second=piece(_random_mask, share=masked)),
    )


def _uneven(scores: Scores, of: Weight, spread: float) -> Float[Array, "batch R"]:
    noise = jax.random.normal(_key(scores, 0), scores.mask.shape)
    return of(scores) * jnp.exp(spread * noise - spread**2 / 2)


def _random_mask(scores: Scores, advantage: trust.Advantage, share: float) -> trust.Gate:
    return 1.0 - jax.random.bernoulli(_key(scores, 1), share, advantage.shape).astype(advantage.dtype)


def _key(scores: Scores, of: int) -> jax.Array:
    """Of the batch alone, so that the objective stays a pure function of it."""
    total = jnp.where(scores.mask, scores.old, 0.0).sum().astype(jnp.float32)
    return jax.random.fold_in(jax.random.key(of), jax.lax.bitcast_convert_type(total, jnp.uint32))


def engines_apart(scores: Scores, advantage: trust.Advantage, at: float) -> trust.Gate:
    """0 where KL(mu_old || pi_old) or KL(pi_old || mu_old) of one token against all others exceeds ``at`` nats."""
    forward = trust.binary_kl(replace(scores, target=scores.old))
    backward = trust.binary_kl(replace(scores, target=scores.rollout, rollout=scores.old))
    return (jnp.maximum(forward, backward) <= at).astype(advantage.dtype)


def _masked(gate: trust.Trust) -> Objective:
    objective = minirl()
    return objective.replace(trust=piece(trust.both, first=objective.trust, second=gate))
