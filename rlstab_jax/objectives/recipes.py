"""Published objectives, each a composition of pieces. Their gradients are those of the papers, but for what `dapo` and
`rspo` say of their own; loss values need not be.

Symbols as in the paper: ``rollout`` mu_old, ``old`` pi_old, ``target`` pi_theta; r = pi_theta/pi_old, A the
advantage, c the normalisation. Numbers are traced: two objectives of one recipe that differ in numbers alone share one
compiled program, and an infinite cap or eps switches a truncation or a clip off without compiling again.
"""

from typing import Literal

from jax.tree_util import Partial

from rlstab_jax.objectives import advantages, normalise, ratios, truncation, trust, weights
from rlstab_jax.objectives.core import Objective, piece
from rlstab_jax.objectives.ratios import old_over_rollout, target_over_old, target_over_rollout
from rlstab_jax.types import UserError

INFINITY = float("inf")


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
    if cap_on not in ("product", "discrepancy"):
        raise UserError(f"cap_on = {cap_on!r}: expected 'product' or 'discrepancy'")
    if cap_on == "product":
        truncate = piece(truncation.cap, at=cap)
    else:
        # Without the correction the weight has no such factor, hence nothing to cap.
        truncate = piece(truncation.cap_factor, of=old_over_rollout, at=cap if importance_sampling else INFINITY)
    return Objective(
        advantage=piece(advantages.group_mean),
        weight=piece(weights.importance, of=target_over_rollout if importance_sampling else target_over_old),
        truncate=truncate,
        trust=piece(trust.ppo_clip, of=target_over_old, eps_low=eps_low, eps_high=eps_high),
        normalise=piece(normalise.response_length_mean if length_normalise else normalise.response_mean),
    )


def reinforce(baseline: float = 0.0) -> Objective:
    """REINFORCE (Williams, 1992): mean over responses of (R - baseline) sum_t log pi_theta. Takes samples for
    on-policy.
    """
    return Objective(
        advantage=piece(advantages.constant_baseline, baseline=baseline),
        weight=piece(weights.unweighted),
        normalise=piece(normalise.response_mean),
    )


def rloo() -> Objective:
    """RLOO (2402.14740): REINFORCE with the mean reward of the group's other responses for a baseline."""
    return Objective(
        advantage=piece(advantages.leave_one_out),
        weight=piece(weights.unweighted),
        normalise=piece(normalise.response_mean),
    )


def sequence_is(cap: float = INFINITY) -> Objective:
    """The exact sequence-level gradient (PAPER, Eq. 2): sg[min(prod_t pi_theta/mu_old, cap)] A sum_t log pi_theta.

    What the token-level objectives approximate to first order; its variance grows exponentially with length.
    """
    return Objective(
        advantage=piece(advantages.group_mean),
        weight=piece(weights.importance, of=piece(ratios.sequence, of=target_over_rollout)),
        truncate=piece(truncation.cap, at=cap),
        normalise=piece(normalise.response_mean),
    )


def grpo(eps_low: float = 0.2, eps_high: float = 0.2, dual_clip: float = INFINITY) -> Objective:
    """GRPO (2402.03300, Eq. 3): (1/G) sum_i (1/|y_i|) sum_t min(r A, clip(r, 1 - eps_low, 1 + eps_high) A).

    A = (R - mean) / std of the group. Blind to mu_old. ``dual_clip`` also stops A < 0 where r exceeds it (1912.09729).
    Its KL to a reference policy is a regulariser: `regularisers.k3`.
    """
    return Objective(
        advantage=piece(advantages.group_mean_std),
        weight=piece(weights.importance, of=target_over_old),
        trust=_clip_both_ways(eps_low, eps_high, dual_clip),
        normalise=piece(normalise.group_length_mean),
    )


def dr_grpo(eps_low: float = 0.2, eps_high: float = 0.2, length: float = 1.0) -> Objective:
    """Dr.GRPO (2503.20783): GRPO without its two biases: A = R - mean, and a constant ``length`` for |y| (tokens)."""
    return Objective(
        advantage=piece(advantages.group_mean),
        weight=piece(weights.importance, of=target_over_old),
        trust=piece(trust.ppo_clip, of=target_over_old, eps_low=eps_low, eps_high=eps_high),
        normalise=piece(normalise.constant_length, length=length),
    )


def dapo(eps_low: float = 0.2, eps_high: float = 0.28, dual_clip: float = INFINITY) -> Objective:
    """DAPO (2503.14476): GRPO with a higher upper clip and the mean over all tokens of the mini-batch.

    The source writes that mean over the responses of one prompt (``normalise.group_token_mean``); over the mini-batch,
    as implementations have it, a prompt counts by its tokens. Its dynamic sampling and its overlong penalty are no part
    of the loss: the one chooses prompts, the other shapes rewards.
    """
    return Objective(
        advantage=piece(advantages.group_mean_std),
        weight=piece(weights.importance, of=target_over_old),
        trust=_clip_both_ways(eps_low, eps_high, dual_clip),
        normalise=piece(normalise.token_mean),
    )


def gspo(eps_low: float = 3e-4, eps_high: float = 4e-4) -> Objective:
    """GSPO (2507.18071, Eq. 5): (1/G) sum_i min(s_i A, clip(s_i) A), s_i = (pi_theta(y_i)/pi_old(y_i))^(1/|y_i|)."""
    ratio = piece(ratios.geometric, of=target_over_old)
    return Objective(
        advantage=piece(advantages.group_mean_std),
        weight=piece(weights.importance, of=ratio),
        trust=piece(trust.ppo_clip, of=ratio, eps_low=eps_low, eps_high=eps_high),
        normalise=piece(normalise.group_length_mean),
    )


def cispo(eps_low: float = 0.2, eps_high: float = 0.27) -> Objective:
    """CISPO (2506.13585, Eq. 4): per group, mean over its tokens of sg[clip(r, 1 - eps_low, 1 + eps_high)] A log
    pi_theta.

    A = (R - mean) / std. The weight is clipped and no token's gradient is stopped. The default range is MiniRL's, for
    comparison; the source leaves the lower side open (``eps_low=inf``).
    """
    return Objective(
        advantage=piece(advantages.group_mean_std),
        weight=piece(weights.importance, of=target_over_old),
        truncate=piece(truncation.clip, eps_low=eps_low, eps_high=eps_high),
        normalise=piece(normalise.group_token_mean),
    )


def tis(eps_low: float = 0.2, eps_high: float = 0.28, cap: float = 2.0) -> Objective:
    """Truncated importance sampling (Yao et al., 2025): DAPO's loss times sg[min(pi_old/mu_old, cap)] on each token."""
    return Objective(
        advantage=piece(advantages.group_mean_std),
        weight=piece(weights.importance, of=target_over_rollout),
        truncate=piece(truncation.cap_factor, of=old_over_rollout, at=cap),
        trust=piece(trust.ppo_clip, of=target_over_old, eps_low=eps_low, eps_high=eps_high),
        normalise=piece(normalise.token_mean),
    )


def icepop(eps_low: float = 0.2, eps_high: float = 0.2, band_low: float = 0.5, band_high: float = 5.0) -> Objective:
    """IcePop (Ling team, 2025): GRPO's loss times pi_old/mu_old where that lies in [band_low, band_high], else 0.

    Raises UserError for a band that is empty.
    """
    if band_low > band_high:
        raise UserError(f"band_low = {band_low}, band_high = {band_high}: an empty band stops every token; swap them")
    clip = piece(trust.ppo_clip, of=target_over_old, eps_low=eps_low, eps_high=eps_high)
    band = piece(trust.band, of=old_over_rollout, low=band_low, high=band_high)
    return Objective(
        advantage=piece(advantages.group_mean_std),
        weight=piece(weights.importance, of=target_over_rollout),
        trust=piece(trust.both, first=clip, second=band),
        normalise=piece(normalise.group_length_mean),
    )


def dppo_tv(delta: float = 0.15, cap: float = 20.0) -> Objective:
    """DPPO (2602.04879) with total variation: stops steps away from mu_old where |pi_theta - mu_old| > delta.

    Weight min(pi_theta/mu_old, cap). Advantage and normalisation are MiniRL's.
    """
    return _dppo(trust.binary_tv, delta, cap)


def dppo_kl(delta: float = 0.05, cap: float = 20.0) -> Objective:
    """DPPO (2602.04879) with binary KL(mu_old || pi_theta) > delta nats; otherwise as `dppo_tv`."""
    return _dppo(trust.binary_kl, delta, cap)


def rspo(eps_low: float = 0.33, eps_high: float = 0.49, floor: float = 0.7) -> Objective:
    """RSPO (2510.23027): the geometric mean over a response of clip(gamma_t r_t), with gamma_t the router shift.

    gamma_t = max(floor, exp(-mean |log router probability of theta - of theta_old|)), stop-gradient. Each token is
    clipped on gamma_t r_t by the sign of A; a clipped token has no gradient. Clip range of GMPO, about exp(+-0.4)
    (2507.20673); the floor is this project's choice. Here the mean clips both sides at once, the source only the side
    of A's sign. Routers are compared at the experts that pi_old used, but where R3 has no route of a token: there those
    of pi_theta are, by their rank.
    """
    ratio = piece(ratios.product, first=target_over_old, second=piece(ratios.router_shift, floor=floor))
    clipped = piece(ratios.clipped, of=ratio, low=1 - eps_low, high=1 + eps_high)
    return Objective(
        advantage=piece(advantages.group_mean_std),
        weight=piece(weights.importance, of=piece(ratios.geometric, of=clipped)),
        trust=piece(trust.ppo_clip, of=ratio, eps_low=eps_low, eps_high=eps_high),
        normalise=piece(normalise.group_length_mean),
    )


def _dppo(divergence: ratios.LogRatio, delta: float, cap: float) -> Objective:
    return Objective(
        advantage=piece(advantages.group_mean),
        weight=piece(weights.importance, of=target_over_rollout),
        truncate=piece(truncation.cap, at=cap),
        trust=piece(trust.divergence_clip, divergence=divergence, at=delta),
        normalise=piece(normalise.response_mean),
    )


def _clip_both_ways(eps_low: float, eps_high: float, dual_clip: float) -> Partial:
    clip = piece(trust.ppo_clip, of=target_over_old, eps_low=eps_low, eps_high=eps_high)
    return piece(trust.both, first=clip, second=piece(trust.dual_clip, of=target_over_old, at=dual_clip))
