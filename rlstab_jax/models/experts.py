"""Expert feed-forward layers (SwiGLU), dropless, in ways that compute the same mathematics.

`dense` is the reference: every expert sees every token. `tiles` sorts tokens by expert and goes over them tile by tile,
so that shapes are static and no token is dropped. `grouped` pads each expert's share to the largest.
`ragged` multiplies with `jax.lax.ragged_dot`, a real kernel on TPU, or with one of `grouped_dots` in its place:
`megablox` and `narrow` on TPU, `tokamax` on GPU. An expert number equal to ``num_experts`` means "not dispatched":
padding never loads an expert. All return sums in float32, which the caller rounds, once, whether they came from one
device or from several.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from rlstab_jax.models.grouped_dots import megablox, narrow, tokamax
from rlstab_jax.models.precision import Precision, Stored, saturate, saturating
from rlstab_jax.models.products import (
    gradient_of,
    gradients,
    matmul,
    scaled_product,
    straight_through,
    without_master,
)
from rlstab_jax.models.spread import evenly


@struct.dataclass
class ExpertWeights:
    """Stacked weights of experts: ``gate`` and ``up`` [E, d, f], ``down`` [E, f, d].

    Where ``devices`` share a layer's experts, these are the E of one of them, and the others' are "not dispatched".
    """

    gate: Stored
    up: Stored
    down: Stored
    devices: int = struct.field(pytree_node=False, default=1)

    @property
    def num_experts(self) -> int:
        return self.gate.values.shape[0]

    @property
    def in_layer(self) -> int:
        """The experts that the tokens are spread over."""
        return self.num_experts * self.devices

    def each(self, f: Callable[..., Stored], *others: Sequence[Any]) -> "ExpertWeights":
        """``f`` of each matrix and of what belongs to it in ``others``, in the order gate, up, down."""
        gate, up, down = (f(*of) for of in zip((self.gate, self.up, self.down), *others, strict=True))
        return replace(self, gate=gate, up=up, down=down)


Tokens = Float[Array, "tokens d"]
Experts = Int[Array, "tokens k"]
Gates = Float[Array, "tokens k"]
Sums = Float[Array, "tokens d"]


def swiglu(x: Array, weights: ExpertWeights, precision: Precision, product: Callable = matmul) -> Array:
    """down(silu(gate x) * up x), with ``product`` as the matrix product."""
    gate, up = (product(x, weight, precision, precision.dtype) for weight in (weights.gate, weights.up))
    return product(gated(gate, up), weights.down, precision, precision.dtype)


def gated(gate: Array, up: Array) -> Array:
    """silu(gate) * up"""
    return saturating(jnp.multiply, jax.nn.silu(gate), up)


def dense(x: Tokens, experts: Experts, gates: Gates, weights: ExpertWeights, precision: Precision) -> Sums:
    """The reference: all experts on all tokens, of which each token keeps those that it chose."""
    chosen = jax.nn.one_hot(experts, weights.num_experts, dtype=jnp.float32)  # the sentinel becomes a row of zeros
    combine = jnp.einsum("tk,tke->et", gates, chosen, precision=jax.lax.Precision.HIGHEST)
    y = swiglu(jnp.broadcast_to(x, (weights.num_experts, *x.shape)), weights, precision)
    y = jnp.where((chosen.sum(1) > 0).T[..., None], y, 0.0)  # what was not chosen is never read, were it infinite
    return jnp.einsum("et,etd->td", combine, y.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def tile_size(assignments: int, num_experts: int) -> int:
    """About half of an expert's mean share, a power of two in [8, 128]: little waste, large products."""
    return int(np.clip(2 ** math.floor(math.log2(max(assignments / num_experts / 2, 1))), 8, 128))


@struct.dataclass
class Tiling:
    """Assignments sorted by expert into rows, and the tiles that cover them.

    Each expert's tiles begin with its first row. What its last tile has too many are rows of the experts behind it, and
    behind all rows lies room for one tile.
    """

    slot: Int[Array, "tokens k"]  # the row of each assignment; past the last one if it is not dispatched
    source: Int[Array, "rows"]  # the token of each row; past the last one if there is none
    owner: Int[Array, "tiles"]  # the expert of each tile
    start: Int[Array, "tiles"]  # its first row
    end: Int[Array, "tiles"]  # behind the last row of its expert
    used: Int[Array, ""]  # tiles that are needed


def tiling(experts: Experts, num_experts: int, tile: int) -> Tiling:
    """Sorts assignments stably, without a sort: by counting."""
    num_tokens, k = experts.shape
    flat = experts.reshape(-1)
    one_hot = flat[:, None] == jnp.arange(num_experts)
    counted = jnp.cumsum(one_hot, axis=0, dtype=jnp.int32)
    end = jnp.cumsum(counted[-1])
    first = end - counted[-1]
    rows = num_tokens * k + tile
    slot = jnp.where(flat == num_experts, rows, jnp.where(one_hot, first + counted - 1, 0).sum(1))
    source = jnp.full(rows, num_tokens, jnp.int32)
    source = source.at[slot].set(jnp.arange(num_tokens * k, dtype=jnp.int32) // k, mode="drop")
    tiles_of = -(-counted[-1] // tile)
    last_tile = jnp.cumsum(tiles_of)
    number = jnp.arange(-(-num_tokens * k // tile) + min(num_experts, num_tokens * k))
    owner = jnp.searchsorted(last_tile, number, side="right", method="compare_all")
    owner = jnp.minimum(owner, num_experts - 1)
    start = first[owner] + (number - (last_tile - tiles_of)[owner]) * tile
    return Tiling(slot.reshape(num_tokens, k), source, owner, start, end[owner], last_tile[-1])


def even_tiles(plan: Tiling, weights: ExpertWeights, tile: int) -> tuple[float, float]:
    """How many tiles are needed on average, or a little less, where each token chooses each expert as likely as any
    other; and the part of their rows that hold tokens.

    They hold all rows, and each expert has one whom some token has chosen.
    """
    tokens, k = plan.slot.shape
    full = tokens * k / weights.in_layer / tile
    needed = max(full, 1 - (1 - k / weights.in_layer) ** tokens)
    return weights.num_experts * needed, full / needed


def tiles(x: Tokens, experts: Experts, gates: Gates, weights: ExpertWeights, precision: Precision) -> Sums:
    """Sorts tokens by expert into tiles that hold tokens of one expert each, and goes from tile to tile.

    Tiles that are not needed cost nothing, and no weight moves but those of the tile's expert.
    """
    tile = tile_size(experts.size, weights.in_layer)
    plan = tiling(experts, weights.num_experts, tile)
    if weights.gate.scale is None:  # once, and not in each tile
        weights = jax.tree.map(lambda values: saturate(values, precision.dtype), weights)
    rows = _dispatch(x, plan.source, plan.slot)
    y = _through_tiles(rows, weights, plan, tile, precision)
    return _combine(y, gates, plan.source, plan.slot)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _through_tiles(
    rows: Float[Array, "rows d"], weights: ExpertWeights, plan: Tiling, tile: int, precision: Precision
) -> Float[Array, "rows d"]:
    """Each row through its expert; anything in rows behind those of the last one.

    Its gradient reads what went into silu instead of computing it again, and sums a weight's gradient in float32.
    """
    return _through_tiles_forward(rows, weights, plan, tile, precision)[0]


def _through_tiles_forward(rows, weights, plan, tile, precision):
    def one(i, done):
        expert, start = _of_expert(weights, plan.owner[i]), plan.start[i]
        x = jax.lax.dynamic_slice_in_dim(rows, start, tile)
        gate, up = (matmul(x, weight, precision, precision.dtype) for weight in (expert.gate, expert.up))
        y = matmul(gated(gate, up), expert.down, precision, precision.dtype)
        # Rows of later experts are written over by their own tiles, which come later.
        return _write(done, (gate, up, y), start)

    hidden, width = weights.gate.values.shape[-1], rows.shape[-1]
    zeros = tuple(jnp.zeros((rows.shape[0], columns), precision.dtype) for columns in (hidden, hidden, width))
    with evenly(*even_tiles(plan, weights, tile)):
        gate, up, y = jax.lax.fori_loop(0, plan.used, one, zeros)
    return y, (rows, weights.each(without_master), plan, gate, up)


def _through_tiles_backward(tile, precision, saved, gradient):
    rows, weights, plan, gate, up = saved

    def through(x, weight, d_y):
        return gradients(matmul, x, weight, precision, precision.dtype, d_y)

    def one(i, done):
        d_rows, d_weights = done
        start = plan.start[i]
        own = (start + jnp.arange(tile) < plan.end[i])[:, None]
        x, gate_, up_, d_y = (
            jnp.where(own, jax.lax.dynamic_slice_in_dim(a, start, tile), 0) for a in (rows, gate, up, gradient)
        )
        expert = _of_expert(weights, plan.owner[i])
        hidden, through_gate = jax.vjp(gated, gate_, up_)
        d_hidden, d_down = through(hidden, expert.down, d_y)
        d_gate, d_up = through_gate(d_hidden)
        d_x, d_gate = through(x, expert.gate, d_gate)
        d_x_too, d_up = through(x, expert.up, d_up)
        d_expert = d_gate, d_up, d_down
        d_weights = jax.tree.map(lambda total, d: total.at[plan.owner[i]].add(_wide(d)), d_weights, d_expert)
        return _write((d_rows,), (d_x + d_x_too,), start)[0], d_weights

    matrices = (weights.gate, weights.up, weights.down)
    zeros = jnp.zeros_like(rows), tuple(jnp.zeros_like(_wide(of.values), jnp.float32) for of in matrices)
    with evenly(*even_tiles(plan, weights, tile)):
        d_rows, d_weights = jax.lax.fori_loop(0, plan.used, one, zeros)

    def cotangent(of: Stored, d: Array) -> Stored:
        return gradient_of(of, d if d.shape == of.values.shape else d.mT)

    return d_rows, weights.each(cotangent, d_weights), None


_through_tiles.defvjp(_through_tiles_forward, _through_tiles_backward)


def _wide(a: Float[Array, "*batch rows columns"]) -> Array:
    """With more columns than rows: on CPU a product over many rows is faster if its result is wide."""
    return a.mT if a.shape[-2] > a.shape[-1] else a


def _of_expert(weights: ExpertWeights, expert: Int[Array, ""]) -> ExpertWeights:
    """Its matrices, without their masters."""
    bare = weights.each(lambda of: replace(of, master=None))
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, expert, keepdims=False), bare)


def _write(arrays: tuple[Array, ...], parts: tuple[Array, ...], start: Int[Array, ""]) -> tuple[Array, ...]:
    write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
    return tuple(write(array, part) for array, part in zip(arrays, parts, strict=True))


@jax.custom_vjp
def _dispatch(x: Tokens, source: Int[Array, "slots"], slot: Experts) -> Float[Array, "slots d"]:
    """Row ``source[s]`` of ``x`` for each slot, 0 in empty slots. Its gradient is a gather by ``slot``, no scatter."""
    return x.at[source].get(mode="fill", fill_value=0)


def _dispatch_forward(x, source, slot):
    return _dispatch(x, source, slot), slot


def _dispatch_backward(slot, gradient):
    return gradient.at[slot].get(mode="fill", fill_value=0).sum(1), None, None


_dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def _combine(y: Float[Array, "slots d"], gates: Gates, source: Int[Array, "slots"], slot: Experts) -> Sums:
    """sum_k gates[t, k] * y[slot[t, k]] in float32; not dispatched assignments give 0. Gradients are gathers."""
    picked = y.at[slot].get(mode="fill", fill_value=0).astype(jnp.float32)
    return _weighted(gates, picked)


def _weighted(gates: Gates, y: Float[Array, "tokens k d"]) -> Sums:
    # float32 whatever the engine's dtype: accelerators would otherwise round gates and outputs to bfloat16.
    return jnp.einsum("tk,tkd->td", gates, y, precision=jax.lax.Precision.HIGHEST)


def _combine_forward(y, gates, source, slot):
    return _combine(y, gates, source, slot), (y, gates, source, slot)


def _combine_backward(saved, gradient):
    y, gates, source, slot = saved
    picked = y.at[slot].get(mode="fill", fill_value=0).astype(jnp.float32)
    slot_gate = jnp.zeros(source.shape[0], gates.dtype).at[slot].set(gates, mode="drop")
    d_y = gradient.at[source].get(mode="fill", fill_value=0) * slot_gate[:, None]
    d_gates = jnp.einsum("td,tkd->tk", gradient, picked, precision=jax.lax.Precision.HIGHEST)
    return d_y.astype(y.dtype), d_gates, None, None


_combine.defvjp(_combine_forward, _combine_backward)


def group_sizes(tokens: int, k: int, num_experts: int) -> list[int]:
    """Sizes that `grouped` is compiled for: multiples of 8 from just above an expert's mean share to its double."""
    mean = tokens * k / num_experts
    return sorted({min(tokens, -(-math.ceil(mean * factor) // 8) * 8) for factor in (1.125, 1.25, 1.375, 1.5, 2)})


def grouped(x: Tokens, experts: Experts, gates: Gates, weights: ExpertWeights, precision: Precision) -> Sums:
    """One batched product over all experts, each with its tokens padded to the largest share.

    That size is chosen at run time from a few static ones. It moves no weights, which makes it faster than `tiles`; it
    is `tiles` where some expert has more than twice its mean share, or most have none. For inference: a gradient would
    keep the values of every size.
    """
    num_tokens, k = experts.shape
    num_experts = weights.num_experts
    if num_tokens * k < weights.in_layer:  # most experts have nothing to do, and their weights need not be read
        return tiles(x, experts, gates, weights, precision)
    flat = experts.reshape(-1)
    one_hot = flat[:, None] == jnp.arange(num_experts)
    rank = jnp.where(one_hot, jnp.cumsum(one_hot, axis=0, dtype=jnp.int32), 0).sum(1) - 1
    largest = one_hot.sum(0, dtype=jnp.int32).max()
    sizes = group_sizes(num_tokens, k, weights.in_layer)

    def with_size(size: int) -> Sums:
        slots = num_experts * size
        slot = jnp.where(flat == num_experts, slots, flat * size + rank)
        source = jnp.full(slots, num_tokens, jnp.int32)
        source = source.at[slot].set(jnp.arange(num_tokens * k, dtype=jnp.int32) // k, mode="drop")
        padded = _dispatch(x, source, slot.reshape(num_tokens, k)).reshape(num_experts, size, -1)
        with evenly(held=num_tokens * k / weights.in_layer / size):
            y = swiglu(padded, weights, precision)
        return _combine(y.reshape(slots, -1), gates, source, slot.reshape(num_tokens, k))

    fits = (largest > jnp.array(sizes)).sum()
    uneven = [] if sizes[-1] == num_tokens else [partial(tiles, x, experts, gates, weights, precision)]
    with evenly():
        return jax.lax.switch(fits, [partial(with_size, size) for size in sizes] + uneven)


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
    # Rows past sum(sizes) are uninitialised on TPU, in results and in gradients: select, never multiply.
    used = (jnp.arange(num_tokens * k) < sizes.sum())[:, None]
    product = straight_through(partial(_ragged_product, grouped_dot))

    def of_rows(x: Array, weight: Stored, precision: Precision, out: str) -> Array:
        return product(x, weight, precision, out, sizes, used, sorted_experts)

    y = swiglu(x[order // k], weights, precision, of_rows).astype(jnp.float32)
    y = jnp.zeros_like(y).at[order].set(y).reshape(num_tokens, k, -1)
    return _weighted(gates, y)


def _ragged_product(
    grouped_dot: Callable[..., Array],
    x: Array,
    weight: Stored,
    precision: Precision,
    out: str,
    sizes: Array,
    used: Array,
    experts: Array,
) -> Array:
    def dot(x: Array, weight: Array, **how: Any) -> Array:
        return jnp.where(used, grouped_dot(jnp.where(used, x, 0), weight, sizes, **how), 0)

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
}
