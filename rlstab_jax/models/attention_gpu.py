"""Fused attention for NVIDIA GPUs in Pallas (Triton): a decode step, on a cache as it is stored.

On a mesh it is called by `attention_parallel.over_devices`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlstab_jax.models.attention_parts import LOWEST, TINY, loaded, over_two_parts, padded
from rlstab_jax.models.pallas import check_addressable
from rlstab_jax.models.precision import Format, Stored, from_bytes
from rlstab_jax.models.spread import evenly
from rlstab_jax.types import UserError

KEYS = 64
"""Keys of a block: what is loaded and multiplied at once."""
QUERIES = 16
"""The fewest queries of a product; others are padded."""
PROGRAMS = 256
"""About two for each processor of an H100: with fewer rows and heads, the keys are split over several."""


def decode_triton(
    q: Float[Array, "rows head 1 c"],
    prompt: tuple[Stored, Stored],
    response: tuple[Stored, Stored],
    prompt_mask: Bool[Array, "prompts prompt_length"],
    response_mask: Bool[Array, "rows window"],
    format: Format = "none",
    interpret: bool = False,
) -> Float[Array, "rows head 1 c"]:
    """As `attention_tpu.decode_flash`, on NVIDIA GPUs: int8 and fp8 numbers are read as they are, and only the blocks
    between a row's first and last key in the mask. No gradient.

    Keys of a row are split over several programs, whose parts are joined by their logsumexps (flash decoding). It
    copies nothing if prompt_length and window are multiples of 64.

    Args:
      interpret: runs the kernel as JAX operations, on any platform; for tests.

    Raises:
      UserError: heads whose width is no power of two from 16 on; a cache that Pallas cannot address.
    """
    c = q.shape[-1]
    if c < QUERIES or c & (c - 1):
        raise UserError(
            f"kernels.decode_attention = 'triton' needs model.head_dim a power of two from {QUERIES} on, but got {c}: "
            "change it, or use 'reference'"
        )

    def readable(part: tuple[Stored, Stored]) -> tuple[Stored, Stored]:
        if format == "float4_e2m1fn":
            k, v = loaded(part, format, q.dtype)
            return Stored(k), Stored(v)
        return from_bytes(part[0], format), from_bytes(part[1], format)

    part = functools.partial(_part, interpret=interpret)
    return over_two_parts(part, q, readable(prompt), readable(response), prompt_mask, response_mask)


def _part(
    q: Float[Array, "batch kv_head query c"], k: Stored, v: Stored, mask: Bool[Array, "batch key"], interpret: bool
) -> tuple[Float[Array, "batch kv_head query c"], Float[Array, "batch kv_head query"]]:
    """Attention of all queries to the keys in ``mask``, and the logsumexp of their scores."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    remedy = "sample fewer rows at once (rollout.waves, rollout.slots), or use 'reference'"
    check_addressable(k.values, "kernels.decode_attention = 'triton': on one device a layer's keys", remedy)
    batch, kv_heads, queries, c = q.shape
    rows = QUERIES if queries <= QUERIES else 2 * QUERIES  # of a program
    q, mask = padded(q, 2, rows), padded(mask, 1, KEYS)
    k_values, v_values = padded(k.values, 3, KEYS), padded(v.values, 2, KEYS)
    scales = []
    if k.scale is not None and v.scale is not None:
        scales = [padded(scale, 3, KEYS) for scale in (k.scale, v.scale.swapaxes(2, 3))]
    many, keys = q.shape[2], mask.shape[1]
    tiles, blocks = many // rows, keys // KEYS
    splits = min(-(-PROGRAMS // (batch * kv_heads * tiles)), blocks)
    filled = mask.reshape(batch, blocks, KEYS).any(-1)
    first = jnp.argmax(filled, axis=1).astype(jnp.int32)
    behind = jnp.where(filled.any(1), blocks - jnp.argmax(filled[:, ::-1], axis=1), 0).astype(jnp.int32)

    def of_row(*shape: int) -> Any:
        return pl.BlockSpec((None, *shape), lambda row, head, tile, split: (row, *(0 for _ in shape)))

    def of_head(*shape: int) -> Any:
        return pl.BlockSpec((None, None, *shape), lambda row, head, tile, split: (row, head, *(0 for _ in shape)))

    def of_tile(*shape: int) -> Any:
        zeros = (0,) * (len(shape) - 1)
        return pl.BlockSpec((None, None, *shape), lambda row, head, tile, split: (row, head, tile, *zeros))

    def of_split(*shape: int) -> Any:
        zeros = (0,) * (len(shape) - 1)
        return pl.BlockSpec((None, None, None, *shape), lambda row, head, tile, split: (split, row, head, tile, *zeros))

    y, total = pl.pallas_call(
        functools.partial(_kernel, splits=splits, rounds=-(-blocks // splits)),
        out_shape=[
            jax.ShapeDtypeStruct((splits, batch, kv_heads, many, c), jnp.float32),
            jax.ShapeDtypeStruct((splits, batch, kv_heads, many), jnp.float32),
        ],
        grid=(batch, kv_heads, tiles, splits),
        in_specs=[
            of_row(2),
            of_tile(rows, c),
            of_row(keys),
            of_head(c, keys),
            of_head(keys, c),
            *[of_head(1, keys) for _ in scales],
        ],
        out_specs=[of_split(rows, c), of_split(rows)],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="triton_decode",
    )(jnp.stack([first, behind], axis=1), q, mask.astype(jnp.int8), k_values, v_values, *scales)
    whole = jax.nn.logsumexp(total, axis=0)
    y = (jnp.exp(total - whole)[..., None] * y).sum(0)
    return y[:, :, :queries], whole[:, :, :queries]


def _kernel(ends: Any, q: Any, mask: Any, k: Any, v: Any, *rest: Any, splits: int, rounds: int) -> None:
    """The share of one split of a row's blocks of keys, of one head, with a running softmax. ``rest`` are scales of
    keys and values, if they have any, and the results."""
    from jax.experimental import pallas as pl

    *scales, y, total = rest
    queries, c = q.shape
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    dot = functools.partial(jnp.dot, precision=precision, preferred_element_type=jnp.float32)
    share = jax.lax.div(ends[1] - ends[0] + splits - 1, splits)
    begin = ends[0] + pl.program_id(3) * share
    end = jnp.minimum(begin + share, ends[1])
    query = q[...]

    def attend(number: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        highest, normaliser, sums = carry
        at = pl.ds(number * KEYS, KEYS)
        attended = (mask[at] != 0)[None]
        scores = dot(query, k[:, at].astype(q.dtype)) * c**-0.5
        scores = jnp.where(attended, scores * scales[0][0, at][None] if scales else scores, LOWEST)
        new = jnp.maximum(highest, scores.max(-1))
        weights = jnp.where(attended, jnp.exp(scores - new[:, None]), 0.0)
        kept = jnp.exp(highest - new)
        normaliser = normaliser * kept + weights.sum(-1)
        weights = weights * scales[1][0, at][None] if scales else weights
        sums = sums * kept[:, None] + dot(weights.astype(q.dtype), v[at].astype(q.dtype))
        return new, normaliser, sums

    nothing = jnp.full(queries, LOWEST), jnp.zeros(queries), jnp.zeros((queries, c))
    with evenly(rounds):  # at most; the loop's bounds are those of the row
        highest, normaliser, sums = jax.lax.fori_loop(begin, end, attend, nothing)
    some = jnp.maximum(normaliser, TINY)  # without any key the result is 0
    y[...] = sums / some[:, None]
    total[...] = highest + jnp.log(some)
