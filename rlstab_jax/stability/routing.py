"""Routing of the experts: disagreement between two passes, load and margin. Per layer, over tokens that were fed.

`Routes` are [layer, batch, fed, k]; ``fed_mask`` [batch, fed] is True on the tokens that count. The value
``num_experts`` means "not recorded".
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlstab_jax.stability.reduce import Mean, Statistics, mean_of
from rlstab_jax.types import Routes

FedMask = Bool[Array, "batch fed"]


def differ(first: Routes, second: Routes) -> Bool[Array, "layer batch fed"]:
    """Whether the top-k *sets* of two passes differ, whatever their order; also where nothing was fed, and without a
    meaning where one of them was not recorded. The experts of a token are distinct."""
    return ~(first[..., :, None] == second[..., None, :]).any(-1).all(-1)


def disagreement(first: Routes, second: Routes, fed_mask: FedMask, num_experts: int) -> Mean:
    """The share of tokens whose top-k *sets* differ between two passes, whatever their order.

    A token-layer with a value that was not recorded, in either pass, is not counted.

    Returns:
      A mean of shape [layer].
    """
    counted = _recorded(first, num_experts) & _recorded(second, num_experts) & fed_mask
    return mean_of(differ(first, second), counted, axis=(1, 2))


def tokens_differ(first: Routes, second: Routes, fed_mask: FedMask, num_experts: int) -> Mean:
    """The share of tokens of which the top-k set of some layer differs between two passes.

    A layer that was not recorded, in either pass, does not count, and neither does a token without a recorded one.
    """
    counted = _recorded(first, num_experts) & _recorded(second, num_experts) & fed_mask
    return mean_of((differ(first, second) & counted).any(0), counted.any(0))


def three_ways(rollout: Routes, old: Routes, current: Routes, fed_mask: FedMask, num_experts: int) -> Statistics:
    """`disagreement` between each two of mu_old's, pi_old's and pi_theta's own choices, each of shape [layer].

    ``rollout_old`` is the engines' doing, ``old_current`` the updates', ``rollout_current`` both together.
    """
    pairs = {"rollout_old": (rollout, old), "old_current": (old, current), "rollout_current": (rollout, current)}
    return {name: disagreement(*pair, fed_mask, num_experts) for name, pair in pairs.items()}


def flips(
    first: Routes,
    second: Routes,
    margin: Float[Array, "layer batch fed"],
    fed_mask: FedMask,
    num_experts: int,
) -> Statistics:
    """Disagreement split by cause. A flip at (layer l, token t) is *downstream* if its row has a flip at a layer below
    l, at t or at an earlier token: those are what the router's input depends on, through the residual stream and
    attention. The others are *first* flips, which the arithmetic of the two passes alone can have caused.

    Args:
      margin: k-th minus (k+1)-th router probability of one of the passes.

    Returns:
      first, downstream: shares of the counted tokens, [layer]; they add up to `disagreement`.
      first_margin: mean margin of the tokens that flip first, [layer]: small if flips are ties.
    """
    counted = _recorded(first, num_experts) & _recorded(second, num_experts) & fed_mask
    flipped = differ(first, second) & counted
    below = jnp.cumsum(flipped, axis=0) - flipped  # flips of the same token at lower layers
    downstream = flipped & (jnp.cumsum(below, axis=2) > 0)
    begins = flipped & ~downstream
    return {
        "first": mean_of(begins, counted, axis=(1, 2)),
        "downstream": mean_of(downstream, counted, axis=(1, 2)),
        "first_margin": mean_of(margin, begins, axis=(1, 2)),
    }


def load(routes: Routes, fed_mask: FedMask, num_experts: int) -> Float[Array, "layer expert"]:
    """How many tokens each expert was given; what was not recorded is not counted. Counts of micro-batches add up."""
    layers = routes.shape[0]
    kept = jnp.where(fed_mask[None, :, :, None], routes, num_experts).reshape(layers, -1)
    counts = jnp.zeros((layers, num_experts + 1), jnp.float32)
    return counts.at[jnp.arange(layers)[:, None], kept].add(1.0)[:, :num_experts]


def load_max(counts: Float[Array, "layer expert"]) -> Float[Array, "layer"]:
    """The largest expert's load over the mean load, per layer: 1 is uniform, the number of experts is one expert for
    all.

    NaN for a layer without any assignment.
    """
    return counts.max(-1) / counts.mean(-1)


def margin_statistics(margin: Float[Array, "layer batch fed"], fed_mask: FedMask) -> Mean:
    """Mean of the margin between the k-th and the (k+1)-th router probability, of shape [layer]; 0 flips at a touch."""
    return mean_of(margin, jnp.broadcast_to(fed_mask, margin.shape), axis=(1, 2))


def _recorded(routes: Routes, num_experts: int) -> Bool[Array, "layer batch fed"]:
    return (routes < num_experts).all(-1)
