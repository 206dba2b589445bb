"""Trust regions: ``(scores, advantage[batch, R]) -> gate[batch, R]``, 1 where the gradient passes and 0 where it is
stopped.

They never change ``c``: a stopped token stays in the denominator. Where a mask should reject instead, see `select`.
"""

from jaxtyping import Array, Float

from rlstab_jax.objectives.ratios import LogRatio, bounded_exp
from rlstab_jax.types import Scores

Gate = Float[Array, "batch R"]


def ppo_clip(scores: Scores, advantage: Float[Array, "batch R"], of: LogRatio, eps_low: float, eps_high: float) -> Gate:
    """0 if (A > 0 and r > 1 + eps_high) or (A < 0 and r < 1 - eps_low): MiniRL's M_t (Eq. 7), and the gradient of
    min(r A, clip(r, 1 - eps_low, 1 + eps_high) A), PPO (1707.06347, Eq. 7).

    r = exp(of): anchored at pi_old with ``of=target_over_old``, at mu_old with ``of=target_over_rollout``. An infinite
    eps is no clipping at all.
    """
    ratio = bounded_exp(of(scores))
    stopped = ((advantage > 0) & (ratio > 1 + eps_high)) | ((advantage < 0) & (ratio < 1 - eps_low))
    return 1.0 - stopped.astype(ratio.dtype)
