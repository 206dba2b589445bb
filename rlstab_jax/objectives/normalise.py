"""Normalisations: ``(mask[batch, R], groups[batch]) -> c[batch, R]``, over a whole mini-batch, before micro-batching.

A row whose mask is empty (padding of the batch, a rejected response) is not a response: no denominator counts it. A
batch without any token gives c = 0.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlstab_jax.objectives.groups import Groups, group_count, group_sum
from rlstab_jax.types import masked

Mask = Bool[Array, "batch R"]
Coefficients = Float[Array, "batch R"]


def response_mean(mask: Mask, groups: Groups) -> Coefficients:
    """c = 1 / responses: the mean over responses of the token sum. MiniRL (Eq. 7)."""
    return _on(mask, _responses(mask).sum())


def response_length_mean(mask: Mask, groups: Groups) -> Coefficients:
    """c = 1 / (responses |y|): the mean over responses of the token mean. The paper's ablation "+ length
    normalisation".
    """
    return _on(mask, _responses(mask).sum() * _lengths(mask)[:, None])


def group_length_mean(mask: Mask, groups: Groups) -> Coefficients:
    """c = 1 / (groups G |y|): the mean over groups of (1/G) sum_i (1/|y_i|) sum_t. GRPO (2402.03300, Eq. 3)."""
    size = group_sum(_responses(mask), groups)
    return _on(mask, (group_count(_responses(mask), groups) * size * _lengths(mask))[:, None])


def group_token_mean(mask: Mask, groups: Groups) -> Coefficients:
    """c = 1 / (groups tokens-of-the-group): the mean over groups of the token mean. CISPO (2506.13585, Eq. 4)."""
    return _on(mask, (group_count(_responses(mask), groups) * group_sum(_lengths(mask), groups))[:, None])


def token_mean(mask: Mask, groups: Groups) -> Coefficients:
    """c = 1 / tokens of the mini-batch: DAPO's token-level loss (2503.14476)."""
    return _on(mask, _lengths(mask).sum())


def constant_length(mask: Mask, groups: Groups, length: float = 1.0) -> Coefficients:
    """c = 1 / (responses * length), one constant length for all: Dr.GRPO (2503.20783)."""
    return _on(mask, _responses(mask).sum() * length)


def _on(mask: Mask, denominator: Array) -> Coefficients:
    return masked(jnp.broadcast_to(1.0 / jnp.where(denominator > 0, denominator, 1.0), mask.shape), mask)


def _responses(mask: Mask) -> Float[Array, "batch"]:
    return mask.any(1).astype(float)


def _lengths(mask: Mask) -> Float[Array, "batch"]:
    return mask.sum(1).astype(float)
