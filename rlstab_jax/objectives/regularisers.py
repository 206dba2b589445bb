"""Regularisers: terms ``(scores) -> [batch, R]``, differentiable in ``target`` and ``entropy``; KL in the reward as
well.

With d = log pi_theta - log pi_ref of the sampled token. As *estimators* of the reverse KL(pi_theta || pi_ref), k1 and
k3 are unbiased on-policy and k2 is not; as *losses* what counts is the gradient of the expectation over fixed samples:

| term | expected gradient on-policy |
|---|---|
| k1 = d | 0: it regularises nothing |
| k2 = d^2 / 2 | that of the reverse KL |
| k3 = exp(-d) - 1 + d | that of the forward KL(pi_ref \\|\\| pi_theta) |
| `corrected` k1 or k3 | that of the reverse KL, off-policy too |

On each prefix, that is: the effect of a token on later prefixes is left out of a loss. `kl_in_reward` has it.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from rlstab_jax.objectives.core import plain_reward
from rlstab_jax.objectives.ratios import bounded_exp, target_over_rollout
from rlstab_jax.types import LOG_RATIO_LIMIT, Scores, UserError, masked


def k1(scores: Scores) -> Float[Array, "batch R"]:
    """d = log pi_theta - log pi_ref. Alone it has no expected gradient on-policy: use it under `corrected`."""
    return scores.target - _reference(scores)


def k2(scores: Scores) -> Float[Array, "batch R"]:
    """d^2 / 2."""
    return 0.5 * k1(scores) ** 2


def k3(scores: Scores) -> Float[Array, "batch R"]:
    """exp(-d) - 1 + d >= 0: GRPO's penalty (2402.03300, Eq. 4). Beyond `LOG_RATIO_LIMIT` the exponential goes on along
    its tangent: cut off, its gradient would be d's, which points the wrong way."""
    d = k1(scores)
    beyond = -d - jnp.clip(-d, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return bounded_exp(-d) * (1 + beyond) - 1 + d


def corrected(scores: Scores, term: Callable[[Scores], Float[Array, "batch R"]]) -> Float[Array, "batch R"]:
    """(pi_theta/mu_old) * term, the gradient flowing through the ratio too: unbiased off-policy for k1 and k3, in value
    and in gradient (2512.02556, section 3.1 has it with k3)."""
    return bounded_exp(target_over_rollout(scores)) * term(scores)


def negative_entropy(scores: Scores) -> Float[Array, "batch R"]:
    """-H(pi_theta) on each prefix, in nats, so that a positive coefficient keeps entropy up.

    Raises UserError where the scores came without the entropy.
    """
    if scores.entropy is None:
        raise UserError("scores: this objective has an entropy regulariser, and scores.entropy is missing (None)")
    return -scores.entropy


def kl_in_reward(
    scores: Scores, rewards: Float[Array, "batch"], coefficient: float, before: Callable = plain_reward
) -> Float[Array, "batch"]:
    """R - coefficient * sum_t (log pi_old - log pi_ref): the sequence's reverse KL as a part of the reward.

    R is what ``before`` makes of the rewards. A token of which either log-prob is no finite number adds nothing.
    """
    drift = scores.old - _reference(scores)
    return before(scores, rewards) - coefficient * masked(drift, scores.mask & jnp.isfinite(drift)).sum(1)


def _reference(scores: Scores) -> Float[Array, "batch R"]:
    if scores.reference is None:
        raise UserError("scores: this objective has a KL to a reference policy, and scores.reference is missing (None)")
    return scores.reference
