"""Published objectives, each a composition of pieces. Their gradients are those of the papers; loss values need not be.

Symbols as in PAPER section 1: ``rollout`` mu_old, ``old`` pi_old, ``target`` pi_theta; A the advantage, c the
normalisation. Numbers are traced: two objectives of one recipe that differ in numbers alone share one compiled program.
An infinite cap or eps switches a truncation or a clip off without compiling again.
"""

from typing import Literal

from rlstab_jax.objectives import advantages, normalise, truncation, trust, weights
from rlstab_jax.objectives.core import Objective, piece
from rlstab_jax.objectives.ratios import old_over_rollout, target_over_old, target_over_rollout


def minirl(
    eps_low: float = 0.2,
    eps_high: float = 0.27,
    cap: float = 5.0,
    cap_on: Literal["product", "discrepancy"] = "product",
    importance_sampling: bool = True,
    length_normalise: bool = False,
) -> Objective:
    """MiniRL (PAPER, Eq. 7): mean over responses of sum_t M_t sg[min(pi_theta/mu_old, cap)] A log pi_theta.

    A = R - group mean. M_t is the PPO clip on pi_theta/pi_old, decided on the uncapped ratio.

    Args:
      eps_low, eps_high: the clip range; infinity for no clipping.
      cap: truncation of the weight; infinity for none.
      cap_on: what is capped: pi_theta/mu_old ("product") or its factor pi_old/mu_old alone ("discrepancy").
      importance_sampling: False is the paper's ablation without the training-inference correction: weight
        pi_theta/pi_old.
      length_normalise: True is the paper's ablation with 1/|y|.
    """
    weight = piece(weights.token_ratio, of=target_over_rollout if importance_sampling else target_over_old)
    if cap_on == "product":
        truncate = piece(truncation.cap, at=cap)
    else:
        truncate = piece(truncation.cap_factor, of=old_over_rollout, at=cap)
    return Objective(
        advantage=piece(advantages.group_mean),
        weight=weight,
        truncate=truncate,
        trust=piece(trust.ppo_clip, of=target_over_old, eps_low=eps_low, eps_high=eps_high),
        normalise=piece(normalise.response_length_mean if length_normalise else normalise.response_mean),
    )
