"""Controls of routing replay: routes that are replayed in the place of those that were recorded."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from rlstab_jax.types import Routes


@jax.jit
def permuted(routes: Routes, fed_mask: Bool[Array, "batch fed"], key: Array) -> Routes:
    """Gives each token the experts of another one of its row: by a random cycle through the fed tokens of the row, one
    for each layer.

    So the load of each expert stays what it was, in each row and layer. A cycle has no fixed point: where two tokens or
    more were fed, none keeps its own experts. What is not fed stays as it is.
    """
    place = jnp.arange(fed_mask.shape[1])
    noise = jax.random.uniform(key, routes.shape[:-1])
    order = jnp.argsort(jnp.where(fed_mask, noise, 2.0), axis=-1)  # the fed tokens first, in random order
    count = fed_mask.sum(1, keepdims=True)
    following = jnp.where(place < count, (place + 1) % jnp.maximum(count, 1), place)
    source = jnp.take_along_axis(order, jnp.broadcast_to(following, order.shape), axis=-1)  # of the token at order[i]
    source = jnp.take_along_axis(source, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.take_along_axis(routes, source[..., None], axis=2)
