"""Experts on tokens that are sorted by expert: tile by tile, or each expert's share padded to the largest."""

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from rlstab_jax.models.precision import Precision, saturate
from rlstab_jax.models.products import gradient_of, without_master
from rlstab_jax.models.spread import evenly
from rlstab_jax.models.swiglu import (
    Experts,
    ExpertWeights,
    Gates,
    Sums,
    Tokens,
    swiglu_and_parts,
    swiglu_gradient,
    weighted,
)

Rows = Float[Array, "rows d"]
LARGEST_TILE = 128


def tiles(x: Tokens, experts: Experts, gates: Gates, weights: ExpertWeights, precision: Precision) -> Sums:
    """Sorts tokens by expert into tiles that hold tokens of one expert each, and goes from tile to tile.

    Tiles that are not needed cost nothing, and no weight moves but those of the tile's expert.
    """
    return _sorted(x, experts, gates, weights, precision, ())


def grouped(x: Tokens, experts: Experts, gates: Gates, weights: ExpertWeights, precision: Precision) -> Sums:
    """One batched product over all experts, each with its tokens padded to the largest share.

    That size is chosen at run time from a few static ones. It moves no weights, which makes it faster than `tiles`; it
    is `tiles` where some expert has more than the largest of these sizes, or most have none. Memory is that of the
    largest size, chosen or not: ``kernels.expert_chunk`` bounds it.
    """
    num_tokens, k = experts.shape
    # With fewer, most experts have nothing to do, and their weights need not be read.
    enough = num_tokens * k >= weights.in_layer
    sizes = group_sizes(num_tokens, k, weights.in_layer) if enough else ()
    return _sorted(x, experts, gates, weights, precision, sizes)


def _sorted(
    x: Tokens, experts: Experts, gates: Gates, weights: ExpertWeights, precision: Precision, sizes: tuple[int, ...]
) -> Sums:
    tile = tile_size(experts.size, weights.in_layer)
    plan = tiling(experts, weights.num_experts, tile)
    if weights.gate.scale is None:  # once, and not in each tile
        weights = jax.tree.map(lambda values: saturate(values, precision.dtype), weights)
    rows = dispatch(x, plan.source, plan.slot)
    y = _through(rows, weights, plan, tile, sizes, precision)
    return combine(y, gates, plan.source, plan.slot)


def tile_size(assignments: int, num_experts: int) -> int:
    """About half of an expert's mean share, a power of two in [8, `LARGEST_TILE`]: little waste, large products."""
    return int(np.clip(2 ** math.floor(math.log2(max(assignments / num_experts / 2, 1))), 8, LARGEST_TILE))


def group_sizes(tokens: int, k: int, num_experts: int) -> tuple[int, ...]:
    """Sizes that `grouped` is compiled for: multiples of 8 from just above an expert's mean share to its double; of
    small shares to what the largest of many experts has by chance, and to four times one of which tiles would be many.
    """
    mean = tokens * k / num_experts
    shares = [mean * factor for factor in (1.125, 1.25, 1.375, 1.5, 2)]
    if mean >= LARGEST_TILE:
        shares = [mean * factor for factor in (1.125, 1.25, 1.5, 2, 3, 4)]
    elif (by_chance := mean + 4 * math.sqrt(mean) + 4) > 2 * mean:
        shares.append(by_chance)
    return tuple(sorted({min(tokens, -(-math.ceil(share) // 8) * 8) for share in shares}))


@struct.dataclass
class Tiling:
    """Assignments sorted by expert into rows, and the tiles that cover them.

    Each expert's tiles begin with its first row. What its last tile has too many are rows of the experts behind it, and
    behind all rows lies room for one tile.
    """

    slot: Int[Array, "tokens k"]  # the row of each assignment; past the last one if it is not dispatched
    source: Int[Array, "rows"]  # the token of each row; past the last one if there is none
    first: Int[Array, "experts"]  # the first row of each expert
    last: Int[Array, "experts"]  # the row behind its last one
    owner: Int[Array, "tiles"]  # the expert of each tile
    start: Int[Array, "tiles"]  # its first row
    used: Int[Array, ""]  # tiles that are needed


def tiling(experts: Experts, num_experts: int, tile: int) -> Tiling:
    """Sorts assignments stably, without a sort: by counting."""
    num_tokens, k = experts.shape
    flat = experts.reshape(-1)
    one_hot = flat[:, None] == jnp.arange(num_experts)
    counted = jnp.cumsum(one_hot, axis=0, dtype=jnp.int32)
    last = jnp.cumsum(counted[-1])
    first = last - counted[-1]
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
    return Tiling(slot.reshape(num_tokens, k), source, first, last, owner, start, last_tile[-1])


def even_tiles(plan: Tiling, weights: ExpertWeights, tile: int) -> tuple[float, float]:
    """How many tiles are needed on average, or a little less, where each token chooses each expert as likely as any
    other; and the part of their rows that hold tokens.

    They hold all rows, and each expert has one whom some token has chosen.
    """
    tokens, k = plan.slot.shape
    full = tokens * k / weights.in_layer / tile
    needed = max(full, 1 - (1 - k / weights.in_layer) ** tokens)
    return weights.num_experts * needed, full / needed


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _through(
    rows: Rows, weights: ExpertWeights, plan: Tiling, tile: int, sizes: tuple[int, ...], precision: Precision
) -> Rows:
    """Each row through its expert; anything in rows behind those of the last one.

    Its gradient reads what went into silu instead of computing it again, and sums a weight's gradient in float32.
    """
    in_groups = partial(_forward_in_groups, rows, weights, plan, precision)
    in_tiles = partial(_forward_in_tiles, rows, weights, plan, precision, tile)
    return _as_fits(plan, sizes, lambda size: in_groups(size)[-1], lambda: in_tiles()[-1])


def _through_forward(rows, weights, plan, tile, sizes, precision):
    in_groups = partial(_forward_in_groups, rows, weights, plan, precision)
    in_tiles = partial(_forward_in_tiles, rows, weights, plan, precision, tile)
    gate, up, y = _as_fits(plan, sizes, in_groups, in_tiles)
    return y, (rows, weights.each(without_master), plan, gate, up)


def _through_backward(tile, sizes, precision, saved, gradient):
    weights, plan = saved[1:3]
    in_groups = partial(_backward_in_groups, *saved, gradient, precision)
    in_tiles = partial(_backward_in_tiles, *saved, gradient, precision, tile)
    d_rows, d_weights = _as_fits(plan, sizes, in_groups, in_tiles)
    return d_rows, weights.each(gradient_of, d_weights), None


_through.defvjp(_through_forward, _through_backward)


def _as_fits(plan, sizes, in_groups, in_tiles):
    """In groups of the smallest size that holds the largest share, in tiles if none does."""
    if not sizes:
        return in_tiles()
    every = sizes[-1] == plan.slot.shape[0]  # an expert has at most all tokens
    branches = [partial(in_groups, size) for size in sizes] + ([] if every else [in_tiles])
    fits = ((plan.last - plan.first).max() > jnp.array(sizes)).sum()
    with evenly():
        return jax.lax.switch(fits, branches)


def _forward_in_groups(rows, weights, plan, precision, size):
    with _of_groups(plan, weights, size):
        parts = swiglu_and_parts(_to_groups(rows, plan, size), weights, precision)
    return tuple(_from_groups(part, plan) for part in parts)


def _backward_in_groups(rows, weights, plan, gate, up, gradient, precision, size):
    x, gate, up, d_y = (_to_groups(a, plan, size) for a in (rows, gate, up, gradient))
    with _of_groups(plan, weights, size):
        d_x, d_weights = swiglu_gradient(x, gate, up, weights, precision, d_y)
    return _from_groups(d_x, plan), tuple(d.astype(jnp.float32) for d in d_weights)


def _of_groups(plan: Tiling, weights: ExpertWeights, size: int):
    return evenly(held=plan.slot.size / weights.in_layer / size)


def _to_groups(rows: Rows, plan: Tiling, size: int) -> Float[Array, "E size d"]:
    """Each expert's rows, and zeros behind them."""
    row = plan.first[:, None] + jnp.arange(size)
    return jnp.where((row < plan.last[:, None])[..., None], rows.at[row].get(mode="clip"), 0)


def _from_groups(groups: Float[Array, "E size d"], plan: Tiling) -> Rows:
    row = jnp.arange(plan.source.shape[0])
    expert = jnp.minimum(jnp.searchsorted(plan.last, row, side="right", method="compare_all"), len(groups) - 1)
    return groups.at[expert, row - plan.first[expert]].get(mode="clip")


def _forward_in_tiles(rows, weights, plan, precision, tile):
    def one(i, done):
        expert, start = _of_expert(weights, plan.owner[i]), plan.start[i]
        x = jax.lax.dynamic_slice_in_dim(rows, start, tile)
        # Rows of later experts are written over by their own tiles, which come later.
        return _write(done, swiglu_and_parts(x, expert, precision), start)

    hidden, width = weights.gate.values.shape[-1], rows.shape[-1]
    zeros = tuple(jnp.zeros((rows.shape[0], columns), precision.dtype) for columns in (hidden, hidden, width))
    with evenly(*even_tiles(plan, weights, tile)):
        return jax.lax.fori_loop(0, plan.used, one, zeros)


def _backward_in_tiles(rows, weights, plan, gate, up, gradient, precision, tile):
    def one(i, done):
        d_rows, d_weights = done
        start, owner = plan.start[i], plan.owner[i]
        own = (start + jnp.arange(tile) < plan.last[owner])[:, None]
        x, gate_, up_, d_y = (
            jnp.where(own, jax.lax.dynamic_slice_in_dim(a, start, tile), 0) for a in (rows, gate, up, gradient)
        )
        d_x, d_expert = swiglu_gradient(x, gate_, up_, _of_expert(weights, owner), precision, d_y)
        d_weights = jax.tree.map(lambda total, d: total.at[owner].add(_wide(d)), d_weights, d_expert)
        return _write((d_rows,), (d_x,), start)[0], d_weights

    matrices = tuple(of.values for of in (weights.gate, weights.up, weights.down))
    zeros = jnp.zeros_like(rows), tuple(jnp.zeros_like(_wide(values), jnp.float32) for values in matrices)
    with evenly(*even_tiles(plan, weights, tile)):
        d_rows, d_weights = jax.lax.fori_loop(0, plan.used, one, zeros)
    return d_rows, tuple(d if d.shape == of.shape else d.mT for d, of in zip(d_weights, matrices, strict=True))


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
def dispatch(x: Tokens, source: Int[Array, "slots"], slot: Experts) -> Float[Array, "slots d"]:
    """Row ``source[s]`` of ``x`` for each slot, 0 in empty slots. Its gradient is a gather by ``slot``, no scatter."""
    # One row of zeros for all empty slots: filling them would be another pass over all slots on TPUs.
    return jnp.pad(x, ((0, 1), (0, 0))).at[source].get(mode="clip")


def _dispatch_forward(x, source, slot):
    return dispatch(x, source, slot), slot


def _dispatch_backward(slot, gradient):
    return gradient.at[slot].get(mode="fill", fill_value=0).sum(1), None, None


dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def combine(y: Float[Array, "slots d"], gates: Gates, source: Int[Array, "slots"], slot: Experts) -> Sums:
    """sum_k gates[t, k] * y[slot[t, k]] in float32; not dispatched assignments give 0. Gradients are gathers."""
    picked = y.at[slot].get(mode="fill", fill_value=0).astype(jnp.float32)
    return weighted(gates, picked)


def _combine_forward(y, gates, source, slot):
    return combine(y, gates, source, slot), (y, gates, source, slot)


def _combine_backward(saved, gradient):
    y, gates, source, slot = saved
    picked = y.at[slot].get(mode="fill", fill_value=0).astype(jnp.float32)
    slot_gate = jnp.zeros(source.shape[0], gates.dtype).at[slot].set(gates, mode="drop")
    # What the caller rounded has a gradient that its dtype holds: half as much to gather.
    d_y = gradient.astype(y.dtype).at[source].get(mode="fill", fill_value=0) * slot_gate[:, None]
    d_gates = jnp.einsum("td,tkd->tk", gradient, picked, precision=jax.lax.Precision.HIGHEST)
    return d_y.astype(y.dtype), d_gates, None, None


combine.defvjp(_combine_forward, _combine_backward)
