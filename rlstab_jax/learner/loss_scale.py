"""Dynamic loss scaling, for a training engine in float16 (mixed-precision training, 1710.03740).

Gradients below 6e-8 would vanish in float16, so the loss is multiplied by a power of two, and its gradient, once in
float32, divided by it. Elsewhere an update whose gradient overflows is left out; here its gradient is taken anew with
half the scale, so that no rollout is lost and runs of other precisions make the same updates on the same data.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int

from rlstab_jax.models.precision import Precision

BEGIN, SMALLEST, LARGEST = 2.0**16, 2.0**-24, 2.0**24
# Updates without overflow after which the scale doubles. Elsewhere 2,000, since an overflow costs an update there.
PATIENCE = 20


@struct.dataclass
class LossScale:
    """What the loss is multiplied by, and for how many updates in a row nothing has overflowed."""

    scale: Float[Array, ""]
    updates: Int[Array, ""]


def init_loss_scale(precision: Precision) -> LossScale | None:
    """For a training engine of that precision; None where gradients have the range of float32."""
    return LossScale(jnp.float32(BEGIN), jnp.int32(0)) if precision.dtype == "float16" else None


def scaled_gradient(
    kept: LossScale | None, compute: Callable[[Float[Array, ""] | None], tuple[Array, Any, Any, Any]]
) -> tuple[Float[Array, ""], Any, Any, Any, LossScale | None]:
    """The loss, what comes with it, its gradient, and another one, at the largest scale at which its own is finite.

    Args:
      kept: the scale to begin with; None for no scaling.
      compute: gives the four from a loss that is multiplied by its argument, if any. The last is what else is scaled
        with the loss, such as the gradient of parameters that have no part in it; no scale is sought for it.

    Returns:
      The four, of the loss itself, and the scale to begin the next update with. A gradient that is not finite at any
      scale, which no range mends, is returned as it is, and the scale stays.
    """
    if kept is None:
        return *compute(None), None

    def attempt(state: tuple) -> tuple:
        scale, _ = state
        return scale / 2, compute(scale)

    def overflows(state: tuple) -> Array:
        scale, (_, _, gradient, _) = state
        return ~jnp.isfinite(optax.tree.norm(gradient)) & (scale >= SMALLEST)

    # The first attempt is one of the loop's, so that there is one program of the gradient.
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute, kept.scale))
    value, rest, gradient, other = zeros
    unknown = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), gradient)
    below, computed = jax.lax.while_loop(overflows, attempt, (kept.scale, (value, rest, unknown, other)))
    used, (value, rest, gradient, other) = below * 2, computed
    value, gradient, other = jax.tree.map(lambda leaf: leaf / used, (value, gradient, other))
    updates = jnp.where(used == kept.scale, kept.updates + 1, 0)
    grown = updates == PATIENCE
    following = LossScale(
        jnp.where(grown, jnp.minimum(2 * used, LARGEST), used),
        jnp.where(grown, 0, updates),
    )
    finite = jnp.isfinite(optax.tree.norm(gradient))
    return value, rest, gradient, other, jax.tree.map(lambda new, old: jnp.where(finite, new, old), following, kept)
