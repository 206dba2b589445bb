"""Objectives of the studies that are no published recipe: MiniRL with one piece changed."""

from rlstab_jax.objectives import Objective, minirl, piece, ratios, trust


def minirl_anchored_at_mu(eps_low: float = 0.2, eps_high: float = 0.27) -> Objective:
    """MiniRL whose trust region is around mu_old, not pi_old: the clip is decided on pi_theta/mu_old."""
    return minirl().replace(
        trust=piece(trust.ppo_clip, of=ratios.target_over_rollout, eps_low=eps_low, eps_high=eps_high)
    )
