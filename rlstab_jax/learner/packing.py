"""Several sequences in one row: an update need not compute the padding behind short responses.

Private to the learner. A host plans where each sequence goes, first fit by decreasing length; tokens and recorded
routes move there, the model runs on the packed rows, and what it returns moves back to the layout of a rollout before
LM head and objective, which therefore do not know of it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int

from rlstab_jax.models.transformer import Output, Transformer, forward
from rlstab_jax.types import Rollout, Routes, UserError


@struct.dataclass
class Packing:
    """Where the fed tokens of a rollout's rows lie in packed rows of the same length, and back.

    The rows are in ``shards`` equal parts, one for each device that rows are split over, each packed by itself. Both
    numbers are flat positions within a part, or that part's size in its other layout: nothing is there.
    """

    source: Int[Array, "packed fed"]
    place: Int[Array, "batch fed"]
    shards: int = struct.field(pytree_node=False, default=1)
    micro_batches: int = struct.field(pytree_node=False, default=1)

    @property
    def segments(self) -> Int[Array, "packed fed"]:
        """The number of the row, from 1, that each packed token of a micro-batch is of; 0 where there is none."""
        rows, length = self.place.shape
        size = rows // self.shards * length
        return jnp.where(self.source < size, self.source // length + 1, 0)


def heights(rows: int) -> list[int]:
    """The numbers of packed rows that programs are compiled for: eighths of the rows, rounded up."""
    return sorted({-(-rows * eighths // 8) for eighths in range(1, 9)})


def plan(fed: Bool[np.ndarray, "batch fed"], micro_batches: int = 1, shards: int = 1) -> Packing:
    """Packs the fed tokens of each row, of which there are a contiguous run or none.

    Args:
      fed: `Rollout.fed_mask`.
      micro_batches: `split_rows` deals the rows out to so many.
      shards: contiguous equal parts of the rows, one for each device; a shard's share of a micro-batch packs by itself,
        all shares into the least of `heights` that suffices for the fullest one. As many rows as it has always suffice.
    """
    rows, length = fed.shape
    parts = micro_batches * shards
    size = rows // parts
    share = np.arange(rows).reshape(shards, size, micro_batches).transpose(2, 0, 1).reshape(-1)  # share by share
    fed = fed[share]
    count, first = fed.sum(1), fed.argmax(1)
    packed = [first_fit(of_part, length) for of_part in count.reshape(parts, size)]
    row, start = (np.concatenate(each) for each in zip(*packed, strict=True))
    height = next(h for h in heights(size) if h > row.max())
    # Positions in the packed layout of each fed token, and the tokens by those positions.
    column = np.arange(length)
    in_packed = np.where(fed, (row * length + start - first)[:, None] + column, height * length)
    source = np.full((parts, height * length), size * length, np.int32)
    number = np.arange(rows)[:, None]
    part, token = np.broadcast_arrays(number // size, number % size * length + column)[:2]
    source[part[fed], in_packed[fed]] = token[fed]
    # Back to the order of rows, which for the packed ones is dealt out as well.
    place = np.empty((rows, length), np.int32)
    place[share] = in_packed
    source = source.reshape(micro_batches, shards, height, length).transpose(1, 2, 0, 3).reshape(-1, length)
    arrays: Any = source, place
    return Packing(arrays[0], arrays[1], shards, micro_batches)


def check_parts(packing: Packing | None, micro_batches: int) -> None:
    """Raises UserError unless ``packing`` was planned for so many micro-batches: its positions are within one."""
    if packing is not None and packing.micro_batches != micro_batches:
        raise UserError(
            f"packing: planned for {packing.micro_batches} micro-batches, used with micro_batches = {micro_batches}; "
            "plan it for as many"
        )


def first_fit(lengths: Int[np.ndarray, "rows"], space: int) -> tuple[Int[np.ndarray, "rows"], Int[np.ndarray, "rows"]]:
    """Row and first column of each sequence: the longest first, each into the first row that has space for it.

    >>> first_fit(np.array([2, 5, 3]), 5)
    (array([1, 0, 1]), array([3, 0, 0]))
    """
    row, start = np.zeros_like(lengths), np.zeros_like(lengths)
    used = np.zeros_like(lengths)
    for sequence in np.argsort(-lengths, kind="stable"):
        at = np.argmax(used + lengths[sequence] <= space)
        row[sequence], start[sequence] = at, used[at]
        used[at] += lengths[sequence]
    return row, start


def packed_forward(
    model: Transformer, variables: dict, rollout: Rollout, routes: Routes | None, packing: Packing
) -> Output:
    """`forward` on packed rows, its results in the layout of the rollout: 0 at tokens that are not fed, no experts."""
    source, place, shards = packing.source, packing.place, packing.shards

    def there(x: Array) -> Array:
        return _moved(x, source, place, shards, 0)

    def back(x: Array, fill: int = 0) -> Array:
        return _moved(x, place, source, shards, fill)

    packed_routes = None if routes is None else jax.vmap(there)(routes)
    output = forward(model, variables, there(rollout.tokens[:, :-1]), packing.segments, packed_routes)
    routing = output.routing
    if routing is not None:
        nobody = model.config.num_experts
        routing = dataclasses.replace(
            routing,
            used=jax.vmap(lambda x: back(x, nobody))(routing.used),
            live=jax.vmap(lambda x: back(x, nobody))(routing.live),
            margin=jax.vmap(back)(routing.margin),
            log_probs=jax.vmap(back)(routing.log_probs),
            inputs=jax.vmap(back)(routing.inputs),
            scores=jax.vmap(back)(routing.scores),
        )
    return Output(back(output.hidden), routing)


def _moved(x: Array, index: Int[Array, "rows fed"], inverse: Int[Array, "others fed"], shards: int, fill: int) -> Array:
    """[others, fed, ...] to [rows, fed, ...]: what lies at ``index`` within each shard, ``fill`` where nothing does."""
    flat = x.reshape(shards, -1, *x.shape[2:])
    each = jax.vmap(lambda x, index, inverse: _gathered(x, index, inverse, fill))
    y = each(flat, index.reshape(shards, -1), inverse.reshape(shards, -1))
    return y.reshape(*index.shape, *x.shape[2:])


def _gathered(x: Array, index: Array, inverse: Array, fill: int) -> Array:
    """``x[index]`` along the first axis. Its gradient is a gather by ``inverse``, no scatter."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x.at[index].get(mode="fill", fill_value=fill)
    return _gathered_floats(x, index, inverse)


@jax.custom_vjp
def _gathered_floats(x: Array, index: Array, inverse: Array) -> Array:
    return x.at[index].get(mode="fill", fill_value=0)


def _gathered_forward(x: Array, index: Array, inverse: Array) -> tuple[Array, Array]:
    return _gathered_floats(x, index, inverse), inverse


def _gathered_backward(inverse: Array, gradient: Array) -> tuple[Any, None, None]:
    return gradient.at[inverse].get(mode="fill", fill_value=0), None, None


_gathered_floats.defvjp(_gathered_forward, _gathered_backward)
