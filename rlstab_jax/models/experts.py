"""Expert feed-forward layers (SwiGLU), dropless, in ways that compute the same mathematics.

`dense` is the reference: every expert sees every token. `tiles` sorts tokens by expert and goes over them tile by tile,
so that shapes are static and no token is dropped. `grouped` pads each expert's share to the largest.
`ragged` multiplies with `jax.lax.ragged_dot`, a real kernel on TPU, or with one of `grouped_dots` in its place:
`megablox` and `narrow` on TPU, `tokamax` and `triton` on GPU. An expert number equal to ``num_experts`` means "not
dispatched": padding never loads an expert. All return sums in float32, which the caller rounds, once, whether they came
from one device or from several.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rlstab_jax.models.grouped_dots import megablox, narrow, tokamax, triton
from rlstab_jax.models.precision import Precision, Stored
from rlstab_jax.models.products import scaled_product, straight_through
from rlstab_jax.models.sorted_experts import combine, dispatch, grouped, tiles
from rlstab_jax.models.swiglu import Experts, ExpertWeights, Gates, Sums, Tokens, gated, swiglu


def dense(x: Tokens, experts: Experts, gates: Gates, weights: ExpertWeights, precision: Precision) -> Sums:
    """The reference: all experts on all tokens, of which each token keeps those that it chose."""
    chosen = jax.nn.one_hot(experts, weights.num_experts, dtype=jnp.float32)  # the sentinel becomes a row of zeros
    combine = jnp.einsum("tk,tke->et", gates, chosen, precision=jax.lax.Precision.HIGHEST)
    y = swiglu(jnp.broadcast_to(x, (weights.num_experts, *x.shape)), weights, precision)
    y = jnp.where((chosen.sum(1) > 0).T[..., None], y, 0.0)  # what was not chosen is never read, were it infinite
    return jnp.einsum("et,etd->td", combine, y.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def ragged(
    x: Tokens,
    experts: Experts,
    gates: Gates,
    weights: ExpertWeights,
    precision: Precision,
    grouped_dot: Callable[..., Array] = jax.lax.ragged_dot,
) -> Sums:
    """Sorts tokens by expert and multiplies with ``grouped_dot``, `jax.lax.ragged_dot` or one with its arguments."""
    num_tokens, k = experts.shape
    flat = experts.reshape(-1)
    order = jnp.argsort(flat)  # stable; what is not dispatched comes last
    sizes = (flat[:, None] == jnp.arange(weights.num_experts)).sum(0, dtype=jnp.int32)
    sorted_experts = jnp.minimum(flat[order], weights.num_experts - 1)
    used = jnp.arange(num_tokens * k) < sizes.sum()
    source = jnp.where(used, order // k, num_tokens)
    slot = jnp.zeros_like(order).at[order].set(jnp.arange(num_tokens * k))
    slot = jnp.where(flat < weights.num_experts, slot, num_tokens * k).reshape(num_tokens, k)
    product = straight_through(partial(_ragged_product, grouped_dot))

    def of_rows(x: Array, weight: Stored) -> Array:
        return product(x, weight, precision, precision.dtype, sizes, sorted_experts)

    # Rows past sum(sizes) are uninitialised on TPU, in results and in gradients: select, never multiply. `combine`, and
    # the gradient of `dispatch`, do not read them.
    rows = dispatch(x, source, slot)
    gate, up = (jnp.where(used[:, None], of_rows(rows, weight), 0) for weight in (weights.gate, weights.up))
    return combine(of_rows(gated(gate, up), weights.down), gates, source, slot)


def _ragged_product(
    grouped_dot: Callable[..., Array],
    x: Array,
    weight: Stored,
    precision: Precision,
    out: str,
    sizes: Array,
    experts: Array,
) -> Array:
    def dot(x: Array, weight: Array, **how: Any) -> Array:
        return grouped_dot(x, weight, sizes, **how)

    scale = None if weight.scale is None else jnp.moveaxis(weight.scale[experts], 1, 0)
    return scaled_product(x, weight.values, scale, precision, out, dot, weight.across)


Kernel = Callable[[Tokens, Experts, Gates, ExpertWeights, Precision], Sums]
KERNELS: dict[str, Kernel] = {
    "dense": dense,
    "tiles": tiles,
    "grouped": grouped,
    "ragged_dot": ragged,
    "megablox": partial(ragged, grouped_dot=megablox),
    "narrow": partial(ragged, grouped_dot=narrow),
    "tokamax": partial(ragged, grouped_dot=tokamax),
    "triton": partial(ragged, grouped_dot=triton),
}
