"""Objectives of the studies that are no published recipe: MiniRL with one piece changed."""

from rlstab_jax.objectives import Objective, minirl, piece, ratios, trust, weights


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
