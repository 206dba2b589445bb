"""Advantages: ``(rewards[batch], groups[batch]) -> [batch]``, over a whole rollout batch, before it is split.

Groups are the responses of one prompt; they may differ in size. Each group's rewards are shifted by its smallest before
they are averaged, so that equal rewards give an advantage of exactly 0 in any precision. A NaN or infinite reward makes
its own group NaN or infinite and no other, and the surrogate then gives that group a gradient of exactly 0; a run
refuses it before (`tasks.rewards_of`).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlstab_jax.objectives.groups import group_min, group_sum


def group_mean(rewards: Float[Array, "batch"], groups: Int[Array, "batch"]) -> Float[Array, "batch"]:
    """A = R - mean of R over its group: MiniRL, Dr.GRPO (2503.20783).

    >>> group_mean(jnp.array([1.0, 0.0, 3.0]), jnp.array([0, 0, 2]))
    Array([ 0.5, -0.5,  0. ], dtype=float32)
    """
    shifted, count = _shifted(rewards, groups)
    return shifted - group_sum(shifted, groups) / count


def group_mean_std(
    rewards: Float[Array, "batch"], groups: Int[Array, "batch"], epsilon: float = 1e-6
) -> Float[Array, "batch"]:
    """A = (R - mean) / (std + epsilon) over its group, with the population's std: GRPO (2402.03300, Eq. 3 and section
    4.1.2).
    """
    advantage = group_mean(rewards, groups)
    _, count = _shifted(rewards, groups)
    std = jnp.sqrt(group_sum(advantage**2, groups) / count)
    return advantage / (std + epsilon)


def leave_one_out(rewards: Float[Array, "batch"], groups: Int[Array, "batch"]) -> Float[Array, "batch"]:
    """A = R - mean of the *other* rewards of its group = n/(n-1) (R - mean): RLOO (2402.14740); 0 if alone."""
    _, count = _shifted(rewards, groups)
    return group_mean(rewards, groups) * jnp.where(count > 1, count / jnp.maximum(count - 1, 1), 0)


def batch_normalised(
    rewards: Float[Array, "batch"], groups: Int[Array, "batch"], epsilon: float = 1e-6
) -> Float[Array, "batch"]:
    """A = (R - mean over its group) / (std of these over the batch + epsilon): REINFORCE++-baseline (2501.03262)."""
    advantage = group_mean(rewards, groups)
    return advantage / (jnp.std(advantage, where=jnp.isfinite(advantage)) + epsilon)


def constant_baseline(
    rewards: Float[Array, "batch"], groups: Int[Array, "batch"], baseline: float = 0.0
) -> Float[Array, "batch"]:
    """A = R - baseline, the same for every prompt: REINFORCE (Williams, 1992). Reads no group."""
    return rewards - baseline


def _shifted(
    rewards: Float[Array, "batch"], groups: Int[Array, "batch"]
) -> tuple[Float[Array, "batch"], Float[Array, "batch"]]:
    """Rewards less the smallest of their group, and the size of the group."""
    return rewards - group_min(rewards, groups), group_sum(jnp.ones_like(rewards), groups)
