"""Routing of the experts: disagreement between two passes, load and margin. Per layer, over tokens that were fed.

`Routes` are [layer, batch, fed, k]; ``fed_mask`` [batch, fed] is True on the tokens that count. The value
``num_experts`` means "not recorded".
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlstab_jax.stability.reduce import Mean, mean_of
from rlstab_jax.types import Routes

FedMask = Bool[Array, "batch fed"]


def disagreement(first: Routes, second: Routes, fed_mask: FedMask, num_experts: int) -> Mean:
    """The share of tokens whose top-k *sets* differ between two passes, whatever their order.

    A token-layer with a value that was not recorded, in either pass, is not counted.

    Returns:
      A mean of shape [layer].
    """
    counted = _recorded(first, num_experts) & _recorded(second, num_experts) & fed_mask
    return mean_of(_differ(first, second), counted, axis=(1, 2))


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


def _differ(first: Routes, second: Routes) -> Bool[Array, "layer batch fed"]:
    return (jnp.sort(first, -1) != jnp.sort(second, -1)).any(-1)
